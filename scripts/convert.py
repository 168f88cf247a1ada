"""Turn a Llama checkpoint into an InfiniLlama model folder.

    python scripts/convert.py meta-llama/Llama-3.2-1B infini-llama-1b
    python scripts/convert.py ./llama ./infini --segment-length 1024 --memory-update linear
    python scripts/convert.py ./llama ./infini --dtype bfloat16
    python scripts/convert.py ./SmolLM2-135M-Instruct.Q4_1.gguf ./infini

SOURCE is a Hub id, a folder with safetensors or `.bin` weights, a folder with a GGUF file, or a GGUF file. OUTPUT
becomes a folder that `AutoModelForCausalLM.from_pretrained(OUTPUT, trust_remote_code=True)` loads, whether or not this
project is installed there: weights, the gates of the memory, config, modeling code, tokenizer, chat template,
generation config and licence.

The weights stay as they are, bit for bit, unless `--dtype` asks for a cast. They are copied shard by shard, so a model
of any size needs the memory of its largest shard (but a GGUF file is unpacked whole, in memory). At the end the logits
of source and output are compared on a short text, and have to be equal to the last bit; for a model that is too large
for this machine's memory that check is skipped. OUTPUT appears only when everything has succeeded; the source is never
written to.

The last line on stdout is the report, one JSON document; everything else goes to stderr. The exit status is 0, or 2
when the conversion is refused or fails.
"""

import argparse
import errno
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from infini_llama import modeling_infini
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import InfiniLlamaForCausalLM

__all__ = ["ConversionError", "convert", "main"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
COMPANIONS = (
    GENERATION_CONFIG_NAME,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    *LICENCES,
)
# What these say about the source is not true of the output. `layer_types` is no field of Llama, but some exporters
# write it, and its names are not ours.
REPLACED_FIELDS = ("architectures", "auto_map", "layer_types", "model_type", "transformers_version")
# The check takes at most this share of the memory that is free.
CHECK_MEMORY_SHARE = 0.6


class ConversionError(ValueError):
    """The conversion is refused or has failed; the message says what is wrong with which value, and the remedy."""


def say(message: str) -> None:
    print(message, file=sys.stderr)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# Finding the source


def locate(source: str, gguf_file: str | None, revision: str | None) -> tuple[Path, str | None]:
    """Return the local folder of the source, and the name of the GGUF file in it that holds the model, if one does."""
    path = Path(source)
    if path.exists() and revision is not None:
        say(f"warning: revision '{revision}' has no effect, source '{path}' is local")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConversionError(f"source '{path}' is a file but no .gguf: give the model's folder")
        if gguf_file not in (None, path.name):
            raise ConversionError(f"gguf_file is '{gguf_file}', but source is a GGUF file: leave one of the two out")
        return path.parent.resolve(), path.name
    folder = path.resolve() if path.is_dir() else download(source, gguf_file, revision)
    return folder, choose_gguf(folder, gguf_file)


def download(source: str, gguf_file: str | None, revision: str | None) -> Path:
    """Fetch what the conversion needs from the Hub, and nothing else; safetensors before `.bin`."""
    weights = [gguf_file] if gguf_file else ["model*.safetensors", SAFE_WEIGHTS_INDEX_NAME]
    patterns = [CONFIG_NAME, *COMPANIONS]
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*patterns, *weights]))
        if not gguf_file and not any(folder.glob("*.safetensors")):
            weights = ["pytorch_model*.bin", WEIGHTS_INDEX_NAME]
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*patterns, *weights]))
        return folder
    except GatedRepoError:
        reason = "is a gated repository: accept its licence on its page, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is neither a local folder nor a repository on the Hub that you may read: check the name, or log in"
    except RevisionNotFoundError:
        reason = f"has no revision '{revision}': leave --revision out, or name a branch, tag or commit"
    except HFValidationError:
        reason = "is neither an existing path nor a valid Hub id: check the spelling"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "is no local folder, and the Hub cannot be reached: check the network, or give a local folder"
    except OSError as error:
        reason = f"cannot be downloaded ({one_line(error)}): try again, or give a local folder"
    raise ConversionError(f"source '{source}' {reason}")


def choose_gguf(folder: Path, gguf_file: str | None) -> str | None:
    """Return the GGUF file to read: the one asked for, or the only one of a folder that holds no other model."""
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ConversionError(f"gguf_file '{gguf_file}' is not in '{folder}': name a file of that folder")
        return gguf_file
    found = sorted(file.name for file in folder.glob("*.gguf"))
    if not found or (folder / CONFIG_NAME).is_file():
        return None
    if len(found) > 1:
        raise ConversionError(f"source '{folder}' has several GGUF files: choose one with --gguf-file, of {found}")
    return found[0]


