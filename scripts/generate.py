"""Let an InfiniLlama read a text of any length, and answer prompts about it.

    python scripts/generate.py ./infini --text book.txt --prompt "Who tells the story?"
    python scripts/generate.py ./infini --text ./notes --prompt "What is decided?" --prompt "What is open?"
    cat *.log | python scripts/generate.py ./infini --text - --save-memory log.safetensors
    python scripts/generate.py ./infini --load-memory log.safetensors --prompt "What failed?" --json

MODEL is a folder that `scripts/convert.py` made, or a Hub id of such a model. The code that runs is this project's;
the copy that comes with the model is not executed.

The text goes through the model once, in blocks, into a memory whose size does not depend on the length of the text.
Every prompt is answered from a copy of that memory, so prompts know nothing of each other. A saved memory answers
later prompts without the text; with `--text` as well, reading goes on where it had stopped.

With a chat template, which is used if the tokenizer has one, text and prompt are one turn of the user: what the
template puts before the user's words is read first, then the text, then an empty line, the prompt, and what the
template puts after it. That is how instruct models know it; text before the user's turn is ignored by small ones. With
`--no-chat` the prompt is simply what follows the text. Ask a saved memory in the way in which it was read.

The text is tokenised in pieces, so that a file of any size needs little memory. They end after a newline between two
characters that are no white space, where the usual tokenizers (byte-level BPE) always start a new token: the tokens
are those of the whole text. SentencePiece tokenizers may see one space more per piece. Only a text without such a
newline for a million characters is cut elsewhere, at white space if there is any.

Answers go to stdout, everything else to stderr; with `--json` the last line on stdout is one JSON document. The exit
status is 0, or 2 for bad input.
"""

import argparse
import codecs
import copy
import io
import itertools
import json
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from torch._functorch import config as functorch_config
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from infini_llama.cache_infini import InfiniCache
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import CACHE, InfiniLlamaForCausalLM
from infini_llama.scripts import retrieval_tasks

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "Answer",
    "InputError",
    "Reading",
    "adapter_config",
    "answer",
    "choose_chat",
    "compile_layers",
    "default_device",
    "load_memory",
    "load_model",
    "main",
    "measure",
    "open_text",
    "peak_memory",
    "question_ids",
    "read_text",
    "save_memory",
    "stream_answer",
    "summary",
    "text_size",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
