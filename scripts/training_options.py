"""The options of `scripts/train.py`: what each means, and how a recipe and the command line give them."""

import argparse
import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import LoggerType
from transformers import HfArgumentParser

from infini_llama.scripts.generate import InputError, one_line

__all__ = ["FREE_ON_RESUME", "TrainingOptions", "parse_options", "read_recipe"]


def option(default: Any, help: str, **kwargs) -> Any:
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help, **kwargs})
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class TrainingOptions:
    model: str = option("", "Folder that scripts/convert.py made, or a Hub id. Required.")
    output: str = option("", "Folder for the trained model, checkpoints and logs. Required.")
    resume: bool = option(False, "Go on from the last checkpoint in OUTPUT, if there is one.")
    from_scratch: bool = option(False, "Take only config and tokenizer from MODEL, and begin with random weights.")

    data: list[str] = option([], "What to train on: paths, Hub ids or JSON objects; see above. Required.")
    sequence_length: list[int] = option(
        [], "Tokens per sequence, multiples of the segment length. Several are the stages of a curriculum. Required."
    )
    stage_steps: list[int] = option([], "Steps of each stage but the last.")
    advance_below: float | None = option(
        None, "Instead of --stage_steps: a stage ends when the mean loss of its last steps is below this."
    )
    advance_window: int = option(
        10, "How many last steps --advance_below looks at; only tasks count, if there are any."
    )
    batch_tokens: int = option(4096, "Tokens per device and forward pass: as many sequences as fit, at least one.")
    gradient_accumulation_steps: int = option(1, "Forward passes per device and step.")

    segment_length: int | None = option(None, "Change the model's N.")
    memory_update: str | None = option(
        None, "Change the model's write rule.", choices=["delta", "linear", "least_squares", "none"]
    )
    write_gate: bool = option(False, "Give the model gates that choose what is written, if it has none.")
    read_gate: bool = option(False, "Give the model gates that choose which tokens read, if it has none.")
    gate_init: float | None = option(None, "Set beta of all gates before the first step; 0 lets memory in half.")

    max_steps: int = option(1000, "Optimizer steps.")
    learning_rate: float = option(1e-4, "Highest learning rate.")
    gate_learning_rate: float = option(0.01, "Highest learning rate of the gates, which have a long way to go.")
    lr_scheduler_type: str = option("cosine", "A schedule of Transformers, by its name there.")
    warmup_steps: int = option(0, "Steps in which the learning rate rises to its highest.")
    weight_decay: float = option(0.0, "AdamW's, of weight matrices only.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    adam_beta2: float = option(0.95, "AdamW's.")

    mixed_precision: str | None = option(
        None,
        "Precision of matrix products; the launcher's, or bf16, but float32 (no) on a CPU that has no instructions for bf16.",
        choices=["no", "bf16", "fp16"],
    )
    activation_checkpointing: bool = option(
        True,
        "Keep only the inputs of all blocks but the last, and compute them twice: exact, in the memory of one block.",
    )
    block_segments: int | None = option(None, "Segments per block; by default what fits into 4,096 tokens.")
    torch_compile: bool = option(
        False, "Compile the decoder layers: a minute or two at first, and at each new length, then faster steps."
    )
    detach_segments: int | None = option(
        None, "Truncate: no gradient reaches further back than the last multiple of this many segments."
    )

    state_passing: float = option(
        0.0,
        "Share of sequences that start from a memory: of a task, of other text, of any length that it has had while it "
        "grew; of a document, of what comes before.",
    )
    state_passing_tokens: int = option(65536, "How long that text becomes at most, before another is begun.")
    state_passing_every: int = option(2, "It grows, without gradient, every so many steps,")
    state_passing_growth: int = option(1, "by so many sequences.")

    state_passing_scale: float = option(
        1.0,
        "Each row's memory is multiplied by 1 to this factor, as if its text had been read that many times; the factor rises "
        "from 1, by a quarter whenever the loss of the last steps is below --advance_below.",
    )

    lora_rank: int = option(0, "Train an adapter of this rank, and the gates, instead of all weights.")
    adapter: str | None = option(None, "Go on with this adapter of the model, instead of beginning one of lora_rank.")
    lora_alpha: int | None = option(None, "Scale of the adapter; by default twice the rank.")
    lora_target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "Where the adapter is."
    )

    eval_data: list[str] = option([], "What to evaluate on, as in --data: loss by position, or exact answers.")
    eval_length: list[int] = option([], "Tokens per evaluated sequence; by default the longest trained length.")
    eval_sequences: int = option(8, "Sequences per source and length.")
    eval_steps: int = option(0, "Evaluate every so many steps, and at the end; 0 evaluates at the end only.")

    logging_steps: int = option(10, "Send numbers and gate statistics to the tracker every so many steps.")
    report_to: str = option("tensorboard", "Tracker, by Accelerate's name for it, or none.")
    save_steps: int = option(100, "Save a checkpoint every so many steps; 0 saves none.")
    save_total_limit: int = option(2, "Keep this many last checkpoints.")
    export_dtype: str = option("float32", "Of what OUTPUT gets in the end.", choices=["float32", "bfloat16"])
    seed: int = option(0, "Of everything random.")

    @property
    def has_adapter(self) -> bool:
        return bool(self.lora_rank) or self.adapter is not None

    def check(self) -> None:
        """Raise InputError for what can be seen without model and data."""
        for name in ("model", "output", "data", "sequence_length"):
            if not getattr(self, name):
                raise InputError(f"`{name}` is missing: give it in the recipe, or as --{name}")
        at_least = {"max_steps": 1, "batch_tokens": 1, "gradient_accumulation_steps": 1, "advance_window": 1}
        at_least |= {"state_passing_every": 1, "state_passing_growth": 1}
        at_least |= {"logging_steps": 1, "save_total_limit": 1, "eval_sequences": 1}
        at_least |= dict.fromkeys(("save_steps", "eval_steps", "warmup_steps", "lora_rank"), 0)
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise InputError(f"`{name}` is {getattr(self, name)}: give at least {least}")
        if self.report_to not in ("none", *LoggerType.list()):
            trackers = ", ".join(("none", *LoggerType.list()))
            raise InputError(f"`report_to` is {self.report_to!r}: choose one of {trackers}")
        if not 0 <= self.state_passing <= 1:
            raise InputError(f"`state_passing` is {self.state_passing}: give a share between 0 and 1")
        if self.state_passing_scale < 1:
            raise InputError(f"`state_passing_scale` is {self.state_passing_scale}: give a factor of 1 or more")
        if self.state_passing_scale > 1 and self.advance_below is None:
            raise InputError("`state_passing_scale` rises with the loss: say below which, with `advance_below`")
        for name in ("write_gate", "read_gate"):
            if getattr(self, name) and (self.lora_rank or self.adapter is not None):
                raise InputError(
                    f"`{name}` changes the model that the adapter is for: leave it out, and convert with "
                    f"--{name.replace('_', '-')}"
                )
        if self.adapter is not None:
            for name, absent in (("lora_rank", 0), ("lora_alpha", None), ("gate_init", None)):
                if getattr(self, name) != absent:
                    raise InputError(f"`{name}` is given beside `adapter`, which has its own: leave one of them out")
        stages = len(self.sequence_length)
        if self.stage_steps and len(self.stage_steps) != stages - 1:
            raise InputError(
                f"`stage_steps` has {len(self.stage_steps)} entries for {stages} lengths in `sequence_length`: give one "
                "for each length but the last"
            )
        if self.stage_steps and self.advance_below is not None:
            raise InputError("`stage_steps` and `advance_below` are both given: choose one")
        if stages > 1 and not self.stage_steps and self.advance_below is None:
            raise InputError("`sequence_length` has stages: say when they end, with `stage_steps` or `advance_below`")

    def check_lengths(self, segment_length: int) -> None:
        """Raise InputError for lengths that are no whole number of segments."""
        for name in ("sequence_length", "eval_length"):
            for length in getattr(self, name):
                if length < 1 or length % segment_length:
                    below = length // segment_length * segment_length
                    near = " or ".join(str(x) for x in (below, below + segment_length) if x > 0)
                    raise InputError(
                        f"`{name}` {length} is no multiple of the segment length {segment_length}: give {near}"
                    )
        if self.detach_segments is not None and self.detach_segments < 1:
            raise InputError(f"`detach_segments` is {self.detach_segments}: give at least 1, or leave it out")