def read_llama_config(folder: Path, gguf_file: str | None) -> dict[str, Any]:
    """Return the source's config as it stands in the file, after making sure that it is that of a Llama."""
    if gguf_file is not None:
        # Transformers' GGUF reader raises whatever the bytes lead it to: struct.error, KeyError, ValueError, ...
        try:
            fields, _ = PreTrainedConfig.get_config_dict(folder, gguf_file=gguf_file)
        except Exception as error:
            raise broken_gguf(gguf_file, error) from error
    else:
        fields = read_json(folder / CONFIG_NAME, "give a folder with a whole model, or choose with --gguf-file")
    model_type, architectures = fields.get("model_type"), fields.get("architectures")
    if model_type == InfiniLlamaConfig.model_type:
        raise ConversionError(
            f"source has model_type '{model_type}', so it is converted already: load it and change its config "
            "(segment_length, memory_update), or convert the Llama that it came from"
        )
    if model_type != LlamaConfig.model_type or architectures not in (None, [], [LlamaForCausalLM.__name__]):
        raise ConversionError(
            f"source has model_type '{model_type}' and architectures {architectures}: only a LlamaForCausalLM "
            "(model_type 'llama') can be converted"
        )
    if quantization := fields.get("quantization_config"):
        method = quantization.get("quant_method")
        raise ConversionError(f"source has a quantization_config ('{method}'): convert the unquantised checkpoint")
    return fields