SUFFIXES = (".txt", ".md")
BLOCK_BYTES = 1 << 16
# A piece grows to this many characters before it is cut at something worse than a newline.
LONGEST_PIECE = 1 << 20
# Where a piece may end, the best place first; greedy, so that each matches up to its last one.
CUTS = [re.compile(pattern, re.DOTALL) for pattern in (r".*\S\n(?=\S)", r".*\n(?=\S)", r".*\S(?=\s)")]
# Stands for the text while a chat template is filled in.
TEXT_MARK = "<<<TEXT>>>"


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, why, and the remedy."""


class Reading(NamedTuple):
    """What `read_text` did."""

    tokens: int
    seconds: float


class Answer(NamedTuple):
    """What `answer` gave."""

    text: str
    tokens: int
    seconds: float


def say(message: str) -> None:
    print(message, file=sys.stderr)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# The text


def find_files(where: str) -> list[Path]:
    """Return the files of a text: the file itself, or the *.txt and *.md files of a folder, ordered by name."""
    path = Path(where)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"text '{where}' is a folder without .txt or .md files: name a file, or another folder")
        return files
    if not path.exists():
        raise InputError(f"text '{where}' does not exist: name a file, a folder, or - for stdin")
    return [path]


def open_text(where: str) -> Iterator[str]:
    """Yield a text in pieces that can be tokenised one by one.

    Files are decoded once in advance: a bad byte at the end of a book is reported now, not after an hour of reading.

    Args:
        where: a file, a folder (its files are joined by newlines), or `-` for stdin.

    Raises:
        InputError: there is no text, or it is not UTF-8.
    """
    files = [] if where == "-" else find_files(where)
    if all(file.is_file() for file in files):  # a pipe can be read only once
        for _ in read_files(files):
            pass
    pieces = cut_at_newlines(read_files(files) if files else decode(sys.stdin.buffer, "stdin"))
    first = next((piece for piece in pieces if piece.strip()), None)
    if first is None:
        raise InputError(f"text '{where}' is empty: give one with words in it")
    return itertools.chain([first], pieces)


def text_size(where: str) -> int | None:
    """Return the bytes of a text, if they are known before it is read."""
    return None if where == "-" else sum(file.stat().st_size for file in find_files(where)) or None


def read_files(files: list[Path]) -> Iterator[str]:
    for index, file in enumerate(files):
        if index > 0:
            yield "\n"
        try:
            with file.open("rb") as stream:
                yield from decode(stream, f"'{file}'")
        except OSError as error:
            raise InputError(f"text '{file}' cannot be read ({error.strerror}): check the file") from error


def decode(stream: BinaryIO, name: str) -> Iterator[str]:
    """Yield the text of a UTF-8 stream, a block at a time, with `\\n` as the only line ending."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position, at_end = 0, False
    while not at_end:
        block = stream.read(BLOCK_BYTES)
        at_end = not block
        held_back = len(utf8.getstate()[0])
        try:
            text = utf8.decode(block, final=at_end)
        except UnicodeDecodeError as error:
            byte = position - held_back + error.start
            problem = f"byte {byte} of text {name} is not UTF-8 ({error.reason})"
            raise InputError(f"{problem}: convert it, with iconv for example") from error
        if position == 0:
            text = text.removeprefix("\ufeff")
        position += len(block)
        yield newlines.decode(text, final=at_end)


def cut_at_newlines(parts: Iterable[str]) -> Iterator[str]:
    """Yield the same text in other pieces, which end where a tokenizer starts anew (see the top of this file)."""
    held_back = ""
    for part in parts:
        held_back += part
        # The worse cuts are for texts that have no better one for very long.
        usable = CUTS if len(held_back) > LONGEST_PIECE else CUTS[:1]
        match = next((match for cut in usable if (match := cut.match(held_back))), None)
        end = match.end() if match else len(held_back) if len(held_back) > LONGEST_PIECE else 0
        if end > 0:
            yield held_back[:end]
            held_back = held_back[end:]
    if held_back:
        yield held_back


# Model and tokens