# Options that may be another when a run is resumed: they change no step (`torch_compile` its rounding).
FREE_ON_RESUME = ("output", "resume", "logging_steps", "report_to", "save_steps", "save_total_limit", "torch_compile")
FREE_ON_RESUME += ("eval_data", "eval_length", "eval_sequences", "eval_steps")


def parse_options(argv: list[str] | None = None, description: str | None = None) -> TrainingOptions:
    """Options from a recipe and the command line, which wins.

    Args:
        argv: the command line; None for that of the process.
        description: what `--help` says before it comes to the options.

    Raises:
        InputError: the recipe cannot be read, or has an unknown key.
    """
    parser = HfArgumentParser(TrainingOptions, description=description, formatter_class=_HelpFormatter)
    parser.add_argument("recipe", nargs="?", help="YAML file with options")
    recipe, values = parser.parse_known_args(argv)[0].recipe, None
    if recipe is not None:
        parser.exit_on_error = False
        try:
            values = parser.parse_args(read_recipe(recipe))
        except argparse.ArgumentError as error:
            raise InputError(f"recipe '{recipe}': {error}") from error
        parser.exit_on_error = True
    values = vars(parser.parse_args(argv, values))
    del values["recipe"]
    for name in ("data", "eval_data"):
        values[name] = [_entry(name, entry) for entry in values[name]]
    options = TrainingOptions(**values)
    options.check()
    return options


class _HelpFormatter(HfArgumentParser().formatter_class):
    """Keeps the line breaks of the description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text


def _entry(name: str, entry: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        try:
            return json.loads(entry)
        except json.JSONDecodeError as error:
            raise InputError(f"`{name}` entry {entry!r} is no JSON ({error}): mind the quotes") from error
    return entry


def read_recipe(path: str) -> list[str]:
    """A recipe as the command line that says the same, so that the parser checks and converts its values."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"recipe '{path}' cannot be read ({one_line(error)})") from error
    if not isinstance(recipe, dict):
        raise InputError(f"recipe '{path}' is no mapping of options to values")
    fields = {f.name: f for f in dataclasses.fields(TrainingOptions)}
    argv = []
    for key, value in recipe.items():
        if value is None:
            continue
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            raise InputError(
                f"recipe '{path}' has the unknown option '{key}'" + (f"; is it '{close[0]}'?" if close else "")
            )
        is_list = str(fields[key].type).startswith("list")
        if is_list != isinstance(value, list):
            raise InputError(f"recipe '{path}' has {key}: {value!r}; give a {'list' if is_list else 'single value'}")
        if value is False and "no" in fields[key].metadata.get("choices", ()):
            value = "no"  # which YAML takes for false
        if is_list:
            argv += [f"--{key}", *(json.dumps(v, default=str) if isinstance(v, dict) else str(v) for v in value)]
        else:
            argv.append(f"--{key}={value}")
    return argv
