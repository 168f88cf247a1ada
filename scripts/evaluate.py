"""Measure what a model retrieves from long texts, against what it can do without its memory.

    python scripts/evaluate.py ./trained --tasks passkey --lengths 4096 65536 1000000 --base ./base --output ./results
    python scripts/evaluate.py ./trained --tasks needle --haystack books/ --needles numbers uuids --output ./results
    python scripts/evaluate.py ./trained --tasks babilong --babi babi/en --haystack books/ --lengths 0 4096 --output ./results
    python scripts/evaluate.py ./trained --tasks perplexity gates memory --texts books/ --base ./base --output ./results
    python scripts/evaluate.py ./trained --tasks summarise --books booksum.jsonl --base ./base --output ./results

MODEL is a folder that `scripts/convert.py` or `scripts/train.py` made, or a Hub id of such a model; or any other causal
language model that Transformers loads, with its own cache, as far as that fits.

Tasks
    passkey     a number in sentences that repeat, with the paper's prompt and beside the paper's numbers.
    needle      numbers, words or uuids under keys, in RULER's words, in the text of --haystack (without it, in the
                sentences of passkey); `--num-needles 1 4` hides one, and one among three that are not asked for.
    babilong    the facts of bAbI stories in the text of --haystack, and the test set's questions about them (QA1 to QA3);
                length 0 is the story alone. --shots examples of the training set come before the text, as
                "facts Where is Mary? Mary is in the garden." The first word of the answer counts. Of a text of QA1,
                `--num-questions 3` asks for the places of three, each as if it was the only one; it is read once.
    perplexity  the loss of whole texts, each file of --texts by itself, by the segments that were completed before.
    summarise   a book, read whole, and then the instruction to summarise it: one turn of the user if there is a chat
                template, as in `scripts/generate.py`. ROUGE-1, 2 and L against a summary, beside the paper's on BookSum.
                Each line of --books is a JSON object with a `text` and its `summary`. Where a segment would end between
                instruction and summary, the end of the book is left out, so that the controls know what is asked.
    gates       share of the memory in the output of each head, sigmoid(beta).
    memory      how full the memory becomes while the files of --texts are read, as one text: effective rank of M (exp of
                the entropy of its singular values), norm of M and z; means over heads.

Each is measured in several ways, in the same run:
    memory      the model as it is ("model" if it is another one).
    off         the same model with its memory off: each segment sees itself alone.
    window      the model of --base on the last N tokens, the answer included; in perplexity, on each segment by itself.

Decoding is greedy, and the whole answer has to be right. `--lengths` count the tokens of a sample, its answer (the
longest of the cell) included, as in training; a depth of 0 is the start of the haystack, 1 its end, and needles stand
between sentences. *Compressions* are the segments that were completed between a needle's (or the oldest supporting
fact's) end and the question; with 0 of them local attention is enough.

OUTPUT gets `results.json` with every answer, `results.md` with the tables, and a PNG per task, if matplotlib is there.
Results are written after each cell, and cells that are there are not measured again: a run that was killed goes on, and
more tasks, lengths and depths can be added to it. Results of another model or other settings are never mixed in.

The last line on stdout is one JSON document; everything else goes to stderr. The exit status is 0, or 2 for bad input.
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from infini_llama.cache_infini import projection_fingerprint
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.scripts.evaluation_report import plot, tables
from infini_llama.scripts.evaluation_tasks import (
    Book,
    Haystack,
    Question,
    Reader,
    Trunk,
    ask_local,
    babi_intro,
    gates,
    go_on,
    hide,
    hide_stories,
    losses_by_segments,
    memory_growth,
    read_books,
    rouge,
    summary_prompt,
    take_tokens,
    window_prompt,
)
from infini_llama.scripts.generate import (
    DTYPES,
    InputError,
    adapter_config,
    choose_chat,
    compile_layers,
    default_device,
    find_files,
    load_model,
    one_line,
    open_text,
    positive,
    read_files,
    say,
)
from infini_llama.scripts.retrieval_tasks import (
    VALUES,
    Needle,
    Passkey,
    RetrievalTask,
    opening_ids,
    plain_ids,
    read_babi,
)

__all__ = ["Evaluation", "Results", "main"]

TASKS = ("passkey", "needle", "babilong", "perplexity", "summarise", "gates", "memory")
FORMAT = "infini_llama.evaluation.v1"
# Of a large haystack the first tokens are used, and repeated where more are needed.
HAYSTACK_TOKENS = 1 << 20
# N for a model that has no segments.
WINDOW = 2048


class Results:
    """Numbers by cell, in a file that is whole at any moment.

    Args:
        path: of the file. What it has already is kept, if it was measured with the same settings.
        settings: by group, everything that results depend on; those in the file may have more groups.
        run: how, where and with what this run measures.

    Raises:
        InputError: the file has other results, or cannot be read or written.
    """

    def __init__(self, path: Path, settings: dict[str, dict[str, Any]], run: dict[str, Any]):
        self.path = path
        self.content: dict[str, Any] = {"format": FORMAT, "settings": {}, "runs": [], "cells": {}}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"--output '{path.parent}' cannot be used ({one_line(error)}): name another") from error
        for group, values in json.loads(json.dumps(settings)).items():
            there = self.content["settings"].setdefault(group, values)
            for name, value in values.items():
                if there.get(name) != value:
                    raise InputError(
                        f"{group} {name} is {value!r}, but the results in '{path}' are of {there.get(name)!r}: set it "
                        "back, or name another --output"
                    )
        self.content["runs"].append(run)

    @property
    def cells(self) -> dict[str, Any]:
        return self.content["cells"]

    def measure(self, key: str, function: Callable[..., dict[str, Any]], *args: Any) -> None:
        """Fill a cell with what the function returns, if it is empty."""
        if key in self.cells:
            return
        started = time.perf_counter()
        cell = function(*args)
        self.cells[key] = cell | {"seconds": round(time.perf_counter() - started, 2)}
        self.save()
        say(f"{key}: {one_line_summary(cell)}")

    def save(self) -> None:
        write(self.path, json.dumps(self.content, indent=1))


def write(path: Path, text: str) -> None:
    """The file is there whole, or as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error.strerror}): name another --output") from error
    finally:
        temporary.unlink(missing_ok=True)