def broken_gguf(gguf_file: str, error: Exception) -> ConversionError:
    missing_package = isinstance(error, ImportError)
    remedy = "install it with `pip install gguf`" if missing_package else "fetch it again, or take another file"
    return ConversionError(f"gguf_file '{gguf_file}' cannot be read ({one_line(error)}): {remedy}")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise ConversionError(f"source has no {path.name} in '{path.parent}': {remedy}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"source has a broken {path.name} ({one_line(error)}): fetch it again") from error


def find_shards(folder: Path) -> list[Path]:
    """Return the weight files of a folder, in the order in which Transformers looks for them."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            weight_map = read_json(folder / index, "fetch it again").get("weight_map", {})
            shards = [folder / name for name in sorted(set(weight_map.values()))]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise ConversionError(f"source lacks {missing}, named in its {index}: fetch them again")
            return shards
    raise ConversionError(f"source '{folder}' has no weights: no {SAFE_WEIGHTS_NAME}, no {WEIGHTS_NAME}, no index")


def unpack_gguf(folder: Path, gguf_file: str, target: Path, dtype: str) -> None:
    """Write the model and the tokenizer of a GGUF file as an ordinary Llama folder."""
    say(f"unpacking {gguf_file}")
    try:
        quantization = GgufConfig(dequantize=True)
        model = LlamaForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, quantization_config=quantization, dtype=dtype
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    except Exception as error:
        raise broken_gguf(gguf_file, error) from error
    # The unpacked model and the output lie side by side for a while.
    require_disk_space(target.parent, 2 * sum(tensor.nbytes for tensor in model.state_dict().values()))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    copy_files(folder, target, LICENCES)


# Weights


def read_shard(shard: Path, device: str) -> dict[str, torch.Tensor]:
    """Load a weight file; on the meta device only names, shapes and dtypes are read."""
    try:
        return load_state_dict(shard, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"weight file '{shard.name}' is corrupt, or it holds code, which is never loaded: fetch it again, or take "
            "the model's safetensors files"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ConversionError(
            f"weight file '{shard.name}' cannot be read ({one_line(error)[:200]}): if it is truncated, fetch it again "
            "(with `git lfs pull`, should it be a Git LFS pointer)"
        ) from error


def build_on_meta(model_class: type[PreTrainedModel], config: InfiniLlamaConfig) -> PreTrainedModel:
    """Build a model that has names and shapes, but no memory."""
    with torch.device("meta"):
        return model_class(config)


def require_llama_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Refuse a checkpoint that lacks a tensor of the Llama its config describes, or has one of another shape."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise ConversionError(
            f"source lacks {len(missing)} tensors of a LlamaForCausalLM, the first is '{missing[0]}': fetch the "
            "weights again, or correct config.json"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ConversionError(
                f"tensor '{name}' has shape {tuple(found[name].shape)}, but the config asks for "
                f"{tuple(tensor.shape)}: take weights and config of the same model"
            )


def make_gates(config: InfiniLlamaConfig) -> dict[str, torch.Tensor]:
    """Return what an InfiniLlama has and a Llama has not."""
    llama, infini = (build_on_meta(cls, config) for cls in (LlamaForCausalLM, InfiniLlamaForCausalLM))
    known, gates = llama.state_dict().keys(), {}
    for prefix, module in infini.named_modules():
        new = [
            f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False) if f"{prefix}.{name}" not in known
        ]
        if new:
            infini._init_weights(module.to_empty(device="cpu").float())
            gates |= {name: infini.get_parameter(name).detach() for name in new}
    return gates


def write_weights(folder: Path, target: Path, config: InfiniLlamaConfig, cast: torch.dtype | None) -> dict[str, Any]:
    """Copy the weights shard by shard, add the gates in a shard of their own, and write the index of them all.

    Fills in `config.dtype` where the source leaves it open, as Transformers would on loading.

    Returns:
        The counts for the report.
    """
    shards = find_shards(folder)
    contents = [read_shard(shard, "meta") for shard in shards]
    found = {name: tensor for content in contents for name, tensor in content.items()}
    llama = build_on_meta(LlamaForCausalLM, config).state_dict()
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    require_llama_tensors(found, {name: tensor for name, tensor in llama.items() if name not in optional})
    wanted = {name: tensor for name, tensor in found.items() if name in llama}
    require_disk_space(target, sum(tensor.numel() * (cast or tensor.dtype).itemsize for tensor in wanted.values()))
    config.dtype = cast or config.dtype or next(iter(wanted.values())).dtype

    # The gates come last, so that nothing that looks at the first shard (Transformers, for the dtype) sees them.
    file_names = [f"model-{i + 1:05}-of-{len(shards) + 1:05}.safetensors" for i in range(len(shards) + 1)]
    progress = tqdm(list(zip(shards, contents, file_names)), desc="weights", unit="shard", file=sys.stderr)
    for shard, content, file_name in progress:
        write_shard(shard, content, target / file_name, wanted.keys(), config, cast)
    gates = make_gates(config)
    save_tensors(gates, target / file_names[-1])
    written = write_index(target, file_names)

    left_out = sorted(found.keys() - written.keys())
    unknown = [name for name in left_out if name not in llama and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        say(f"warning: {len(unknown)} tensors are no part of a LlamaForCausalLM and are left out: {unknown[:10]}")
    counts = {"copied": len(written) - len(gates), "added": len(gates), "left_out": len(left_out)}
    return {"tensors": counts, "left_out": left_out, "bytes": sum(tensor.nbytes for tensor in written.values())}


def write_index(target: Path, file_names: list[str]) -> dict[str, torch.Tensor]:
    """Write the index of the shards as they are on the disk, and return their tensors on the meta device."""
    contents = {file_name: read_shard(target / file_name, "meta") for file_name in file_names}
    written = {name: tensor for content in contents.values() for name, tensor in content.items()}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in written.values())},
        "weight_map": {name: file_name for file_name, content in contents.items() for name in content},
    }
    (target / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return written


def write_shard(
    shard: Path,
    content: dict[str, torch.Tensor],
    target: Path,
    wanted: set[str],
    config: InfiniLlamaConfig,
    cast: torch.dtype | None,
) -> None:
    """Write one weight file of the source as safetensors, with the wanted tensors only."""
    if cast is None and shard.suffix == ".safetensors" and content.keys() <= wanted and is_marked_as_torch(shard):
        shutil.copyfile(shard, target)
        return
    tensors = {name: tensor for name, tensor in read_shard(shard, "cpu").items() if name in wanted}
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None and embedding is not None:
        # `.bin` files name tied weights twice. Two different tensors are both kept: Transformers does not tie those.
        if head.data_ptr() == embedding.data_ptr():
            del tensors["lm_head.weight"]
    if cast is not None:
        # One by one, so that the shard is not held twice.
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(cast)
    save_tensors(without_shared_storage(tensors), target)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # safetensors makes files that only their owner may read; the output's files are to be like any other.
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def is_marked_as_torch(shard: Path) -> bool:
    """Whether the file carries the mark that older versions of Transformers insist on."""
    with safe_open(shard, framework="pt") as file:
        return (file.metadata() or {}).get("format") == "pt"


def without_shared_storage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give every tensor its own contiguous memory, which safetensors asks for."""
    seen = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        result[name] = result[name].contiguous()
        seen.add(pointer)
    return result


# Everything but the weights


def build_config(fields: dict[str, Any], **infini_fields: Any) -> InfiniLlamaConfig:
    """Return the source's config with our fields added."""
    kept = {name: value for name, value in fields.items() if name not in REPLACED_FIELDS}
    try:
        config = InfiniLlamaConfig.from_dict({**kept, **infini_fields})
    except (StrictDataclassError, ValueError) as error:
        raise ConversionError(f"the config is refused: {one_line(error)}") from error
    config.architectures = [InfiniLlamaForCausalLM.__name__]
    return config


def write_config_and_code(config: InfiniLlamaConfig, target: Path) -> None:
    """Write config.json with a complete auto_map, and the payload, by the same function as `save_pretrained`."""
    for name in modeling_infini.__all__:
        model_class = getattr(modeling_infini, name)
        if vars(model_class).get("_auto_class"):
            custom_object_save(build_on_meta(model_class, config), target, config=config)
    config.save_pretrained(target)


def copy_files(folder: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        if file.is_file():
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def copy_companions(folder: Path, fields: dict[str, Any], target: Path) -> None:
    """Bring tokenizer, chat template, generation config and licence along."""
    copy_files(folder, target, COMPANIONS)
    if not (target / GENERATION_CONFIG_NAME).exists():
        # Old models keep sampling settings in config.json, where a new config does not carry them any more.
        GenerationConfig.from_model_config(dict(fields)).to_json_file(target / GENERATION_CONFIG_NAME)
    if not (target / "tokenizer_config.json").exists():
        say("warning: the source has no tokenizer_config.json, so the output may have no tokenizer")


# The check


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        # sysconf knows only free pages, and after copying a large model the page cache has taken nearly all of them.
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@torch.no_grad()
def short_text_logits(model: LlamaForCausalLM, lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.vocab_size
    return [model(torch.randint(vocab_size, (1, length), generator=generator)).logits.float() for length in lengths]


def compare_logits(folder: Path, target: Path, config: InfiniLlamaConfig, cast: torch.dtype | None) -> dict[str, Any]:
    """Demand that source and output give the same logits, one model in memory at a time.

    Within one segment an InfiniLlama is the Llama that it came from, so nothing but equality will do.
    """
    needed, available = 4 * build_on_meta(LlamaForCausalLM, config).num_parameters(), available_memory()
    if needed > CHECK_MEMORY_SHARE * available:
        reason = f"the model has {needed / 1e9:.1f} GB in float32, and {available / 1e9:.1f} GB of memory are free"
        say(f"check skipped: {reason}")
        return {"result": "skipped", "reason": reason}
    say("checking the logits")
    lengths = sorted({min(4, config.segment_length), min(64, config.segment_length)})
    dtype = cast or "auto"
    expected = short_text_logits(LlamaForCausalLM.from_pretrained(folder, dtype=dtype), lengths)
    model, loading = InfiniLlamaForCausalLM.from_pretrained(target, dtype=dtype, output_loading_info=True)
    if loading["missing_keys"]:
        raise ConversionError(f"check failed: the output lacks {sorted(loading['missing_keys'])}: please report this")
    actual = short_text_logits(model, lengths)
    difference = max((a - b).abs().max().item() for a, b in zip(actual, expected))
    # Written so that NaN fails, too.
    if not difference == 0:
        raise ConversionError(
            f"check failed: logits of source and output differ by up to {difference}, but should be equal: look for "
            "NaN in the source's weights, otherwise please report this"
        )
    return {"result": "equal", "tokens": lengths, "max_abs_diff": difference}


# The whole


def require_disk_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ConversionError(
            f"output needs {size / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free on its disk: make room, or choose "
            "another disk"
        )


def require_free_output(output: Path, source: Path) -> None:
    """Refuse an output that holds something already, and one inside the source folder."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConversionError(f"output '{output}' exists and is never overwritten: remove it, or choose another")
    # Beside a GGUF file there is room for an output: the source is that file, not its folder.
    if source.is_dir() and source in (output, *output.parents):
        raise ConversionError(f"output '{output}' lies inside the source: choose a folder outside of '{source}'")


def is_disk_full(error: Exception) -> bool:
    # safetensors reports the system's error number in its text only.
    return getattr(error, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in str(error)


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    segment_length: int = InfiniLlamaConfig.segment_length,
    memory_update: str = InfiniLlamaConfig.memory_update,
    gate_init: float = InfiniLlamaConfig.gate_init,
    write_gate: bool = InfiniLlamaConfig.write_gate,
    read_gate: bool = InfiniLlamaConfig.read_gate,
    dtype: str = "auto",
    gguf_file: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Convert a Llama checkpoint into an InfiniLlama folder.

    Args:
        source: Hub id, model folder, or GGUF file.
        output: Folder to create; it appears only when everything has succeeded, and nothing is overwritten.
        segment_length: Tokens per segment.
        memory_update: `"delta"`, `"linear"`, `"least_squares"` or `"none"`.
        gate_init: Value of every gate, beta of equation 10.
        write_gate: Add gates that choose what is written.
        read_gate: Let the gates of equation 10 depend on the token.
        dtype: `"auto"` keeps the weights as they are, bit for bit; `"float32"`, `"bfloat16"` and `"float16"` cast
            them. The gates are float32 in any case.
        gguf_file: Name of a GGUF file in the source.
        revision: Branch, tag or commit of a source on the Hub.

    Returns:
        The report: what was copied, added and left out, bytes, dtype, the result of the check, seconds.

    Raises:
        ConversionError: the conversion is refused or has failed. There is no output then.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise ConversionError(f"dtype is '{dtype}': choose one of {DTYPES}")
    cast = None if dtype == "auto" else getattr(torch, dtype)
    output = Path(output).resolve()
    require_free_output(output, Path(source).resolve())
    folder, gguf_file = locate(os.fspath(source), gguf_file, revision)
    fields = read_llama_config(folder, gguf_file)
    settings = {"memory_update": memory_update, "gate_init": gate_init}
    settings |= {"write_gate": write_gate, "read_gate": read_gate}
    config = build_config(fields, segment_length=segment_length, **settings)

    with working_folder(output) as work:
        target = Path(work) / "output"
        target.mkdir()
        try:
            if gguf_file is not None:
                unpack_gguf(folder, gguf_file, Path(work) / "llama", dtype)
                folder = Path(work) / "llama"
            counts = write_weights(folder, target, config, cast)
            copy_companions(folder, fields, target)
            write_config_and_code(config, target)
            check = compare_logits(folder, target, config, cast)
            target.rename(output)
        except (OSError, SafetensorError) as error:
            if is_disk_full(error):
                raise ConversionError(f"the disk of '{output}' is full: make room, or choose another") from error
            raise ConversionError(f"'{output}' cannot be made ({one_line(error)}): try another place") from error
    return {
        "source": os.fspath(source),
        "output": str(output),
        "segment_length": config.segment_length,
        "memory_update": config.memory_update,
        "gate_init": config.gate_init,
        "write_gate": config.write_gate,
        "read_gate": config.read_gate,
        "dtype": str(config.dtype).removeprefix("torch."),
        **counts,
        "check": check,
        "seconds": round(time.perf_counter() - started, 2),
    }


def working_folder(output: Path) -> tempfile.TemporaryDirectory:
    """Make a folder beside the output, so that the result is renamed within one disk; it vanishes at the end."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent)
    except OSError as error:
        reason = error.strerror
        raise ConversionError(f"output '{output}' cannot be written ({reason}): choose another place") from error


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hub id, model folder, or GGUF file of a Llama")
    parser.add_argument("output", help="folder to create; nothing is ever overwritten")
    parser.add_argument(
        "--segment-length",
        type=int,
        default=InfiniLlamaConfig.segment_length,
        help="tokens per segment; keep it within the source's max_position_embeddings (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-update",
        choices=("delta", "linear", "least_squares", "none"),
        default=InfiniLlamaConfig.memory_update,
        help="how a segment is written into the memory; none: local attention only (default: %(default)s)",
    )
    parser.add_argument(
        "--gate-init",
        type=float,
        default=InfiniLlamaConfig.gate_init,
        help="initial gate of every head; sigmoid(gate) is the share of the memory (default: %(default)s)",
    )
    parser.add_argument(
        "--write-gate",
        action="store_true",
        help="add gates that choose what is written, to be trained (not in the paper)",
    )
    parser.add_argument(
        "--read-gate",
        action="store_true",
        help="let the gate of every head depend on the token, which has to be trained (not in the paper)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="cast the weights; auto keeps them bit for bit (default: %(default)s)",
    )
    parser.add_argument("--gguf-file", metavar="NAME", help="GGUF file to read, when the source folder holds several")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a source on the Hub")
    return parser


def main(argv: list[str] | None = None) -> int:
    try:
        report = convert(**vars(build_parser().parse_args(argv)))
    except ConversionError as error:
        say(f"error: {error}")
        return 2
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
