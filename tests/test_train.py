"""`scripts/train.py`: runs of a few steps on a tiny model, what they write, and how they survive being killed."""

import copy
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import base_llama, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from infini_llama.cache_infini import InfiniCache
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts import train
from infini_llama.scripts.generate import compile_layers
from infini_llama.scripts.retrieval_tasks import FILLER, INTRO
from infini_llama.scripts.train import Training, default_precision
from infini_llama.scripts.training_options import TrainingOptions, parse_options

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))
N = tiny_config().segment_length
COPY = {"task": "copy", "num_tokens": 2}


# PEFT looks at an attribute by the name that Transformers deprecated.
with_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` writes what it has read to a cache: not to the user's."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)
        yield


def forget_accelerator() -> None:
    """Accelerate keeps the settings of a process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """And no other test shall find those of this one."""
    yield
    forget_accelerator()


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", "<unknown>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Whitespace()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


WORDS = sorted(set(re.findall(r"[a-zA-Z]+", INTRO + FILLER + " The pass key What Remember")))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of the words of the passkey task."""
    return word_tokenizer([*WORDS, *"0123456789.?"])


def save_model(folder: Path, tokenizer: PreTrainedTokenizerBase, **settings) -> Path:
    torch.manual_seed(0)
    tiny_model(vocab_size=len(tokenizer), **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved InfiniLlama."""
    return save_model(tmp_path_factory.mktemp("models") / "infini", tokenizer)


def random_words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 3 to 60 words."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    documents = [random_words(rng, rng.randint(3, 60)) for _ in range(30)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document that is longer than any run here."""
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text(random_words(random.Random(1), 3000))
    return path


def arguments(**options) -> list[str]:
    """A command line."""
    argv = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return argv


@pytest.fixture
def settings(folder: Path, texts: Path, tmp_path: Path) -> dict:
    """A run of two steps on two rows of two segments."""
    return {
        "model": folder,
        "output": tmp_path / "out",
        "data": [texts],
        "sequence_length": [2 * N],
        "batch_tokens": 4 * N,
        "max_steps": 2,
        "mixed_precision": "no",
        "report_to": "none",
        "save_steps": 0,
    }


@pytest.fixture
def run(settings: dict, capsys: pytest.CaptureFixture):
    """Run train.py in this process; returns its report, its log, what it said, and where the model is."""

    def run(recipe: Path | None = None, **options) -> types.SimpleNamespace:
        forget_accelerator()
        options = (settings if recipe is None else {}) | options
        capsys.readouterr()
        code = train.main([*([str(recipe)] if recipe else []), *arguments(**options)])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        output = Path(options["output"])
        return types.SimpleNamespace(
            report=strict_json(captured.out.splitlines()[-1]),
            log=[strict_json(line) for line in (output / "log.jsonl").read_text().splitlines()],
            said=captured.err,
            output=output,
            model=output / "model",
        )

    return run


@pytest.fixture
def training(settings: dict):
    """A run that the test drives itself."""

    def training(**options) -> Training:
        forget_accelerator()
        return Training(parse_options(arguments(**settings | options)))

    return training


def strict_json(line: str):
    """JSON has no NaN and no infinity."""
    return json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def column(log: list[dict], key: str) -> list:
    return [record[key] for record in log]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_equal(actual, expected) -> None:
    """The same operations on the same numbers."""
    assert_close(actual, expected, rtol=0, atol=0)


# What a run writes


def test_a_run_ends_with_a_model_a_log_and_one_line_of_json(run, folder):
    """The model loads by itself and has been trained, the log has a line per step, and the report sums them up."""
    result = run(max_steps=3)
    assert column(result.log, "step") == [1, 2, 3]
    assert all(math.isfinite(loss) for loss in column(result.log, "loss"))
    assert column(result.log, "tokens") == [4 * N, 8 * N, 12 * N]
    model = InfiniLlamaForCausalLM.from_pretrained(result.model)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert tokenizer("the grass")["input_ids"] == AutoTokenizer.from_pretrained(folder)("the grass")["input_ids"]
    before = weights(folder)
    assert all((model.state_dict()[name] != before[name]).any() for name in before)
    assert result.report["steps"] == 3 and result.report["tokens"] == 12 * N
    assert result.report["loss"] == pytest.approx(sum(column(result.log, "loss")) / 3)
    assert result.report["gates"]["mean"] == pytest.approx(float(model.gate_statistics()["gates/mean"]))
    assert result.report["output"] == str(result.output)
    assert sorted(path.name for path in result.output.iterdir()) == ["log.jsonl", "model"]


def test_the_tracker_shows_losses_rates_and_the_gates_of_every_layer(run):
    """TensorBoard by default and offline, every `logging_steps`; names are those of the log."""
    result = run(
        report_to="tensorboard", logging_steps=2, max_steps=4, data=[COPY], eval_data=[COPY], eval_sequences=1
    )
    shown = EventAccumulator(str(result.output / "tracker")).Reload()
    expected = {"loss", "losses/copy", "learning_rate", "gate_learning_rate", "gradient_norm", "tokens_per_second"}
    expected |= {f"gates/layer_0{layer}/{what}" for layer in (0, 1) for what in ("mean", "min", "max")}
    expected |= {f"evaluation/copy/{2 * N}/{switch}/exact" for switch in ("on", "off")}
    assert expected <= set(shown.Tags()["scalars"])
    assert [event.step for event in shown.Scalars("gates/layer_01/mean")] == [2, 4]
    assert [event.value for event in shown.Scalars("loss")] == pytest.approx(column(result.log, "loss")[1::2])


def test_the_help_documents_every_option(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainingOptions):
        assert f" --{field.name} " in shown and field.metadata["help"].split()
        assert " ".join(field.metadata["help"].split()) in shown
    assert "python scripts/train.py scripts/recipes/passkey.yaml" in shown


def test_the_script_runs_as_a_file(tmp_path):
    """From any folder."""
    program = [sys.executable, str(ROOT / "scripts" / "train.py"), "--model", "m"]
    result = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: `output` is missing")


# Recipes and options


@with_peft
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(recipe, run, folder, texts, tmp_path):
    """Each file in scripts/recipes, on other text: two small steps of its first stage, and an evaluation."""
    keys = yaml.safe_load(recipe.read_text())
    (tmp_path / "qa1_stories_train.txt").write_text("1 Mary left.\n2 Who left? \tMary\t1\n")

    def localised(entry: dict | str) -> dict:
        entry = {"source": entry} if isinstance(entry, str) else dict(entry)
        if "source" in entry:
            elsewhere = {"source", "split", "config", "column"}
            return {k: v for k, v in entry.items() if k not in elsewhere} | {"source": str(texts)}
        entry |= {"babi": str(tmp_path)} if "babi" in entry else {}
        return entry | ({"haystack": localised(entry["haystack"])} if "haystack" in entry else {})

    short = {"gradient_accumulation_steps": 1, "batch_tokens": 1, "max_steps": 2}
    short |= {"eval_sequences": 1, "eval_length": keys["sequence_length"][:1]}
    short |= {name: list(map(localised, keys[name])) for name in ("data", "eval_data") if name in keys}
    result = run(recipe, model=folder, output=tmp_path / "out", **short)
    assert len(result.log) == 2 and result.log[0]["sequence_length"] == keys["sequence_length"][0]
    assert len(result.report["evaluation"] or {}) == len(keys.get("eval_data", []))
    options = parse_options([str(recipe), *arguments(model=folder, output=tmp_path / "out")])
    assert dataclasses.asdict(options) | keys == dataclasses.asdict(options)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe."""

    def recipe(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"model: m\noutput: o\ndata: [d]\nsequence_length: [10]\n{text}\n")
        return path

    return recipe


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_defaults(recipe):
    path = recipe("learning_rate: 0.5\nseed: 7\nlora_target_modules: [q_proj]")
    options = parse_options([str(path), "--seed", "8", "--data", "a", '{"task": "copy", "weight": 2}'])
    assert (options.learning_rate, options.seed, options.max_steps) == (0.5, 8, 1000)
    assert options.data == ["a", {"task": "copy", "weight": 2}]
    assert options.sequence_length == [10] and options.lora_target_modules == ["q_proj"]


def test_numbers_and_switches_of_a_recipe_mean_what_they_look_like(recipe):
    """YAML takes 1e-4 for text and no for false."""
    path = recipe(
        "learning_rate: 1e-4\nmax_steps: 7\nresume: true\nmixed_precision: no\nsegment_length:\ngate_init: -1e-3\n"
    )
    options = parse_options([str(path)])
    assert (options.learning_rate, options.max_steps, options.resume) == (1e-4, 7, True)
    assert options.mixed_precision == "no" and options.segment_length is None and options.gate_init == -1e-3


@pytest.mark.parametrize(
    "line, names",
    [
        ("learning_rat: 1", ["learning_rat'", "'learning_rate'"]),
        ("qqq: 1", ["'qqq'"]),
        ("stage_steps: 3", ["stage_steps: 3", "list"]),
        ("seed: [3]", ["seed: [3]", "single value"]),
        ("seed: x", ["recipe.yaml", "seed", "'x'"]),
        ("sequence_length: [10, x]", ["recipe.yaml", "sequence_length", "'x'"]),
        ("sequence_length: [10.5]", ["recipe.yaml", "sequence_length", "10.5"]),
        ("memory_update: nothing", ["recipe.yaml", "memory_update", "nothing", "delta"]),
        ("max_steps: 0", ["max_steps", "at least 1"]),
        ("state_passing: 1.5", ["state_passing", "between 0 and 1"]),
        ("state_passing_scale: 0.5", ["state_passing_scale", "1 or more"]),
        ("state_passing_scale: 4", ["state_passing_scale", "advance_below"]),
        ("sequence_length: [10, 20]", ["stage_steps", "advance_below"]),
        ("sequence_length: [10, 20]\nstage_steps: [1, 2]", ["stage_steps", "2 entries for 2"]),
        ("sequence_length: [10, 20]\nstage_steps: [1]\nadvance_below: 1", ["choose one"]),
        ("model:", ["`model` is missing", "--model"]),
        ("a: [", ["recipe.yaml", "cannot be read"]),
    ],
)
def test_what_a_recipe_cannot_say_is_refused_by_name(line, names, recipe, capsys):
    assert train.main([str(recipe(line))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and all(name in error for name in names), error


def test_a_memory_that_does_not_grow_with_the_text_has_no_scale(recipe, capsys):
    """What least squares remembers of a text twice is what it remembers of it once."""
    text = "state_passing: 0.5\nstate_passing_scale: 4\nadvance_below: 1\nmemory_update: least_squares"
    nano = Path(train.__file__).parent.parent / "models" / "nano"
    assert train.main([str(recipe(text)), "--model", str(nano)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "state_passing_scale is 4.0" in error and "least_squares" in error


def test_a_recipe_that_is_missing_or_no_mapping_is_refused(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- data")
    for name in ("list.yaml", "missing.yaml"):
        assert train.main([str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


# The curriculum


def test_stages_end_after_their_steps(run):
    """And the number of rows falls as the sequences grow."""
    result = run(sequence_length=[N, 2 * N, 4 * N], stage_steps=[2, 1], max_steps=5)
    assert column(result.log, "sequence_length") == [N, N, 2 * N, 4 * N, 4 * N]
    assert column(result.log, "tokens") == [4 * N * step for step in range(1, 6)]
    assert result.report["sequence_length"] == 4 * N


@pytest.mark.parametrize("below, lengths", [(100.0, [N, N, 2 * N, 2 * N, 4 * N, 4 * N]), (0.0, [N] * 6)])
def test_stages_end_when_the_loss_is_low_enough(below, lengths, run):
    """Of the last `advance_window` steps, all of them of the same stage."""
    stages = [N, 2 * N, 4 * N]
    result = run(sequence_length=stages, advance_below=below, advance_window=2, max_steps=6)
    assert column(result.log, "sequence_length") == lengths


def test_the_loss_of_the_tasks_decides_if_there_are_any(training, texts):
    """A text's loss stays high whatever the model remembers; without tasks, it is the texts' that counts."""
    mixed = training(data=[texts, COPY], sequence_length=[N, 2 * N], advance_below=1.0, advance_window=2)
    for _ in range(3):
        mixed.advance({str(texts): 0.0})
    mixed.advance({str(texts): 9.0, "copy": 0.5})
    assert mixed.stage == 0 and list(mixed.window) == [0.5]
    mixed.advance({str(texts): 9.0, "copy": 0.7})
    assert mixed.stage == 1 and not mixed.window
    plain = training(sequence_length=[N, 2 * N], advance_below=1.0, advance_window=2)
    plain.advance({str(texts): 1.5})
    plain.advance({str(texts): 0.4})
    assert plain.stage == 1


# Steps of the optimizer


def test_rates_rise_and_fall_as_asked_and_the_gates_have_their_own(run):
    """Warm-up and cosine, written out."""
    result = run(max_steps=6, warmup_steps=2, learning_rate=1e-3, gate_learning_rate=0.02)
    share = [0.0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4))]
    assert column(result.log, "learning_rate") == pytest.approx([1e-3 * x for x in share])
    assert column(result.log, "gate_learning_rate") == pytest.approx([0.02 * x for x in share])


def test_the_gates_move_by_their_own_rate(run, folder):
    """The first step of Adam is its learning rate: 0 for the weights, and 0.02 for the gates."""
    result = run(max_steps=1, learning_rate=0.0, gate_learning_rate=0.02, gate_init=0.5, weight_decay=0.1)
    before, after = weights(folder), weights(result.model)
    for name in before:
        if "memory_gate" in name:
            assert_close((after[name] - 0.5).abs(), torch.full_like(after[name], 0.02), rtol=1e-3, atol=0)
        else:
            assert_equal(after[name], before[name])


def test_a_model_gets_read_gates_that_are_trained(run, folder):
    """From 0, by the gates' rate; without the option there are none."""
    result = run(max_steps=1, learning_rate=0.0, gate_learning_rate=0.02, read_gate=True)
    gates = {name: x for name, x in weights(result.model).items() if "memory_gate.weight" in name}
    assert not gates.keys() & weights(folder).keys() and len(gates) == 2  # layers
    for gate in gates.values():
        assert gate.abs().max() < 0.0201 and gate.abs().median() > 0.0199


def test_a_model_gets_write_gates_that_are_trained(run, folder):
    """The first step of Adam moves their weights from 0 by the gates' rate (by less where the gradient is next to nothing);
    without the option there are none. (Their biases have no gradient yet: the same strength for all tokens makes no
    difference to `delta`.)"""
    result = run(max_steps=1, learning_rate=0.0, gate_learning_rate=0.02, write_gate=True)
    gates = {name: x for name, x in weights(result.model).items() if "write_gate" in name}
    assert not gates.keys() & weights(folder).keys() and len(gates) == 2 * 2  # of two layers
    for name, gate in gates.items():
        if "weight" in name:
            assert gate.abs().max() < 0.0201 and gate.abs().median() > 0.0199 and gate.all()


def test_accumulated_batches_are_one_batch(run, book, tmp_path):
    """Rows of a batch follow each other in the text: two batches of two rows are one of four."""
    options = {"data": [book], "sequence_length": [2 * N], "max_steps": 3}
    whole = run(output=tmp_path / "whole", batch_tokens=8 * N, **options)
    halves = run(output=tmp_path / "halves", batch_tokens=4 * N, gradient_accumulation_steps=2, **options)
    for key in ("loss", "gradient_norm", "tokens"):  # sums in another order
        assert column(halves.log, key) == pytest.approx(column(whole.log, key), rel=1e-5)
    # Adam divides gradients by their size: rounding of the smallest shows in steps of 1e-4.
    assert_close(weights(halves.model), weights(whole.model), rtol=0, atol=1e-5)


def test_precision_of_products_changes_the_losses_a_little(run, tmp_path):
    """bf16 is on; the weights stay float32."""
    exact = run(output=tmp_path / "exact")
    rounded = run(output=tmp_path / "rounded", mixed_precision="bf16")
    assert column(rounded.log, "loss") != column(exact.log, "loss")
    assert column(rounded.log, "loss") == pytest.approx(column(exact.log, "loss"), rel=0.02)
    assert {tensor.dtype for tensor in weights(rounded.model).values()} == {torch.float32}


@pytest.mark.parametrize(
    "able, precision",
    [
        ({"avx2": True}, "no"),
        ({"avx512_f": True, "avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"bf16": True}, "bf16"),
    ],
)
def test_the_precision_is_float32_where_bf16_has_no_instructions(able, precision, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert default_precision() == precision
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert default_precision() == "bf16"


@pytest.mark.parametrize("passing", [0.0, 1.0])
def test_activation_checkpointing_changes_no_loss(passing, run, tmp_path):
    """And with it no logits of a whole sequence are built, from an empty memory or another."""
    options = {"sequence_length": [8 * N], "max_steps": 3, "state_passing": passing}
    plain = run(output=tmp_path / "plain", activation_checkpointing=False, **options)
    blocks = run(output=tmp_path / "blocks", activation_checkpointing=True, block_segments=2, **options)
    assert column(blocks.log, "loss") == pytest.approx(column(plain.log, "loss"), rel=1e-5)
    assert column(blocks.log, "gradient_norm") == pytest.approx(column(plain.log, "gradient_norm"), rel=1e-4)


def test_a_truncated_run_has_the_loss_of_the_whole_and_the_gradients_of_its_spans(training, folder):
    """No gradient goes back over a multiple of `detach_segments`; the loop is written out on the plain model."""
    cut = training(detach_segments=2, sequence_length=[7 * N], batch_tokens=14 * N)
    batch, _ = cut.next_batch(2, 7 * N, 0)
    cut.model.train()
    loss = cut.forward_backward(batch, None)
    found = {name: p.grad for name, p in cut.infini_model.named_parameters()}

    def by_hand(spans: list[slice]) -> tuple[float, dict[str, torch.Tensor]]:
        model = InfiniLlamaForCausalLM.from_pretrained(folder)
        cache, total = InfiniCache(model.config), 0.0
        for span in spans:
            logits = model(
                batch.input_ids[:, span], position_ids=batch.position_ids[:, span], past_key_values=cache.detach_()
            ).logits
            targets, factors = batch.labels[:, 1:], batch.loss_weights[:, 1:]
            logits = logits[:, : targets[:, span].shape[1]]
            each = F.cross_entropy(logits.transpose(1, 2), targets[:, span], reduction="none", ignore_index=-100)
            part = (each * factors[:, span]).sum() / 2
            part.backward()
            total += part.item()
        return total, {name: p.grad for name, p in model.named_parameters()}

    expected_loss, expected = by_hand([slice(i, i + 2 * N) for i in range(0, 7 * N, 2 * N)])
    whole_loss, whole = by_hand([slice(0, 7 * N)])
    assert loss == pytest.approx(expected_loss, rel=1e-5) and loss == pytest.approx(whole_loss, rel=1e-5)
    assert_close(found, expected, rtol=1e-4, atol=1e-6)  # float32 sums in another order
    assert any((found[name] - whole[name]).abs().max() > 1e-4 for name in found)


def test_the_loss_of_a_text_is_that_of_its_targets(training, folder):
    """Divided by all places that could be targets, of which the first of each document is none."""
    run = training(sequence_length=[6 * N], batch_tokens=12 * N)
    batch, _ = run.next_batch(2, 6 * N, 0)
    with torch.no_grad():
        logits = InfiniLlamaForCausalLM.from_pretrained(folder)(
            batch.input_ids, position_ids=batch.position_ids
        ).logits
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], reduction="none")
    assert run.forward_backward(batch, None) == pytest.approx(each.sum().item() / (2 * (6 * N - 1)), rel=1e-5)


def test_from_scratch_takes_config_and_tokenizer_and_no_weights(training, folder):
    """The same seed begins with the same weights, another with others."""
    first, again, other = (
        training(from_scratch=True, seed=seed, segment_length=2 * N, sequence_length=[4 * N]) for seed in (0, 0, 1)
    )
    state, before = first.infini_model.state_dict(), weights(folder)
    assert_equal(dict(state), dict(again.infini_model.state_dict()))
    name = "model.layers.0.self_attn.q_proj.weight"
    others = other.infini_model.state_dict()[name]
    # The folder's model is of seed 0, and so is the first.
    assert (others != state[name]).any() and (others != before[name]).any()
    assert {n: x.shape for n, x in state.items()} == {n: x.shape for n, x in before.items()}
    assert first.segment_length == 2 * N and first.tokenizer.get_vocab() == again.tokenizer.get_vocab()


def test_a_model_with_tied_embeddings_is_trained_and_resumed(run, tokenizer, tmp_path):
    """As SmolLM2 and the small Llamas are: what is saved has one tensor for both."""
    tied = save_model(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    options = {"model": tied, "max_steps": 4, "save_steps": 2}
    whole = run(output=tmp_path / "whole", **options)
    shutil.copytree(whole.output, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-4")
    resumed = run(output=tmp_path / "half", resume=True, **options)
    assert column(resumed.log, "loss") == column(whole.log, "loss")
    assert_equal(weights(resumed.model), weights(whole.model))


# State passing


def watch(run: Training) -> list[types.SimpleNamespace]:
    """What the model is called with from now on, and its loss."""
    calls = []

    def before(module, args, kwargs):
        calls.append(types.SimpleNamespace(**kwargs, is_trained=torch.is_grad_enabled()))
        calls[-1].past_key_values = copy.deepcopy(kwargs["past_key_values"])

    def after(module, args, kwargs, output):
        calls[-1].loss = output.loss

    run.infini_model.register_forward_pre_hook(before, with_kwargs=True)
    run.infini_model.register_forward_hook(after, with_kwargs=True)
    return calls


@pytest.mark.parametrize("source", ["book", "texts", "copy"])
def test_a_sequence_with_a_passed_state_is_the_end_of_a_longer_text(source, training, folder, request):
    """Its loss is that in one text with all that its memory has read, and not that with an empty memory."""
    # A name, because that of the temporary folder would choose the texts.
    data = COPY if source == "copy" else {"source": str(request.getfixturevalue(source)), "name": source}
    run = training(data=[data], state_passing=1.0, state_passing_tokens=12 * N, learning_rate=0, gate_learning_rate=0)
    calls, read, texts, different = watch(run), [], {}, 0
    for _ in range(16):
        run.train_step()
    model = InfiniLlamaForCausalLM.from_pretrained(folder)
    for call in calls:
        rows, length = call.input_ids.shape
        if not call.is_trained:
            assert rows == 1 and call.loss is None
            read = [] if call.past_key_values.get_seq_length() == 0 else read
            read.append(call.input_ids)
            texts[sum(piece.shape[1] for piece in read)] = torch.cat(read, 1)
            continue
        seen = call.position_ids[0, 0].item()
        before = texts[seen].expand(rows, -1)  # the last text that was once so long
        is_first = (call.position_ids - call.position_ids[:, :1] == torch.arange(length)).cumprod(1).bool()
        assert (call.position_ids[:, 0] == seen).all() and seen > 0
        assert (call.position_ids[~is_first] < length).all()
        with torch.no_grad():
            positions = torch.cat([torch.arange(seen).expand(rows, -1), call.position_ids], 1)
            logits = model(torch.cat([before, call.input_ids], 1), position_ids=positions).logits[:, seen:]
            empty = model(call.input_ids, position_ids=call.position_ids - seen * is_first).logits
            losses = F.cross_entropy(logits.transpose(1, 2), call.shift_labels, reduction="none")
            alone = F.cross_entropy(empty.transpose(1, 2), call.shift_labels, reduction="none")
        loss = (losses * call.shift_weights).sum().item() / rows
        assert call.loss.item() == pytest.approx(loss, rel=1e-5)
        different += abs(loss - (alone * call.shift_weights).sum().item() / rows) > 1e-3
    assert different == 16
    lengths = {call.position_ids[0, 0].item() for call in calls if call.is_trained}
    # Documents that are shorter than a memory and a batch: each memory is a new one.
    assert lengths == {2 * N} if source == "texts" else len(lengths) > 2


def test_a_sequence_of_a_document_goes_on_where_its_memory_ends(training, tmp_path, settings):
    """And its memory where the last one ended, but for what was trained on; at the document's end another one is begun."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    texts = [random_words(random.Random(i), 30 * N) for i in range(3)]
    documents = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = training(
        data=[str(tmp_path / "books.jsonl")], state_passing=1.0, state_passing_tokens=1000 * N, max_steps=40
    )
    calls, read = watch(run), []
    for _ in range(20):
        run.train_step()
    begun = 0
    for call in calls:
        if not call.is_trained:
            begun += call.past_key_values.get_seq_length() == 0
            read = [] if call.past_key_values.get_seq_length() == 0 else read
        read += call.input_ids.flatten().tolist()
        assert any(document[: len(read)] == read for document in documents)
    assert begun > 2


def test_a_passed_state_sends_no_gradient_and_stays_as_it_was(training, book):
    """The memory is a copy for each batch: training on it does not write into it."""
    run = training(data=[book], state_passing=1.0, state_passing_every=1000, state_passing_tokens=12 * N)
    calls = watch(run)
    run.train_step()
    run.train_step()
    _, first, second = calls
    (memory,) = run.memories.values()
    assert first.is_trained and memory.tokens == 2 * N
    for layer in memory.cache.layers:
        assert all(tensor is None or not tensor.requires_grad for tensor in layer.state())
    for early, late in zip(first.past_key_values.layers, second.past_key_values.layers):
        assert_equal(early.state(), late.state())


def test_a_passed_state_grows_every_so_many_steps_to_the_largest_size_and_again(training):
    """By so many sequences, one after another; a task's steps start from all octaves of the sizes that it has had."""
    length, every, growth, most = 2 * N, 3, 2, 20 * N
    run = training(
        data=[COPY],
        state_passing=1.0,
        state_passing_every=every,
        state_passing_growth=growth,
        state_passing_tokens=most,
        max_steps=60,
        batch_tokens=length,
        gradient_accumulation_steps=2,
    )
    calls, sizes = watch(run), []
    for _ in range(60):
        run.train_step()
        (memory,) = run.memories.values()
        sizes.append(memory.tokens)
    assert sizes == [length * growth * (step // every % 5 + 1) for step in range(60)]
    assert all(call.input_ids.shape == (1, length) for call in calls if not call.is_trained)
    starts = [call.position_ids[0, 0].item() for call in calls if call.is_trained]
    octaves = [start.bit_length() for start in starts[60:]]  # by then the first text has been at its end
    assert set(octaves) == set(range(length.bit_length(), most.bit_length() + 1))
    assert min(map(octaves.count, set(octaves))) > 0.1 * len(octaves)


def test_compiled_layers_train_the_same(training, texts, book, monkeypatch):
    """On books and packed texts, with memories that are passed on, and without a graph for each of their layouts."""
    options = {"data": [book, texts], "state_passing": 0.5, "sequence_length": [3 * N], "batch_tokens": 6 * N}
    run, graphs, compile = training(**options), [], torch.nn.Module.compile
    losses = [run.train_step()["loss"] for _ in range(14)]

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compile(layer, backend=backend))
    torch.compiler.reset()
    run = training(torch_compile=True, **options)
    assert [run.train_step()["loss"] for _ in losses] == pytest.approx(losses, rel=1e-4)
    torch.compiler.reset()
    assert 0 < len(graphs) < 14


def test_gradients_of_compiled_layers_are_not_rounded_by_autocast(monkeypatch):
    """torch would compute them in bfloat16, also of the memory, which is in float32 because `least_squares` needs it."""
    model, compile = tiny_model(memory_update="least_squares"), torch.nn.Module.compile
    text = torch.randint(3, 30, (1, 3)).repeat(1, 4 * N)  # a text that repeats itself has keys in few directions

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(text, labels=text).loss
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expected = gradient()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compile(layer, backend="aot_eager"))
    torch.compiler.reset()
    compile_layers(model)
    assert (gradient() - expected).norm() < 0.01 * expected.norm()
    torch.compiler.reset()


def test_the_scale_of_passed_states_rises_while_the_loss_is_low(training, book):
    """By a quarter each time that the window is full, once sequences have their last length, up to the one asked for."""
    run = training(
        data=[book],
        state_passing=1.0,
        state_passing_every=1000,
        state_passing_scale=1.5,
        sequence_length=[2 * N, 4 * N],
        advance_below=1e9,
        advance_window=2,
    )
    calls = watch(run)
    records = [run.train_step() for _ in range(8)]
    assert [r["sequence_length"] // N for r in records] == [2, 2, 4, 4, 4, 4, 4, 4]
    assert [r["state_passing_scale"] for r in records] == [1, 1, 1, 1, 1.25, 1.25, 1.5, 1.5]
    (memory,) = run.memories.values()
    trained = [call for call in calls if call.is_trained]
    for call, record in zip(trained, records):
        for layer, original in zip(call.past_key_values.layers, memory.cache.layers):
            factors = layer.memory.normalizer.sum((1, 2)) / original.memory.normalizer.sum()
            assert (factors > 1 - 1e-5).all() and (factors < record["state_passing_scale"] + 1e-5).all()
            for row, factor in enumerate(factors):
                torch.testing.assert_close(layer.memory.matrix[row], original.memory.matrix[0] * factor)
    assert len(set(factors.tolist())) == len(factors)


def test_the_share_of_passed_states_is_the_one_asked_for(training, book):
    """The other sequences start from nothing, at position 0."""
    run = training(data=[book], state_passing=0.5, max_steps=40)
    calls = watch(run)
    for _ in range(40):
        run.train_step()
    trained = [call for call in calls if call.is_trained]
    # All have a cache, which those that start from nothing have empty: FSDP wants the same work from all processes.
    starts = [call.past_key_values.get_seq_length() for call in trained]
    assert len(trained) == 40 and 0.3 < sum(start > 0 for start in starts) / 40 < 0.7
    assert all((start == 0) == bool((call.position_ids[:, 0] == 0).all()) for start, call in zip(starts, trained))


# Adapters


@with_peft
def test_an_adapter_and_the_gates_are_all_that_lora_changes(training):
    """Two matrices for each of seven projections, and the gates, of two layers."""
    run = training(lora_rank=2, learning_rate=0.05, gate_learning_rate=0.05)
    before = {name: p.clone() for name, p in run.infini_model.named_parameters()}
    run.train_step()
    run.train_step()
    changed = {name for name, p in run.infini_model.named_parameters() if (p != before[name]).any()}
    assert all("lora_" in name or "memory_gate.modules_to_save" in name for name in changed)
    assert sum("memory_gate" in name for name in changed) == 2
    assert len(changed) == 2 * (2 * 7 + 1)


@with_peft
def test_an_adapter_and_the_merged_model_are_the_same_model(run, folder):
    """As they load from the output; the adapter on the model that it was trained on."""
    result = run(lora_rank=2, learning_rate=0.05, gate_learning_rate=0.05)
    ids = torch.randint(3, 40, (2, 4 * N))
    base = InfiniLlamaForCausalLM.from_pretrained(folder)
    merged = InfiniLlamaForCausalLM.from_pretrained(result.model)
    with torch.no_grad():
        before, expected = base(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(base, result.output / "adapter")(ids).logits
    assert_close(adapted, expected, rtol=1e-4, atol=1e-4)  # products in another order, on logits of 10
    assert (expected - before).abs().max() > 0.01
    assert weights(result.model).keys() == weights(folder).keys()
    assert result.report["gates"]["mean"] == pytest.approx(float(merged.gate_statistics()["gates/mean"]))


@with_peft
def test_an_adapter_goes_on_where_another_run_left_it(run, training, tmp_path):
    """Its first loss is that of the merged model of the run before, not that of the model below; gates too."""
    first = run(output=tmp_path / "first", lora_rank=2, learning_rate=0.05, gate_learning_rate=0.05)
    on_merged = run(output=tmp_path / "merged", model=first.model, max_steps=1)
    second = run(output=tmp_path / "second", adapter=first.output / "adapter", learning_rate=0.05, max_steps=2)
    assert second.log[0]["loss"] == pytest.approx(on_merged.log[0]["loss"], rel=1e-4)
    assert abs(second.log[0]["loss"] - first.log[0]["loss"]) > 0.01
    last = training(output=tmp_path / "third", adapter=second.output / "adapter")
    trained = [name for name, p in last.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * (2 * 7 + 1)


@with_peft
@pytest.mark.parametrize("kind", ["write", "read"])
def test_an_adapter_goes_on_with_gates_that_its_model_has_since(kind, run, training, tokenizer, tmp_path):
    """They start as the model's, and are trained and saved; what the adapter had goes on."""
    first = run(output=tmp_path / "first", lora_rank=2)
    model = save_model(tmp_path / "gated", tokenizer, **{f"{kind}_gate": True})
    start = training(model=model, output=tmp_path / "start", adapter=first.output / "adapter")
    before, own = (
        load_file(first.output / "adapter" / "adapter_model.safetensors"),
        load_file(model / "model.safetensors"),
    )
    names = {
        name.replace(".default", "").replace(".modules_to_save", ""): x for name, x in start.model.named_parameters()
    }
    assert all(torch.equal(names[name], x) for name, x in before.items())
    module = {"write": "write_gate.", "read": "memory_gate.weight"}[kind]
    gates = {name: x for name, x in names.items() if module in name and "original" not in name}
    assert gates and all(x.requires_grad for x in gates.values())
    assert all(torch.equal(x, own[name.removeprefix("base_model.model.")]) for name, x in gates.items())
    second = run(model=model, output=tmp_path / "second", adapter=first.output / "adapter", gate_learning_rate=0.05)
    after = load_file(second.output / "adapter" / "adapter_model.safetensors")
    assert set(after) == {*before, *gates} and any(not torch.equal(after[name], gates[name]) for name in gates)


@with_peft
@pytest.mark.parametrize("kind", ["write", "read"])
def test_an_adapter_with_gates_is_refused_by_a_model_without(kind, run, refuses, tokenizer, tmp_path):
    model = save_model(tmp_path / "gated", tokenizer, **{f"{kind}_gate": True})
    gated = run(model=model, output=tmp_path / "gates", lora_rank=2)
    refuses("`adapter`", f"{kind} gates", f"--{kind}-gate", lora_rank=0, adapter=gated.output / "adapter")


@with_peft
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["model", "adapter"])
def test_what_a_run_gives_can_be_bfloat16(options, run):
    """And is then loaded as such; gates are float32 in any model."""
    result = run(export_dtype="bfloat16", **options)
    assert InfiniLlamaForCausalLM.from_pretrained(result.model).dtype == torch.bfloat16
    files = [result.model / "model.safetensors"]
    files += [result.output / "adapter" / "adapter_model.safetensors"] if options else []
    for file in files:
        for name, x in load_file(file).items():
            assert x.dtype == (torch.float32 if "memory_gate" in name else torch.bfloat16), name


# Evaluation


BUCKETS = ["0", "1", "2-3", "2-3", "4-7", "4-7", "4-7", "4-7", "8-15", "8-15"]


def test_the_loss_of_a_text_is_that_of_its_full_logits_by_completed_segments(training, texts):
    """Memory on and off; each target in the bucket of the token that predicts it, by its place in the document."""
    length = 10 * N
    run = training(eval_data=[texts], eval_length=[length], eval_sequences=5)
    result = run.evaluate()[str(texts)][str(length)]
    (mixture,) = run.evaluation_mixture()
    rows = [mixture.next(1, length) for _ in range(5)]
    model = copy.deepcopy(run.infini_model).eval()
    for switch in ("on", "off"):
        model.config.memory_update = "delta" if switch == "on" else "none"
        buckets, all_losses = {}, []
        for row in rows:
            with torch.no_grad():
                logits = model(row.input_ids, position_ids=row.position_ids).logits[0]
            for place in range(length - 1):
                target = row.labels[0, place + 1]
                if target != -100:
                    all_losses.append(F.cross_entropy(logits[place], target).item())
                    label = BUCKETS[row.position_ids[0, place].item() // N]
                    buckets.setdefault(label, []).append(all_losses[-1])
        mean = sum(all_losses) / len(all_losses)
        assert result[switch]["loss"] == pytest.approx(mean, rel=1e-5)
        assert result[switch]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        expected = {label: sum(losses) / len(losses) for label, losses in buckets.items()}
        assert result[switch]["by_segments"] == pytest.approx(expected, rel=1e-5) and len(expected) >= 4
    assert result["on"]["loss"] != result["off"]["loss"]
    assert result["on"]["by_segments"]["0"] == pytest.approx(result["off"]["by_segments"]["0"], rel=1e-5)


def test_an_answer_is_exact_if_greedy_decoding_gives_it(training, tmp_path):
    """On a model that has begun to guess one of three tokens, right or wrong; memory on and off."""
    model = save_model(tmp_path / "guesser", word_tokenizer(["filler", "cue", *"abc"]))
    length, task = 4 * N, COPY | {"outside_last_segment": 1.0}
    options = {"data": [task], "eval_data": [task], "eval_length": [length], "eval_sequences": 40}
    run = training(model=model, learning_rate=0.01, max_steps=20, **options)
    for _ in range(20):
        run.train_step()
    result = run.evaluate()["copy"][str(length)]
    (mixture,) = run.evaluation_mixture()
    rows = [mixture.next(1, length) for _ in range(40)]
    model = copy.deepcopy(run.infini_model).eval()
    for switch in ("on", "off"):
        model.config.memory_update = "delta" if switch == "on" else "none"
        right, losses = 0, []
        for row in rows:
            decoded = model.generate(row.input_ids[:, :-2], max_new_tokens=2, min_new_tokens=2, do_sample=False)
            right += bool((decoded[:, -2:] == row.input_ids[:, -2:]).all())
            with torch.no_grad():
                losses.append(F.cross_entropy(model(row.input_ids).logits[0, -3:-1], row.input_ids[0, -2:]).item())
        assert result[switch]["exact"] == pytest.approx(right / 40)
        assert result[switch]["loss"] == pytest.approx(sum(losses) / 40, rel=1e-5)
    assert 0 < result["on"]["exact"] < 1


def test_evaluations_change_no_step_and_see_the_same_sequences(run, texts, tmp_path):
    """Every `eval_steps` and at the end; the memory is on again afterwards."""
    options = {"data": [texts, COPY], "sequence_length": [4 * N], "max_steps": 4, "state_passing": 0.5}
    without = run(output=tmp_path / "without", **options)
    options |= {"eval_data": [COPY, texts], "eval_length": [2 * N, 4 * N], "eval_sequences": 2}
    often = run(output=tmp_path / "often", eval_steps=2, **options)
    assert column(often.log, "loss") == column(without.log, "loss")
    assert_equal(weights(often.model), weights(without.model))
    assert ["evaluation" in record for record in often.log] == [False, True, False, True]
    assert often.report["evaluation"] == often.log[-1]["evaluation"]
    assert often.report["evaluation"].keys() == {"copy", str(texts)}
    assert often.report["evaluation"]["copy"].keys() == {str(2 * N), str(4 * N)}
    still = run(output=tmp_path / "still", eval_steps=1, learning_rate=0, gate_learning_rate=0, **options)
    assert len({json.dumps(record["evaluation"]) for record in still.log}) == 1
    off = run(output=tmp_path / "off", memory_update="none", **options)
    assert off.report["evaluation"]["copy"][str(2 * N)].keys() == {"off"}


def test_places_without_a_target_are_no_bucket(run, tmp_path):
    """Documents of one segment and a token: the token predicts nothing, and NaN would be no JSON."""
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": random_words(random.Random(i), N)}) + "\n" for i in range(9)))
    result = run(data=[path], eval_data=[path], eval_length=[2 * N])
    assert result.report["evaluation"][str(path)][str(2 * N)]["on"]["by_segments"].keys() == {"0"}


# Killed and resumed


class Killed(BaseException):
    """As far as a test can be killed and go on."""


def die() -> None:
    raise Killed


def kill_minus_9() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while(moment: str, patch: pytest.MonkeyPatch, die: Callable[[], None]) -> None:
    """Die in the middle of the sixth step, of writing or removing a checkpoint, or of writing the model."""
    if moment == "training":
        original, calls = Training.forward_backward, itertools.count(1)

        def forward_backward(self, *args):
            loss = original(self, *args)
            if next(calls) == 12:  # of two in each step
                die()
            return loss

        patch.setattr(Training, "forward_backward", forward_backward)
    elif moment == "saving":
        original = Accelerator.save_state

        def save_state(self, folder):
            original(self, folder)
            if Path(folder).name == "step-4.unfinished":
                (Path(folder) / "scheduler.bin").unlink(missing_ok=True)
                optimizer = Path(folder) / "optimizer.bin"
                optimizer.write_bytes(optimizer.read_bytes()[:1000])
                die()

        patch.setattr(Accelerator, "save_state", save_state)
    elif moment == "removing":
        original = shutil.rmtree

        def rmtree(path, *args, **kwargs):
            if (Path(path) / "training.json").exists():
                (Path(path) / "training.json").unlink()
                die()
            return original(path, *args, **kwargs)

        patch.setattr(train.shutil, "rmtree", rmtree)
    elif moment == "exporting":
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", lambda *args, **kwargs: die())


MOMENTS = ["training", "saving", "removing", "exporting"]
# The latest checkpoint that is complete when a run dies.
COMPLETE = {"training": 4, "saving": 2, "removing": 6, "exporting": 8}


def be_killed(moment: str, argv: list[str]) -> None:
    """What a process does that dies."""
    die_while(moment, pytest.MonkeyPatch(), kill_minus_9)
    train.main(argv)


@pytest.fixture(scope="module")
def everything(folder: Path, texts: Path) -> dict:
    """Options of a run that has everything in it that has a state."""
    return {
        "model": folder,
        "data": [texts, COPY | {"weight": 2}, {"source": str(texts), "name": "stream", "streaming": True}],
        "sequence_length": [2 * N, 4 * N],
        "advance_below": 100,
        "advance_window": 3,
        "batch_tokens": 4 * N,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "warmup_steps": 2,
        "state_passing": 0.7,
        "state_passing_tokens": 16 * N,
        "eval_data": [COPY],
        "eval_steps": 3,
        "eval_sequences": 2,
        "save_steps": 2,
        "mixed_precision": "no",
        "report_to": "none",
    }


@pytest.fixture(scope="module")
def uninterrupted(everything: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of that run."""
    forget_accelerator()
    output = tmp_path_factory.mktemp("uninterrupted")
    assert train.main(arguments(**everything, output=output)) == 0
    return output


def timeless(output: Path) -> list[dict]:
    """The log without what no two runs share."""
    records = [strict_json(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def assert_resumes(run, moment: str, options: dict, output: Path, uninterrupted: Path) -> None:
    """And ends as the run that was not killed, to the last bit; nothing unfinished is left."""
    assert train.latest_checkpoint(output).name == f"step-{COMPLETE[moment]}"
    assert not (output / "model").exists()
    result = run(**options | {"output": output, "resume": True})
    assert f"step-{COMPLETE[moment]}'" in result.said
    assert timeless(output) == timeless(uninterrupted)
    assert_equal(weights(output / "model"), weights(uninterrupted / "model"))
    assert sorted(files(output)) == sorted(files(uninterrupted))
    training = [
        json.loads((o / "checkpoints" / "step-8" / "training.json").read_text()) for o in (output, uninterrupted)
    ]
    assert all(training[0][key] == training[1][key] for key in training[0].keys() - {"options"})


def test_the_run_that_is_killed_has_everything_in_it(uninterrupted):
    """Else its equality would mean little: both lengths, all sources, a window that a checkpoint has half full."""
    log = timeless(uninterrupted)
    assert set(column(log, "sequence_length")) == {2 * N, 4 * N}
    assert len({name for record in log for name in record["losses"]}) == 3
    states = [json.loads(path.read_text()) for path in uninterrupted.rglob("training.json")]
    assert all(state["window"] or state["stage"] == 1 for state in states)
    memories = torch.load(uninterrupted / "checkpoints" / "step-6" / "memories-0.pt", weights_only=True)
    assert len(memories) == 3 and all(memory["kept"] for memory in memories.values())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_broken_off_goes_on_as_if_nothing_had_been(moment, run, everything, uninterrupted, tmp_path):
    """In this process, by an exception that nothing catches."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_while(moment, patch, die)
        run(**everything | {"output": tmp_path / "out"})
    assert_resumes(run, moment, everything, tmp_path / "out", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_been(moment, run, everything, uninterrupted, tmp_path):
    """kill -9, of a process of its own."""
    argv = arguments(**everything, output=tmp_path / "out")
    program = f"import test_train; test_train.be_killed({moment!r}, {argv!r})"
    command = [sys.executable, "-c", program]
    killed = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert_resumes(run, moment, everything, tmp_path / "out", uninterrupted)


def test_a_finished_run_that_is_resumed_writes_its_model_again(run, everything, uninterrupted, tmp_path):
    output = shutil.copytree(uninterrupted, tmp_path / "out")
    shutil.rmtree(output / "model")
    result = run(**everything | {"output": output, "resume": True})
    assert timeless(output) == timeless(uninterrupted)
    assert_equal(weights(output / "model"), weights(uninterrupted / "model"))
    assert result.report["evaluation"] == timeless(uninterrupted)[-1]["evaluation"]


@with_peft
def test_an_adapter_is_resumed(run, tmp_path):
    options = {"lora_rank": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 0.05}
    whole = run(output=tmp_path / "whole", **options)
    shutil.copytree(whole.output, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-4")
    resumed = run(output=tmp_path / "half", resume=True, **options)
    assert column(resumed.log, "loss") == column(whole.log, "loss")
    assert_equal(weights(resumed.model), weights(whole.model))


def test_only_the_last_checkpoints_are_kept(run):
    result = run(max_steps=5, save_steps=1, save_total_limit=3)
    assert sorted(path.name for path in (result.output / "checkpoints").iterdir()) == ["step-3", "step-4", "step-5"]


def test_to_resume_without_a_checkpoint_is_to_begin(run):
    result = run(resume=True, save_steps=1)
    assert "step 0" in result.said and column(result.log, "step") == [1, 2]


def test_what_changes_no_step_may_be_another_after_a_resume(run, settings, tmp_path):
    run(save_steps=1)
    moved = shutil.move(settings["output"], tmp_path / "moved")
    shutil.rmtree(Path(moved) / "model")
    result = run(output=moved, resume=True, save_steps=2, save_total_limit=1, eval_data=[COPY], eval_sequences=1)
    assert result.report["steps"] == 2 and "copy" in result.report["evaluation"]


# What training is for


@pytest.mark.slow
def test_a_model_learns_to_copy_across_segments_with_its_memory_alone(run, tmp_path):
    """From random weights, in 4 segments of 16 tokens: two tokens, which end before the segment of the question, are
    repeated in 9 of 10 samples that were never seen. Without the memory the same model fails: nothing else carries them.
    """
    tokenizer = word_tokenizer([f"word{index}" for index in range(29)])
    config = tiny_config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_key_value_heads=4,
        head_dim=16,
        initializer_range=0.1,
        segment_length=16,
    )
    config.save_pretrained(tmp_path / "config")
    tokenizer.save_pretrained(tmp_path / "config")
    task = COPY | {"outside_last_segment": 1.0}
    result = run(
        model=tmp_path / "config",
        from_scratch=True,
        data=[task],
        sequence_length=[32, 48, 64],
        advance_below=0.3,
        batch_tokens=1024,
        gate_init=0.0,
        learning_rate=3e-3,
        gate_learning_rate=0.02,
        warmup_steps=50,
        max_steps=700,
        activation_checkpointing=False,
        eval_data=[task],
        eval_sequences=100,
    )
    answers = result.report["evaluation"]["copy"]["64"]
    assert answers["on"]["exact"] >= 0.9 and answers["off"]["exact"] <= 0.1


# Bad input


@pytest.fixture
def refuses(settings: dict, capsys: pytest.CaptureFixture):
    """Check that train.py stops with status 2, naming what is wrong, and leaves the output as it was."""

    def refuses(*names: str, **options) -> None:
        forget_accelerator()
        options = settings | options
        output = Path(options["output"])
        before = files(output)
        capsys.readouterr()
        assert train.main(arguments(**options)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and all(name in error for name in names), error
        assert files(output) == before

    return refuses


def test_texts_that_cannot_be_trained_on_are_refused(refuses, tmp_path):
    def write(name: str, content: str) -> Path:
        (tmp_path / name).write_text(content)
        return tmp_path / name

    refuses("short.jsonl", "at least 2 tokens", data=[write("short.jsonl", '{"text": "the"}\n{"text": ""}\n')])
    refuses("empty.txt", "is empty", data=[write("empty.txt", "")])
    refuses("other.jsonl", "no column 'text'", "body", data=[write("other.jsonl", '{"body": "the sky"}\n')])
    refuses("missing.txt", "does not exist", data=[tmp_path / "missing.txt"])
    refuses("'copy' is there twice", "`name`", data=[COPY, COPY])
    refuses("is no JSON", "quotes", data=["{task: copy}"])


def test_a_source_to_evaluate_on_is_refused_before_the_first_step(refuses, tmp_path, monkeypatch):
    """Also if it is there and its samples do not fit, for a run may take a day."""
    monkeypatch.setattr(Training, "train_step", lambda self: pytest.fail("too late"))
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "the"}\n')
    refuses("short.jsonl", eval_data=[path])
    refuses("too short for Copy", eval_data=[COPY | {"num_tokens": 3 * N}], eval_length=[4 * N])


def test_lengths_that_are_no_whole_segments_are_refused_with_the_nearest(refuses):
    refuses("`sequence_length` 12", "segment length 5", "10 or 15", sequence_length=[12])
    refuses("`sequence_length` 3", "give 5", sequence_length=[3])
    refuses("`eval_length` 12", "10 or 15", eval_length=[12], eval_data=[COPY])
    refuses("`detach_segments` is 0", detach_segments=0)


def test_an_output_that_cannot_be_written_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("mine")
    refuses("file", "cannot be written", "another folder", output=tmp_path / "file")
    refuses("file", "cannot be written", output=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_that_has_a_model_or_checkpoints_is_left_alone(refuses, run, settings):
    """A trained model is worth hours; it is replaced only by the run that it is of."""
    run(save_steps=1)
    refuses("checkpoints", "--resume true")
    shutil.rmtree(settings["output"] / "checkpoints")
    refuses("'model'", "another")


def test_models_that_cannot_be_trained_are_refused(refuses, tokenizer, tmp_path):
    llama = tmp_path / "llama"
    base_llama(tiny_model(vocab_size=len(tokenizer))).save_pretrained(llama)
    tokenizer.save_pretrained(llama)
    refuses("'llama'", "scripts/convert.py", model=llama)
    refuses("llama'", "scripts/convert.py", model=llama, from_scratch=True)
    refuses("nothing", model=tmp_path / "nothing")
    refuses("nothing", model=tmp_path / "nothing", from_scratch=True)


@with_peft
def test_an_adapter_on_nothing_is_refused(refuses):
    refuses("`lora_target_modules`", "nothing_proj", lora_rank=2, lora_target_modules=["nothing_proj"])
    refuses("`adapter` 'nowhere'", lora_rank=0, adapter="nowhere")
    refuses("`write_gate`", "adapter", lora_rank=2, write_gate=True)
    refuses("`read_gate`", "--read-gate", lora_rank=2, read_gate=True)
    for own in ({"lora_rank": 2}, {"lora_alpha": 2}, {"gate_init": 0.0}):
        refuses(f"`{next(iter(own))}`", "`adapter`", adapter="nowhere", **own)


def test_an_unknown_tracker_is_refused_and_one_that_is_not_installed_is_announced(refuses, run, monkeypatch):
    refuses("`report_to`", "nobody", "tensorboard", report_to="nobody")
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.warns(UserWarning, match="log_with=wandb"):
        run(report_to="wandb")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_there_is(settings, capsys):
    """Step and source are named; the last checkpoint is whole, and loads."""
    options = settings | {"save_steps": 1, "learning_rate": 1e20, "max_steps": 9}
    assert train.main(arguments(**options)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"is (nan|inf) in step \d", error) and "texts.jsonl" in error and "`learning_rate`" in error
    last = train.latest_checkpoint(settings["output"])
    assert last.name in error
    assert not (settings["output"] / "model").exists()
    forget_accelerator()
    going_on = Training(parse_options(arguments(**options, resume=True)))
    going_on.resume()
    assert going_on.step == int(last.name[5:])


def test_the_source_that_breaks_the_loss_is_named(refuses, folder, texts, tmp_path):
    """Whichever of the accumulated batches it is in: here a word whose embedding is no number."""
    broken = tmp_path / "broken"
    model, tokenizer = InfiniLlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("?")] = math.nan
    model.save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    (tmp_path / "bad.txt").write_text("? " * 500)
    data = [texts, {"source": str(tmp_path / "bad.txt"), "name": "bad", "weight": 1}]
    for seed in (5, 6):  # in the last of the four, and in the first alone
        options = {"model": broken, "data": data, "output": tmp_path / f"out-{seed}", "seed": seed}
        refuses("loss is nan in step 1", "'bad'", "no checkpoint yet", gradient_accumulation_steps=4, **options)


@pytest.mark.parametrize("name", ["training.json", "model.safetensors", "optimizer.bin", "memories-0.pt"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_corrupt_checkpoint_is_refused(name, missing, run, refuses, settings):
    """By its name, with the way to go on from the one before."""
    run(save_steps=1)
    shutil.rmtree(settings["output"] / "model")
    file = settings["output"] / "checkpoints" / "step-2" / name
    content = file.read_bytes()
    file.unlink() if missing else file.write_bytes(content[: len(content) // 2])
    refuses("step-2", "cannot be read", "remove it", resume=True, save_steps=1)
    shutil.rmtree(file.parent)
    assert column(run(resume=True, save_steps=1).log, "step") == [1, 2]


def test_a_run_with_other_options_is_no_continuation(run, refuses, settings):
    """Both values are named; so is another number of processes."""
    run(save_steps=1)
    refuses("`learning_rate` is 0.5", "0.0001", resume=True, learning_rate=0.5)
    refuses("`sequence_length` is [15]", "[10]", resume=True, sequence_length=[3 * N])
    state = settings["output"] / "checkpoints" / "step-2" / "training.json"
    state.write_text(state.read_text().replace('"num_processes": 1', '"num_processes": 2'))
    refuses("1 process", "2", resume=True)