def one_line_summary(cell: dict[str, Any]) -> str:
    if "accuracy" in cell:
        return ", ".join(f"{system} {share:.0%}" for system, share in cell["accuracy"].items())
    if "rouge" in cell:
        percents = {s: "/".join(f"{100 * x:.1f}" for x in scores.values()) for s, scores in cell["rouge"].items()}
        return ", ".join(f"{system} {scores}" for system, scores in percents.items())
    return "done"


# Models


def load(
    name: str, args: argparse.Namespace, adapter: str | None = None, **settings: Any
) -> tuple[Reader, PreTrainedTokenizerBase]:
    """Load any causal language model and its tokenizer; settings are for models of ours."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name)
        if fields.get("model_type") == InfiniLlamaConfig.model_type:
            model, tokenizer = load_model(name, dtype=args.dtype, device=args.device, **settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, device_map=args.device)
            tokenizer = AutoTokenizer.from_pretrained(name)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model '{name}' cannot be loaded ({one_line(error)})") from error
    if adapter is not None:
        model = with_adapter(model, adapter)
    return Reader(model.eval()), tokenizer


def with_adapter(model: torch.nn.Module, adapter: str) -> torch.nn.Module:
    """The model with a PEFT adapter merged into its weights."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("--adapter needs PEFT, which is not installed: pip install 'infini-llama[train]'")
    from peft import PeftModel

    try:
        config = adapter_config(model, adapter)
        return PeftModel.from_pretrained(model, adapter, config=config).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"--adapter '{adapter}' cannot be loaded ({one_line(error)})") from error


def weights_of(reader: Reader) -> int:
    return int(projection_fingerprint(reader.model).item())


# The evaluation