def load_model(
    name: str, *, dtype: str = "auto", device: str = "cpu", **settings: int | str | None
) -> tuple[InfiniLlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load model and tokenizer of a folder or Hub id.

    Args:
        name: a folder that `scripts/convert.py` made, or a Hub id.
        dtype: `"auto"` takes the one that the weights are stored in.
        device: a torch device, or `"auto"` to spread a large model over all there are.
        settings: fields of the config to change, as `segment_length`; None leaves a field as it is.

    Raises:
        InputError: it is no InfiniLlama, or it cannot be loaded like this.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise InputError(f"model '{name}' cannot be loaded ({one_line(error)})") from error
    if fields.get("model_type") != InfiniLlamaConfig.model_type:
        raise InputError(
            f"model '{name}' has model_type '{fields.get('model_type')}', not '{InfiniLlamaConfig.model_type}': "
            f"convert a Llama first, with `python scripts/convert.py {name} OUTPUT`"
        )
    try:
        settings = {field: value for field, value in settings.items() if value is not None}
        model = InfiniLlamaForCausalLM.from_pretrained(name, dtype=dtype, device_map=device, **settings).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model '{name}' cannot be loaded ({one_line(error)})") from error
    return model, tokenizer


def adapter_config(model: PreTrainedModel, adapter: str) -> "PeftConfig":
    """The config of a PEFT adapter for a model.

    Raises:
        ValueError: it has write or read gates and the model has none, of which PEFT would say nothing; or PEFT's own errors.
    """
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(adapter)
    names = load_peft_weights(adapter, device="cpu").keys() if config.modules_to_save else ()
    for kind, module in (("write", "write_gate"), ("read", "memory_gate")):
        has_gates = any(name.endswith(f"{module}.weight") for name in names)
        if has_gates and not getattr(model.config, f"{kind}_gate", False):
            raise ValueError(f"it has {kind} gates and the model has none: convert the model with --{kind}-gate")
    return config


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer of a Llama on its own, in place: one graph serves all layers, and is small."""
    # Of one function there are many: without and with gradients, with a memory and none, for the lengths that are met. At
    # the default of 8 torch gives up.
    torch._dynamo.config.recompile_limit = 64
    # Else a compiled backward pass under autocast is all in bfloat16, also what a forward pass kept in float32, as the memory.
    functorch_config.backward_pass_autocast = "off"
    for layer in model.base_model.layers:
        layer.compile()


def chat_halves(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[str, str]:
    """Return what a chat template makes of a turn that shows a text and asks about it: before and after the text."""
    turn = {"role": "user", "content": f"{TEXT_MARK}\n\n{prompt}"}
    filled_in = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    before, mark, after = filled_in.partition(TEXT_MARK)
    if not mark:
        raise InputError("the chat template does not show the user's words as they are: use --no-chat")
    return before, after


def opening_ids(tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """Tokens that come before a text."""
    if chat:
        before, _ = chat_halves(tokenizer, "")
        return tokenizer(before, add_special_tokens=False)["input_ids"]
    return retrieval_tasks.opening_ids(tokenizer)


def question_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> torch.LongTensor:
    """Tokens (1, T) of a prompt, as they follow a text."""
    if not prompt.strip():
        raise InputError("the prompt is empty: ask something, or leave it out to save the memory only")
    if chat:
        _, prompt = chat_halves(tokenizer, prompt)
    return tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]


def read_text(
    model: InfiniLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Iterable[str],
    cache: InfiniCache,
    *,
    chat: bool = False,
    num_bytes: int | None = None,
) -> Reading:
    """Read a text into a memory, in bounded memory, with a progress bar on stderr.

    Args:
        pieces: the text, cut where tokens end.
        cache: one row, or empty; it goes on from where it stands.
        chat: whether the text opens a turn of the user, should the cache be empty.
        num_bytes: length of the text as UTF-8, if known; lets the bar estimate the time left.
    """
    width = model.config.block_length
    waiting = opening_ids(tokenizer, chat) if cache.get_seq_length() == 0 else []
    # The first block fills up the segment that is open, so that all others are whole segments, which is fastest.
    next_width = width - cache.get_seq_length() % model.config.segment_length
    tokens = bytes_seen = 0
    started = time.perf_counter()
    with tqdm(desc="reading", unit=" tokens", unit_scale=True, file=sys.stderr) as progress:
        for piece in itertools.chain(pieces, [None]):
            if piece is not None:
                waiting += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                bytes_seen += len(piece.encode())
            if num_bytes and bytes_seen:
                share_seen = 1 if piece is None else min(bytes_seen / num_bytes, 1)
                progress.total = round((tokens + len(waiting)) / share_seen)
            while len(waiting) >= next_width or (piece is None and waiting):
                block, waiting = waiting[:next_width], waiting[next_width:]
                feed(model, block, cache)
                tokens, next_width = tokens + len(block), width
                progress.update(len(block))
    return Reading(tokens, time.perf_counter() - started)


@torch.no_grad()
def feed(model: InfiniLlamaForCausalLM, ids: list[int], cache: InfiniCache) -> None:
    model(torch.tensor([ids], device=model.device), past_key_values=cache, logits_to_keep=1)


def answer(
    model: InfiniLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    cache: InfiniCache,
    *,
    chat: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
) -> Answer:
    """Answer a prompt from a copy of a memory.

    Args:
        cache: one row; it is not changed.
        chat: whether prompt and text are one turn of the user, see `read_text`.
        temperature: 0 takes the most likely token each time.
        top_p: sample from the most likely tokens that have this much probability together.
        seed: of the sampling; the same one gives the same answer, whatever was asked before.
        streamer: is shown the tokens as they come.
    """
    ids = question_ids(tokenizer, prompt, chat=chat).to(model.device)
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        torch.manual_seed(seed)
        choice = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    started = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: copy.deepcopy(cache)},
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        streamer=streamer,
        **choice,
    )
    new_ids = output[0, ids.shape[1] :]
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    return Answer(text, len(new_ids), time.perf_counter() - started)


# Numbers


def peak_memory() -> int:
    """Return the largest resident size, in bytes, that this process has had."""
    if sys.platform == "linux":  # whose `ru_maxrss` begins with that of the parent process
        with open("/proc/self/status") as status:
            peaks = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
        if peaks:  # some sandboxes leave it out
            return 1024 * peaks[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(model: InfiniLlamaForCausalLM, cache: InfiniCache, reading: Reading | None = None) -> dict[str, Any]:
    """Return what reading cost, and what the memory takes and full attention would take for the same tokens."""
    config, tokens = model.config, cache.get_seq_length()
    state = sum(memory.matrix.nbytes + memory.normalizer.nbytes for memory in cache if memory is not None)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    numbers = {
        "segment_length": config.segment_length,
        "memory_update": config.memory_update,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "tokens_in_memory": tokens,
        "memory_bytes": state,
        "cache_bytes": cache.nbytes,
        "kv_cache_bytes": tokens * per_token,
        "peak_rss_bytes": peak_memory(),
    }
    if reading is not None:
        numbers |= {
            "tokens_read": reading.tokens,
            "reading_seconds": round(reading.seconds, 3),
            "tokens_per_second": round(reading.tokens / reading.seconds, 1),
        }
    return numbers


def summary(numbers: dict[str, Any]) -> str:
    """Return what `measure` found, in words."""
    lines = []
    if "tokens_read" in numbers:
        lines.append(
            f"read {numbers['tokens_read']:,} tokens in {numbers['reading_seconds']:.1f} s, "
            f"{numbers['tokens_per_second']:,.0f} tokens/s ({numbers['dtype']}, {numbers['device']})"
        )
    times = numbers["kv_cache_bytes"] / max(numbers["cache_bytes"], 1)
    lines += [
        f"peak memory of the process, with the weights: {numbers['peak_rss_bytes'] / 1e9:.2f} GB",
        f"memory: {numbers['memory_bytes'] / 1e6:.2f} MB for all completed segments, "
        f"{numbers['cache_bytes'] / 1e6:.2f} MB with the open segment and what it is about to add",
        f"full attention would keep a KV cache of {numbers['kv_cache_bytes'] / 1e6:,.2f} MB for these "
        f"{numbers['tokens_in_memory']:,} tokens, {times:,.1f} times as much",
    ]
    return "\n".join(lines)


# The command


def require_writable(path: str) -> None:
    """Refuse a path that nothing can be saved to, before a long text is read for it."""
    if Path(path).is_dir():
        raise InputError(f"--save-memory '{path}' is a folder: name a file")
    try:
        # The memory is first written beside its final place, too, so this is exactly what has to work.
        tempfile.TemporaryFile(dir=Path(path).parent).close()
    except OSError as error:
        raise InputError(f"--save-memory '{path}' cannot be written ({error.strerror}): name another place") from error


def require_something_to_do(args: argparse.Namespace) -> None:
    if args.text is None and args.load_memory is None:
        raise InputError("there is no text: name one with --text, or a saved memory with --load-memory")
    if not args.prompt and args.save_memory is None:
        raise InputError("there is nothing to do: ask with --prompt, or keep the memory with --save-memory")
    if not all(prompt.strip() for prompt in args.prompt):
        raise InputError("a prompt is empty: ask something, or leave it out to save the memory only")
    if args.temperature == 0 and args.top_p != 1:
        say("warning: --top-p has no effect without --temperature")


def default_device() -> str:
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    return "cpu"


def choose_chat(tokenizer: PreTrainedTokenizerBase, wanted: bool | None) -> bool:
    if wanted and not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template: leave --chat out")
    return bool(tokenizer.chat_template) if wanted is None else wanted


def load_memory(path: str | None, model: InfiniLlamaForCausalLM) -> InfiniCache:
    if path is None:
        return InfiniCache(model.config)
    try:
        return InfiniCache.load(path, model)
    except (OSError, ValueError) as error:
        raise InputError(one_line(error)) from error


def save_memory(cache: InfiniCache, path: str) -> None:
    try:
        cache.save(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--save-memory '{path}' cannot be written ({one_line(error)})") from error
    say(f"saved the memory to {path} ({os.path.getsize(path) / 1e6:.2f} MB)")


def stream_answer(
    model: InfiniLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    cache: InfiniCache,
    **options: Any,
) -> dict[str, Any]:
    """Answer on stdout, word by word, and return the answer for the report; the options are those of `answer`."""
    say(f"> {prompt}")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = answer(model, tokenizer, prompt, cache, streamer=streamer, **options)
    return {"prompt": prompt, "answer": result.text, "tokens": result.tokens, "seconds": round(result.seconds, 3)}


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line asks for, and return the report."""
    require_something_to_do(args)
    if args.save_memory is not None:
        require_writable(args.save_memory)
    pieces = None if args.text is None else open_text(args.text)
    model, tokenizer = load_model(
        args.model,
        dtype=args.dtype,
        device=args.device,
        segment_length=args.segment_length,
        memory_update=args.memory_update,
        block_segments=args.block_segments,
    )
    chat = choose_chat(tokenizer, args.chat)
    cache, reading = load_memory(args.load_memory, model), None
    if pieces is not None:
        reading = read_text(model, tokenizer, pieces, cache, chat=chat, num_bytes=text_size(args.text))
    if args.save_memory is not None:
        save_memory(cache, args.save_memory)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    answers = [stream_answer(model, tokenizer, prompt, cache, chat=chat, **options) for prompt in args.prompt]
    numbers = measure(model, cache, reading)
    say(summary(numbers))
    return {"model": args.model, "chat": chat, **numbers, "saved_to": args.save_memory, "answers": answers}


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def not_negative(text: str) -> float:
    if not (number := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def probability(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0 and at most 1")
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder made by scripts/convert.py, or the Hub id of such a model")
    parser.add_argument("--text", metavar="PATH", help="file, folder (its *.txt and *.md, by name), or - for stdin")
    parser.add_argument(
        "--prompt", metavar="STR", action="append", default=[], help="repeat it for further, independent ones"
    )
    parser.add_argument("--save-memory", metavar="PATH", help="file to keep the memory in; an old one is replaced")
    parser.add_argument("--load-memory", metavar="PATH", help="start from a saved memory")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="of each answer (default: %(default)s)")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put text and prompt into the chat template (default: if the tokenizer has one)",
    )
    parser.add_argument("--temperature", type=not_negative, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument(
        "--top-p", type=probability, default=1.0, help="nucleus sampling (default: %(default)s, all tokens)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, for each answer (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as stored (default: %(default)s)")
    parser.add_argument(
        "--device",
        default=default_device(),
        help="a torch device, or auto to spread a large model over all there are (default here: %(default)s)",
    )
    parser.add_argument("--segment-length", type=positive, help="tokens per segment, instead of the model's own")
    parser.add_argument(
        "--memory-update", choices=("delta", "linear", "least_squares", "none"), help="instead of the model's own"
    )
    parser.add_argument("--block-segments", type=positive, help="segments at a time: time and memory, not results")
    parser.add_argument("--json", action="store_true", help="end stdout with a line of JSON: answers and numbers")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        report = generate(args)
    except InputError as error:
        say(f"error: {error}")
        return 2
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