class Evaluation:
    """What the command line asks for: `Evaluation(args).run()`.

    Args:
        args: of `build_parser`.
        command: as it was given.
    """

    def __init__(self, args: argparse.Namespace, command: list[str]):
        self.args = args
        check(args)
        for text in ([args.haystack] if args.haystack else []) + args.texts:
            find_files(text)
            open_text(text)  # bad bytes show now
        if "summarise" in args.tasks:
            for _ in read_books(args.books):  # and bad lines
                pass
        try:
            stories = {t: (read_babi(args.babi, t), read_babi(args.babi, t, "train")) for t in self.babi_tasks()}
        except ValueError as error:
            raise InputError(f"--babi: {error}") from error
        settings = {n: getattr(args, n) for n in ("segment_length", "memory_update", "block_segments")}
        self.reader, self.tokenizer = load(args.model, args, args.adapter, **settings)
        self.is_ours = self.reader.has_memory
        if not self.is_ours:
            self.require_ours()
        self.segment_length = self.reader.config.segment_length if self.is_ours else args.segment_length or WINDOW
        if "memory" in args.tasks and self.reader.config.memory_update == "none":
            raise InputError("the task memory needs a memory, and memory_update is none: choose a --memory-update")
        self.base = None
        if args.base is not None:
            self.base, tokenizer = load(args.base, args, segment_length=self.segment_length, memory_update="none")
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise InputError(f"--base '{args.base}' has another tokenizer than '{args.model}': name its own base")
        if args.compile:
            for reader in filter(None, (self.reader, self.base)):
                if hasattr(reader.model.base_model, "layers"):
                    compile_layers(reader.model)
                else:
                    say(f"warning: --compile has no effect on a {type(reader.model).__name__}")
        self.stories = stories
        self.chat = "summarise" in args.tasks and choose_chat(self.tokenizer, args.chat)
        self.results = Results(Path(args.output) / "results.json", self.settings(), self.description(command))

    def require_ours(self) -> None:
        for task in ("gates", "memory"):
            if task in self.args.tasks:
                raise InputError(
                    f"model '{self.args.model}' is no InfiniLlama, and has none of what the task {task} looks at: leave "
                    "it out of --tasks, or convert the model first, with scripts/convert.py"
                )
        for option in ("memory_update", "block_segments"):
            if getattr(self.args, option) is not None:
                say(f"warning: --{option.replace('_', '-')} has no effect on a model that is no InfiniLlama")

    def babi_tasks(self) -> list[int]:
        return self.args.babi_tasks if "babilong" in self.args.tasks else []

    def settings(self) -> dict[str, dict[str, Any]]:
        """Everything that results depend on: of the models, and of each task. Cells are named by the rest."""
        args = self.args
        settings = {
            "model": {
                "model": args.model,
                "adapter": args.adapter,
                "weights": weights_of(self.reader),
                "dtype": str(self.reader.model.dtype).removeprefix("torch."),
                "segment_length": self.segment_length,
                "memory_update": self.reader.config.memory_update if self.is_ours else None,
                "base": args.base,
                "base_weights": None if self.base is None else weights_of(self.base),
                "seed": args.seed,
            },
            "passkey": {"samples": args.samples},
            "needle": {"samples": args.samples, "haystack": args.haystack, "stretches": args.stretches},
            "babilong": {
                "samples": args.samples,
                "haystack": args.haystack,
                "stretches": args.stretches,
                "babi": args.babi,
                "shots": args.shots,
                "num_questions": args.num_questions,
            },
            "perplexity": {"max_tokens": args.max_tokens},
            "summarise": {
                "books": args.books,
                "max_tokens": args.max_tokens,
                "summary_tokens": args.summary_tokens,
                "chat": self.chat,
            },
            "memory": {"texts": args.texts, "max_tokens": args.max_tokens},
        }
        return {group: values for group, values in settings.items() if group == "model" or group in args.tasks}

    def description(self, command: list[str]) -> dict[str, Any]:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        return {
            "command": command,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions | {"transformers": transformers.__version__},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "device": str(self.reader.model.device),
            "batch_size": self.args.batch_size,
            "seed": self.args.seed,
        }

    def run(self) -> dict[str, Any]:
        """Measure what is missing, write tables and plots, and return the report."""
        for task in self.args.tasks:
            getattr(self, task)()
        self.results.save()
        content, output = self.results.content, self.results.path.parent
        markdown = tables(content)
        write(output / "results.md", markdown)
        say(f"\n{markdown}")
        plotted = plot(content, output)
        if not plotted:
            say(
                "warning: matplotlib is not installed, so there are no plots: pip install matplotlib, and run this again"
            )
        cells = {
            key: {name: value for name, value in cell.items() if name not in ("samples", "summaries")}
            for key, cell in self.results.cells.items()
        }
        run = {key: value for key, value in content.items() if key == "settings"} | {"run": content["runs"][-1]}
        return run | {"cells": cells, "output": str(output), "plots": plotted}

    # Retrieval

    def ask(self, groups: list[tuple[Trunk, list[Question]]], name: str) -> dict[str, Any]:
        """Answers of the model and of its controls to questions, each about the haystack that its trunk reads."""
        size, answers = self.args.batch_size, {}
        questions = [question for _, group in groups for question in group]
        if not self.is_ours or self.reader.config.memory_update != "none":
            answers["memory" if self.is_ours else "model"] = [
                given for trunk, group in groups for given in trunk.ask(group, size, name)
            ]
        if self.is_ours:
            with self.reader.memory_off():
                answers["off"] = ask_local(self.reader, questions, size, self.segment_length)
        if self.base is not None:
            opening = opening_ids(self.tokenizer)
            answers["window"] = ask_local(self.base, questions, size, self.segment_length, opening)
        samples = []
        for i, question in enumerate(questions):
            right = {system: question.is_right(given[i], self.tokenizer) for system, given in answers.items()}
            samples.append(
                {
                    "tokens": len(question.prompt),
                    "evidence_end": question.evidence_end,
                    "compressions": question.compressions(self.segment_length),
                    "answer": self.tokenizer.decode(question.answer),
                    "answers": {system: self.tokenizer.decode(given[i]) for system, given in answers.items()},
                    "right": right,
                }
            )
        accuracy = {system: sum(s["right"][system] for s in samples) / len(samples) for system in answers}
        return {"accuracy": accuracy, "samples": samples}

    def retrieval(self, name: str, task: RetrievalTask) -> None:
        """All cells of a task, those of a length along the same haystacks."""
        for length in self.args.lengths:
            if length == 0:
                continue
            seed = f"{self.args.seed}/{name}/{length}"
            trunks = [
                Trunk(self.reader, Haystack.of(task, rng))
                for rng in self.haystack_rngs(seed, isinstance(task, Needle))
            ]
            for depth in sorted(self.args.depths):
                drawn = [random.Random(f"{seed}/{depth}/{i}") for i in range(self.args.samples)]
                groups = [
                    (trunk, hide(task, trunk.haystack, drawn[first :: len(trunks)], length, depth))
                    for first, trunk in enumerate(trunks)
                ]
                key = f"{name}/{length}/{depth:g}"
                self.results.measure(key, self.ask, groups, key)

    def haystack_rngs(self, seed: str, prose: bool) -> list[random.Random]:
        """What draws where each haystack begins. Sentences that repeat need one only."""
        count = min(self.args.stretches, self.args.samples) if prose and self.args.haystack else 1
        return [random.Random(f"{seed}/stretch {i}" if i else seed) for i in range(count)]

    def passkey(self) -> None:
        self.retrieval("passkey", Passkey(self.tokenizer))

    def needle(self) -> None:
        for values, count in itertools.product(self.args.needles, self.args.num_needles):
            task = Needle(self.tokenizer, haystack=self.book(), values=values, num_needles=count)
            self.retrieval(f"needle/{values}-{count}", task)

    def babilong(self) -> None:
        for task, (stories, train) in self.stories.items():
            rng = random.Random(f"{self.args.seed}/qa{task}")
            if self.args.samples > len(stories):
                raise InputError(
                    f"--samples is {self.args.samples}, but there are {len(stories)} questions in QA{task}"
                )
            # The same ones at every length.
            intro, chosen = (
                babi_intro(self.tokenizer, rng.sample(train, self.args.shots)),
                rng.sample(stories, self.args.samples),
            )
            background = Needle(self.tokenizer, haystack=self.book())
            for length in self.args.lengths:
                seed, key = f"{self.args.seed}/qa{task}/{length}", f"babilong/qa{task}/{length}"
                text = torch.tensor(background.haystack, dtype=torch.int32)
                drawn = [random.Random(f"{seed}/{i}") for i in range(len(chosen))]
                rngs, groups = self.haystack_rngs(seed, True), []
                for first, rng in enumerate(rngs):
                    haystack = Haystack(intro, text, background.cuts, background.first_token(rng))
                    told, places = chosen[first :: len(rngs)], drawn[first :: len(rngs)]
                    asked = hide_stories(self.tokenizer, haystack, told, places, length, self.args.num_questions)
                    groups.append((Trunk(self.reader, haystack), asked))
                self.results.measure(key, self.ask, groups, key)

    def book(self) -> list[int] | None:
        """The first tokens of --haystack."""
        if self.args.haystack is None:
            return None
        ids: list[int] = []
        for piece in open_text(self.args.haystack):
            ids += plain_ids(self.tokenizer, piece)
            if len(ids) >= HAYSTACK_TOKENS:
                break
        return ids[:HAYSTACK_TOKENS]

    # Texts

    def chunks(self, pieces: Iterator[str], width: int) -> Iterator[torch.Tensor]:
        return take_tokens(self.tokenizer, pieces, width, self.args.max_tokens)

    def perplexity(self) -> None:
        systems = {}
        if not self.is_ours or self.reader.config.memory_update != "none":
            systems["memory" if self.is_ours else "model"] = self.reader
        if self.is_ours:
            systems["off"] = self.reader
        if self.base is not None:
            systems["window"] = self.base
        width = max(4096 // self.segment_length, 1) * self.segment_length
        for file in [file for text in self.args.texts for file in find_files(text)]:
            self.results.measure(f"perplexity/{file}", self.read_whole, systems, file, width)

    def read_whole(self, systems: dict[str, Reader], file: Path, width: int) -> dict[str, Any]:
        chunks = self.chunks(read_files([file]), width)
        return {"losses": losses_by_segments(systems, chunks, self.segment_length, file.name)}

    def summarise(self) -> None:
        for number, book in enumerate(read_books(self.args.books), start=1):
            self.results.measure(f"summarise/{number}", self.summaries, book, f"summarise/{number}")

    def summaries(self, book: Book, name: str) -> dict[str, Any]:
        """What the model and its controls say of a book, and how much that has in common with its summary."""
        size, ends, said = self.args.summary_tokens, self.ends(self.reader), {}
        options = {"chat": self.chat, "limit": self.args.max_tokens}
        prompt = summary_prompt(self.tokenizer, book.text, self.segment_length, size, **options)
        room = self.segment_length - (len(prompt) - prompt.question)
        if size > room:
            say(
                f"warning: --summary-tokens is {size}, but a segment has room for {max(room, 0)} after the instruction, "
                "which those without a memory forget then: give fewer, or a longer --segment-length"
            )
        if not self.is_ours or self.reader.config.memory_update != "none":
            said["memory" if self.is_ours else "model"] = go_on(self.reader, prompt, size, ends, name)
        if self.is_ours:
            # The segment that the prompt ends in: all that local attention ever sees.
            start = (len(prompt) - 1) // self.segment_length * self.segment_length
            with self.reader.memory_off():
                said["off"] = go_on(self.reader, prompt, size, ends, name, start)
        if self.base is not None:
            window = window_prompt(prompt, self.segment_length - size)
            said["window"] = go_on(self.base, window, size, self.ends(self.base), name)
        texts = {system: self.tokenizer.decode(ids, skip_special_tokens=True).strip() for system, ids in said.items()}
        return {
            "tokens": len(prompt),
            "summary_tokens": {system: len(ids) for system, ids in said.items()},
            "rouge": {system: rouge(text, book.summary) for system, text in texts.items()},
            "summaries": {"reference": book.summary, **texts},
        }

    def ends(self, reader: Reader) -> set[int]:
        """Tokens that end what a model says."""
        ends = reader.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def gates(self) -> None:
        self.results.measure("gates", lambda: {"gates": gates(self.reader.model)})

    def memory(self) -> None:
        pieces = itertools.chain.from_iterable(open_text(text) for text in self.args.texts)
        chunks = self.chunks(pieces, self.segment_length)
        self.results.measure("memory", lambda: {"growth": memory_growth(self.reader, chunks)})


def commit() -> str | None:
    """The commit of this file, if it lies in a git checkout; marked if there are changes."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# The command


def check(args: argparse.Namespace) -> None:
    """Raise InputError for what can be seen without a model."""
    needs = {
        "babilong": ("babi", "the folder of the bAbI stories"),
        "perplexity": ("texts", "texts to read"),
        "summarise": ("books", "a JSONL file of texts and their summaries"),
        "memory": ("texts", "texts to read"),
    }
    for task, (option, what) in needs.items():
        if task in args.tasks and not getattr(args, option):
            raise InputError(f"the task {task} needs --{option}: name {what}")
    if "babilong" in args.tasks and any(args.lengths) and args.haystack is None:
        raise InputError("the task babilong needs --haystack for lengths above 0: name texts to hide its facts in")
    if "summarise" in args.tasks and importlib.util.find_spec("rouge_score") is None:
        raise InputError(
            "the task summarise needs rouge-score, which is not installed: pip install 'infini-llama[evaluate]'"
        )
    if args.shots < 0:
        raise InputError(f"--shots is {args.shots}: give at least 0")
    if args.num_questions > 1 and args.babi_tasks != [1]:
        raise InputError(
            f"--num-questions is {args.num_questions}, but only QA1 has more than one to a text: choose --babi-tasks 1"
        )


def length(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{number} is not from 0 to 1")
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id, of an InfiniLlama or another causal language model")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, required=True, help="what to measure")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="for results; those that are there are kept")
    parser.add_argument("--base", metavar="MODEL", help="the model that MODEL was converted from, as a control")
    parser.add_argument("--adapter", metavar="PATH", help="PEFT adapter to merge into MODEL")
    parser.add_argument(
        "--lengths", type=length, nargs="+", default=[4096, 16384, 65536], help="tokens of a sample (4096 16384 65536)"
    )
    parser.add_argument(
        "--depths", type=share, nargs="+", default=[0.0, 0.5, 1.0], help="passkey, needle: places (0 0.5 1)"
    )
    parser.add_argument("--samples", type=positive, default=20, help="texts of each cell (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=20, help="samples at a time (default: %(default)s)")
    parser.add_argument("--haystack", metavar="PATH", help="needle, babilong: a text file, or a folder of them")
    parser.add_argument(
        "--stretches",
        type=positive,
        default=5,
        help="needle, babilong: of --haystack, among which the samples are divided; each is read (default: %(default)s)",
    )
    parser.add_argument("--needles", nargs="+", choices=VALUES, default=["numbers"], help="needle: kinds (numbers)")
    parser.add_argument("--num-needles", type=positive, nargs="+", default=[1], help="needle: hidden in a text (1)")
    parser.add_argument("--babi", metavar="FOLDER", help="babilong: where qa1_*_test.txt and the like are")
    parser.add_argument("--babi-tasks", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="QA1 to QA3")
    parser.add_argument(
        "--shots", type=int, default=2, help="babilong: examples before the text (default: %(default)s)"
    )
    parser.add_argument(
        "--num-questions",
        type=positive,
        default=1,
        help="babilong: of a text, at most; QA1 only. It is read once for all of them (default: %(default)s)",
    )
    parser.add_argument("--texts", metavar="PATH", nargs="+", default=[], help="perplexity, memory: files or folders")
    parser.add_argument(
        "--max-tokens", type=positive, help="perplexity, summarise: of each text; memory: of all of them"
    )
    parser.add_argument("--books", metavar="FILE", help="summarise: JSONL, with text and summary on each line")
    parser.add_argument(
        "--summary-tokens", type=positive, default=1024, help="summarise: at most (default: %(default)s, as the paper)"
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="summarise: put book and instruction into the chat template (default: if the tokenizer has one)",
    )
    parser.add_argument(
        "--segment-length", type=positive, help=f"instead of the model's; N of other models ({WINDOW})"
    )
    parser.add_argument(
        "--memory-update", choices=("delta", "linear", "least_squares", "none"), help="instead of the model's own"
    )
    parser.add_argument("--block-segments", type=positive, help="segments at a time: time and memory, not results")
    parser.add_argument("--compile", action="store_true", help="decoder layers by torch.compile: for long texts")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as stored (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="a torch device (default here: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    try:
        report = Evaluation(args, [Path(__file__).name, *argv]).run()
    except InputError as error:
        say(f"error: {error}")
        return 2
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
