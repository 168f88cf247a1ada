"""Measure what Infini-attention costs: reading, decoding, training, memory. Or plan it, from a config alone.

    python scripts/benchmark.py MODEL                                  # all but `longest`, a converted or a plain Llama
    python scripts/benchmark.py MODEL --tasks prefill --segments 4 16 --long-length 1000000
    python scripts/benchmark.py MODEL --tasks decode --contexts 2048 200704 10000384
    python scripts/benchmark.py MODEL --tasks longest --budget-gb 8
    python scripts/benchmark.py MODEL --output runs/cpu --page docs/performance.md
    python scripts/benchmark.py --page docs/performance.md --results runs/cpu runs/gpu
    python scripts/benchmark.py --plan MODEL --length 1000000 10000000 --devices 8

Tasks
    prefill   our model on S segments of one text, against two floors: the base Llama on the same segments as one batch of
              independent texts, and as batches of as many segments as our blocks have; and against full attention: the base
              Llama on the whole text, up to --full-limit tokens. Same weights, same run, in turn; ratios are of medians.
              With --long-length, one text of that many tokens as well, window after window through one cache, every fourth
              in turn with a text of one window.
    decode    time per token after contexts of several lengths, at the same place in the segment, in turn; and of the tokens
              that complete a segment; against the base Llama at the same local length, and against the floor: bytes of
              weights, state, keys and values over the bandwidth that a sum or a copy of a large tensor reaches in this run.
              (Weights that fit into a processor's cache can beat that.) What a token costs follows from shapes alone, and
              after the first segment they are the same whatever the length. So contexts are read up to --read-limit tokens,
              and beyond it the cache is only told that it has read more, by whole segments: its positions are those of the
              long context, its memory is that of the part. The results say how much was read.
    train     a training step (forward with labels, backward, gradients cleared) of our model on S segments of one text,
              against two floors: the base Llama on the same segments as one batch of independent texts, and as batches
              of as many segments as our blocks have, whose gradients add up. All checkpoint their activations, the base
              by layer, ours by block. The optimizer's step costs all the same and would hide the difference; it is
              timed with them only on request. The one batch needs room for three times the logits of the whole text.
    memory    peak memory of a plain `generate()` on prompts of different lengths, each in a process of its own, with a
              small random model.
    train-memory
              peak memory that a training step on texts of different lengths adds to weights and gradients, with
              checkpointed blocks and without, each in a process of its own, with a small random model.
    longest   the longest text that a training step of MODEL, and of the base Llama with full attention, fits into --budget-gb
              of memory, both with checkpoints. Each length is tried in a process of its own, whose allocations fail beyond
              the budget (on Linux; elsewhere its peak is only measured), on the CPU. Ours goes in blocks of one segment, unless
              --block-segments says otherwise, and is tried up to --times the base's longest. This takes long, and is left
              out unless it is asked for.

The theoretical cost comes first, from the arithmetic of the config; see `scripts/planning.py`.

Plan
    With --plan nothing is loaded or measured. MODEL is a folder, a config.json or a Hub id, and for texts of --length tokens
    on --devices devices the memory of each device in prefill and training, the bytes that they send each other, beside ring
    attention, FLOPs and times are estimated, ours beside full attention. Devices are described by --flops, --bandwidth and
    --link; the defaults are the data sheet of an H100 SXM, which no program reaches, so the times are floors.

OUTPUT gets `benchmark.json`, `benchmark.md` with the tables and, if matplotlib is there, `benchmark.png` with cost against
length, after each task. --page writes one page of all that --results and this run have.

For people everything goes to stderr; the last line on stdout is one JSON document. The exit status is 0, or 2 for bad
input.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import DynamicCache

from infini_llama.cache_infini import InfiniCache
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import CACHE
from infini_llama.scripts import benchmark_report
from infini_llama.scripts.benchmark_memory import (
    bench_longest,
    bench_memory,
    bench_train_memory,
    checkpoint_activations,
    load_pair,
    seconds,
    train_step,
)
from infini_llama.scripts.evaluate import commit, write
from infini_llama.scripts.generate import InputError, compile_layers, one_line, positive, say
from infini_llama.scripts.planning import Device, decode_bytes, flops, plan, plan_table, read_config

__all__ = ["main"]

TASKS = ("prefill", "decode", "train", "memory", "train-memory", "longest")
MEASURED_HERE = {"prefill", "decode", "train"}
# Large enough for no cache of a processor to hold it.
BANDWIDTH_BYTES = 1 << 28
# H100 SXM, by its data sheet: dense bfloat16, HBM3, and NVLink in one direction.
H100 = Device(flops=989e12, bandwidth=3.35e12, link=450e9)


# What the arithmetic leads to expect


def theory(config: InfiniLlamaConfig, lengths: list[int]) -> dict[str, Any]:
    """Multiply-adds per token and layer: the floor, and what reading and writing the memory adds.

    Args:
        config: of our model.
        lengths: tokens, at which `full_over_ours` says how much more full attention takes.
    """
    parts, count = flops(config, config.segment_length), 2 * config.segment_length * config.num_hidden_layers
    floor, memory = (parts["projections"] + parts["attention"]) / count, (parts["read"] + parts["write"]) / count
    ratios = {
        str(n): sum(flops(config, n, full=True).values()) / sum(flops(config, n).values())
        for n in sorted(set(lengths))
    }
    return {"floor": floor, "memory": memory, "ratio": 1 + memory / floor, "full_over_ours": ratios}


def memory_bandwidth(device: str, repeats: int = 5) -> dict[str, float]:
    """Bytes per second that a sum reads, and that a copy reads and writes, of a large tensor; the best of each.

    The maximum, as `bytes_per_s`, is what a floor is to be computed with.
    """
    x = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    y = torch.empty_like(x)
    rates = {
        "sum": max(x.nbytes / seconds(device, x.sum) for _ in range(repeats)),
        "copy": max(2 * x.nbytes / seconds(device, y.copy_, x) for _ in range(repeats)),
    }
    return rates | {"bytes_per_s": max(rates.values())}


# Measuring


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def in_turn(calls: dict[str, Callable], repeats: int, title: str, device: str) -> dict[str, list[float]]:
    """The seconds that each call takes, round after round; the first round is warm-up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in tqdm(range(repeats + 1), desc=title, leave=False, disable=None):
        for name, call in calls.items():
            elapsed = seconds(device, call)
            if repeat > 0:
                times[name].append(elapsed)
    return times


def over(ours: list[float], other: list[float]) -> dict[str, Any]:
    """How many times as long the first takes as the second."""
    return {
        "ratio_of_medians": statistics.median(ours) / statistics.median(other),
        "pair_ratios": spread([a / b for a, b in zip(ours, other)]),
    }


def rows_by_rule(times: dict[str, list[float]], rules: list[str], count: int, tokens: int) -> list[dict[str, Any]]:
    """For each rule, our times on this many segments and tokens, against what else there is in `times`."""
    rows = []
    for rule in rules:
        mine = spread(times[rule])
        row = {
            "segments": count,
            "tokens": tokens,
            "rule": rule,
            "ours_s": mine,
            "tokens_per_s": tokens / mine["median"],
        }
        row |= {"floor_s": spread(times["floor"])} | over(times[rule], times["floor"])
        line = f"{count:>8} {rule:>7} {mine['median']:>9.3f} {row['tokens_per_s']:>9.0f}{compared(row, 'floor_s')}"
        if "floor in blocks" in times:
            row["in_blocks"] = {"floor_s": spread(times["floor in blocks"])}
            row["in_blocks"] |= over(times[rule], times["floor in blocks"])
            line += compared(row["in_blocks"], "floor_s")
        if "full" in times:
            row["full"] = {"full_s": spread(times["full"])} | over(times["full"], times[rule])
            line += compared(row["full"], "full_s")
        rows.append(row)
        say(line)
    return rows


def compared(row: dict[str, Any], name: str) -> str:
    pairs = row["pair_ratios"]
    return f" {row[name]['median']:>9.3f} {row['ratio_of_medians']:>11.3f}  {pairs['min']:>5.3f}..{pairs['max']:<5.3f}"


HEADER = f"{'segments':>8} {'rule':>7} {'ours s':>9} {'tokens/s':>9} {'floor s':>9} {'ours/floor':>11}  pairs min..max"


@torch.no_grad()
def bench_prefill(
    ours, base, segments: list[int], rules: list[str], repeats: int, device: str, full_limit: int
) -> list[dict[str, Any]]:
    length, block = ours.config.segment_length, ours.config.block_length

    def read(rule: str, ids: torch.Tensor) -> None:
        ours.config.memory_update = rule
        ours(ids, logits_to_keep=1)

    def read_texts(*batches: torch.Tensor) -> None:
        for texts in batches:
            base(texts, use_cache=False, logits_to_keep=1)

    rows = []
    say(
        f"{HEADER}  {'in blocks':>8} {'ours/that':>11}  pairs min..max {'full s':>9} {'full/ours':>11}  pairs min..max"
    )
    for count in segments:
        ids = torch.randint(ours.config.vocab_size, (1, count * length), device=device)
        texts = ids.view(count, length)
        calls = {
            "floor": partial(read_texts, texts),
            "floor in blocks": partial(read_texts, *texts.split(block // length)),
        }
        calls |= {rule: partial(read, rule, ids) for rule in rules}
        if ids.numel() <= full_limit:
            calls["full"] = partial(base, ids, use_cache=False, logits_to_keep=1)
        times = in_turn(calls, repeats, f"{count} segments", device)
        rows += rows_by_rule(times, rules, count, ids.numel())
    return rows


@torch.no_grad()
def bench_long(ours, length: int, window: int, device: str) -> dict[str, Any]:
    """One text, a window of whole blocks at a time through one cache; beside every fourth, another text of one window."""
    block = ours.config.block_length
    window = max(1, window // block) * block
    count = length // window
    if count < 2:
        raise InputError(
            f"--long-length is {length}: give at least two windows of {window} tokens, or a smaller --window"
        )

    def tokens_per_s(cache: InfiniCache) -> float:
        ids = torch.randint(ours.config.vocab_size, (1, window), device=device)
        return window / seconds(device, ours, ids, past_key_values=cache, logits_to_keep=1)

    cache, windows, short = InfiniCache(ours.config), [], {}
    tokens_per_s(InfiniCache(ours.config))  # warm-up
    for index in tqdm(range(count), desc=f"reading {count * window}", leave=False, disable=None):
        if index % min(4, count - 1) == 0:
            short[index] = tokens_per_s(InfiniCache(ours.config))
        windows.append(tokens_per_s(cache))
    # A machine's own speed drifts over the minutes that this takes, so a window is compared with the text beside it.
    ratios = [windows[index] / alone for index, alone in short.items()]
    quarter = max(1, len(ratios) // 4)
    result = {
        "tokens": count * window,
        "window": window,
        "rule": ours.config.memory_update,
        "windows_tokens_per_s": windows,
        "short_tokens_per_s": spread(list(short.values())),
        "long_tokens_per_s": spread(windows),
        "pair_ratios": spread(ratios),
        "long_over_short": statistics.median(ratios),
        "end_over_start": statistics.median(ratios[-quarter:]) / statistics.median(ratios[:quarter]),
    }
    say(
        f"{count * window} tokens in windows of {window}: {statistics.median(windows):.0f} tokens/s, "
        f"{result['long_over_short']:.3f} of the text beside it; the same in the last quarter over the first {result['end_over_start']:.3f}"
    )
    return result


def move_on(cache: InfiniCache, tokens: int) -> None:
    """Tell a cache that it has read this many more tokens, whole segments: positions change, and nothing that costs time."""
    timeline = cache.layers[0].timeline
    positions = tuple(position + tokens for position in timeline.positions)
    for layer in cache.layers:
        layer.timeline = timeline._replace(seen=timeline.seen + tokens, positions=positions)


@torch.no_grad()
def bench_decode(ours, base, contexts: list[int], tokens: int, read_limit: int, device: str) -> dict[str, Any]:
    """Token by token after each context, in turn, all at the same place in the segment."""
    vocab, length, block = ours.config.vocab_size, ours.config.segment_length, ours.config.block_length
    slot = contexts[0] % length
    for context in contexts:
        if context % length != slot:
            raise InputError(
                f"--contexts has {contexts[0]} and {context}, which are not at the same place in segments of {length} tokens: "
                "let them differ by whole segments"
            )
    caches, read = {}, {}
    for context in contexts:
        cache = caches[context] = InfiniCache(ours.config)
        # Whole segments less, and at least one, so that there is a memory.
        skipped = max(0, context - max(read_limit, length + slot)) // length * length
        read[context] = context - skipped
        for start in tqdm(range(0, read[context], block), desc=f"reading {context}", leave=False, disable=None):
            ids = torch.randint(vocab, (1, min(block, read[context] - start)), device=device)
            ours(ids, past_key_values=cache, logits_to_keep=1)
        move_on(cache, skipped)
    base_cache = DynamicCache(config=base.config)
    if slot:
        base(torch.randint(vocab, (1, slot), device=device), **{CACHE: base_cache}, logits_to_keep=1)
    bandwidth = memory_bandwidth(device)
    steps: dict[int | str, list[float]] = {context: [] for context in contexts} | {"base": []}
    completing: list[float] = []
    for step in tqdm(range(tokens), desc="decoding", leave=False, disable=None):
        token = torch.randint(vocab, (1, 1), device=device)
        here = (slot + step) % length
        for context, cache in caches.items():
            elapsed = seconds(device, ours, token, past_key_values=cache, logits_to_keep=1)
            steps[context].append(elapsed)
            if here == length - 1:
                completing.append(elapsed)
        if here == 0:
            base_cache = DynamicCache(config=base.config)  # the base sees one segment only
        elapsed = seconds(device, base, token, **{CACHE: base_cache}, logits_to_keep=1)
        steps["base"].append(elapsed)
    medians = {name: statistics.median(values) for name, values in steps.items()}
    of_contexts = [medians[context] for context in contexts]
    everything = [x for context in contexts for x in steps[context]]
    result = {
        "tokens": tokens,
        "segment_length": length,
        "read": {str(context): count for context, count in read.items()},
        "s_per_token": {str(name): spread(values) for name, values in steps.items()},
        "long_over_short": medians[contexts[-1]] / medians[contexts[0]],
        "flatness": max(of_contexts) / min(of_contexts),
        "ours_over_base": statistics.median(everything) / medians["base"],
        "completing_over_median": statistics.median(completing) / statistics.median(everything)
        if completing
        else None,
        "completing_tokens": len(completing),
        "floor": decode_floor(ours, base, [(slot + step) % length + 1 for step in range(tokens)], bandwidth),
    }
    result["ours_over_floor"] = statistics.median(everything) / result["floor"]["s_per_token"]["ours"]
    for name, values in medians.items():
        say(f"{'base, one segment' if name == 'base' else f'after {name} tokens':>24}: {values * 1e3:.2f} ms")
    say(
        f"largest over smallest median: {result['flatness']:.3f}; ours over base: {result['ours_over_base']:.3f}; "
        f"over the floor of {result['floor']['s_per_token']['ours'] * 1e3:.2f} ms: {result['ours_over_floor']:.3f}"
    )
    if completing:
        say(
            f"the {len(completing)} tokens that complete a segment: {result['completing_over_median']:.3f} of the median"
        )
    return result


def decode_floor(ours, base, keys: list[int], bandwidth: dict[str, float]) -> dict[str, Any]:
    """What a token must read and write, and how long that takes at this bandwidth; `keys` in view of each token."""
    mean_keys = round(statistics.mean(keys))
    moved = {}
    for name, model in (("ours", ours), ("base", base)):
        weights = sum(parameter.nbytes for parameter in model.parameters())
        moved[name] = decode_bytes(ours.config, mean_keys, model.dtype.itemsize, full=model is base, weights=weights)
    return {
        "bandwidth": bandwidth,
        "bytes": moved,
        "s_per_token": {name: sum(parts.values()) / bandwidth["bytes_per_s"] for name, parts in moved.items()},
    }


def bench_train(
    ours,
    base,
    segments: list[int],
    rules: list[str],
    repeats: int,
    device: str,
    checkpointing: bool,
    autocast: bool,
    optimizer_step: bool,
) -> list[dict[str, Any]]:
    """Steps of both models in turn. They share their weights, which stay as they are, and not their gradients."""
    length, block = ours.config.segment_length, ours.config.block_length
    optimizers = {}
    for model in (ours, base):
        model.train()
        if checkpointing:
            checkpoint_activations(model)
        # The whole arithmetic of a step, and no change.
        optimizers[model] = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(model, *batches: torch.Tensor, rule: str | None = None) -> None:
        if rule is not None:
            model.config.memory_update = rule
        train_step(model, *batches, autocast=autocast)
        if optimizer_step:
            optimizers[model].step()
        optimizers[model].zero_grad()

    rows = []
    say(f"{HEADER}  {'in blocks':>8} {'ours/that':>11}  pairs min..max")
    for count in segments:
        ids = torch.randint(ours.config.vocab_size, (1, count * length), device=device)
        texts = ids.view(count, length)
        calls = {
            "floor": partial(step, base, texts),
            "floor in blocks": partial(step, base, *texts.split(block // length)),
        }
        calls |= {rule: partial(step, ours, ids, rule=rule) for rule in rules}
        times = in_turn(calls, repeats, f"{count} segments", device)
        rows += rows_by_rule(times, rules, count, ids.numel())
    return rows


# The command


def above_zero(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a converted model or a plain Llama: a folder or a Hub id")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS[:-1]), help="what to measure")
    parser.add_argument("--output", metavar="FOLDER", help="for benchmark.json, benchmark.md and benchmark.png")
    parser.add_argument("--page", metavar="FILE", help="write a page of --results and of what is measured now")
    parser.add_argument(
        "--results", metavar="FOLDER", nargs="+", default=[], help="page: what --output has had before"
    )
    parser.add_argument(
        "--segments", type=positive, nargs="+", help="prefill (4 8 16 32), train (16): segments per text"
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        choices=["delta", "linear", "least_squares", "none"],
        help="prefill, train: write rules (delta linear); plan: the first (the model's)",
    )
    parser.add_argument("--repeats", type=positive, default=5, help="prefill, train: counted runs of each")
    parser.add_argument(
        "--full-limit", type=positive, default=16_384, help="prefill: longest text with full attention"
    )
    parser.add_argument("--long-length", type=positive, help="prefill: tokens of a long text to read as well")
    parser.add_argument("--window", type=positive, default=16_384, help="prefill: tokens of it to time at once")
    parser.add_argument("--no-checkpointing", action="store_true", help="train, longest: activations are kept")
    parser.add_argument("--autocast", action="store_true", help="train, longest: under bfloat16 autocast")
    parser.add_argument(
        "--optimizer-step", action="store_true", help="train, longest: with a step of AdamW, at rate 0"
    )
    parser.add_argument(
        "--contexts", type=positive, nargs="+", help="decode: tokens before (one segment, 64, and 10M tokens)"
    )
    parser.add_argument(
        "--read-limit", type=positive, default=32_768, help="decode: tokens of a context that are really read"
    )
    parser.add_argument("--tokens", type=positive, default=512, help="decode: tokens to time after each context")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[32_000, 1_000_000], help="memory: prompt lengths"
    )
    parser.add_argument(
        "--memory-segments",
        type=positive,
        nargs="+",
        default=[8, 64],
        help="train-memory: segments per text, of 128 tokens, in blocks of 8",
    )
    parser.add_argument("--budget-gb", type=above_zero, default=8.0, help="longest: memory of a process, in 1e9 bytes")
    parser.add_argument("--times", type=positive, default=32, help="longest: the most that ours is tried for")
    parser.add_argument("--plan", action="store_true", help="estimate from the config of MODEL, and measure nothing")
    parser.add_argument("--length", type=positive, nargs="+", help="plan: tokens of the text")
    parser.add_argument("--devices", type=positive, default=1, help="plan: that share it")
    parser.add_argument("--flops", type=above_zero, default=H100.flops, help="plan: FLOP/s of a device")
    parser.add_argument("--bandwidth", type=above_zero, default=H100.bandwidth, help="plan: bytes/s of its memory")
    parser.add_argument("--link", type=above_zero, default=H100.link, help="plan: bytes/s that it sends to others")
    parser.add_argument("--segment-length", type=positive, help="override the model's")
    parser.add_argument("--block-segments", type=positive, help="override the model's")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (float32; plan: bfloat16)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="prefill, decode, train: decoder layers of both by torch.compile"
    )
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--threads", type=positive, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise InputError for what can be seen without a model."""
    if args.model is None and (args.plan or not args.results):
        raise InputError("MODEL is missing: name a folder or a Hub id, or --results to make a --page of")
    if args.results and args.page is None:
        raise InputError("--results has no effect without --page: name the file to write")
    if args.plan and args.length is None:
        raise InputError("--plan needs --length: give the tokens of the text")
    if args.length is not None and not args.plan:
        raise InputError("--length belongs to --plan; lengths to measure are --segments, --contexts and --lengths")


def machine(device: str) -> str:
    """What the numbers depend on, in words."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    text = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{text}, {device if device == 'cpu' else torch.cuda.get_device_name(device)}"


def circumstances(args: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Without which a number is no result. Of paths of this machine only the last part is kept."""
    return {
        "model": Path(args.model).name,
        "command": [Path(word).name if Path(word).is_absolute() else word for word in command],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(args.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": args.dtype,
        "seed": args.seed,
    }


def save(result: dict[str, Any], folder: str | None) -> None:
    """Whole files, each in place of the last one."""
    if folder is None:
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write(path / "benchmark.json", json.dumps(result, indent=1))
        write(path / "benchmark.md", benchmark_report.tables(result))
        benchmark_report.plot(result, path / "benchmark.png")
    except OSError as error:
        raise InputError(f"--output '{folder}' cannot be written ({error.strerror}): name another") from error


def read_results(folders: list[str]) -> list[dict[str, Any]]:
    results = []
    for folder in folders:
        try:
            results.append(json.loads((Path(folder) / "benchmark.json").read_text(encoding="utf-8")))
            benchmark_report.tables(results[-1])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"--results '{folder}' has no benchmark.json that can be read ({type(error).__name__}: {one_line(error)}): "
                "name a folder that --output has written"
            ) from error
    return results


def make_plans(args: argparse.Namespace, result: dict[str, Any]) -> None:
    config = read_config(
        args.model,
        segment_length=args.segment_length,
        block_segments=args.block_segments,
        memory_update=args.rules[0] if args.rules else None,
    )
    device = Device(args.flops, args.bandwidth, args.link)
    result["plan"] = [plan(config, length, args.devices, args.dtype, device) for length in args.length]
    for content in result["plan"]:
        say(f"{plan_table(content)}\n")


def measure(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill `result`, task by task, and save it after each."""
    config = None
    if set(args.tasks) & (MEASURED_HERE | {"longest"}):
        settings = {"segment_length": args.segment_length, "block_segments": args.block_segments}
        config = read_config(args.model, **settings)
    if set(args.tasks) & MEASURED_HERE:
        ours, base = load_pair(args.model, getattr(torch, args.dtype), args.device, **settings)
        if args.compile:
            for model in (ours, base):
                compile_layers(model)
        length = config.segment_length
        segments = {"prefill": args.segments or [4, 8, 16, 32], "train": args.segments or [16]}
        rules, rule = args.rules or ["delta", "linear"], ours.config.memory_update
        result["attention"] = ours.config._attn_implementation
        result |= {"segment_length": length, "block_length": config.block_length}
        result["theory"] = theory(config, [count * length for count in segments["prefill"]])
        say(benchmark_report.theory_text(result))
    for task in TASKS:
        if task not in args.tasks:
            continue
        if task == "prefill":
            result["prefill"] = bench_prefill(
                ours, base, segments["prefill"], rules, args.repeats, args.device, args.full_limit
            )
            ours.config.memory_update = rule
            if args.long_length is not None:
                result["long"] = bench_long(ours, args.long_length, args.window, args.device)
        elif task == "decode":
            contexts = args.contexts or [length, 64 * length, max(10_000_000 // length, 65) * length]
            result["decode"] = bench_decode(ours, base, contexts, args.tokens, args.read_limit, args.device)
        elif task == "train":
            result["train"] = bench_train(
                ours,
                base,
                segments["train"],
                rules,
                args.repeats,
                args.device,
                checkpointing=not args.no_checkpointing,
                autocast=args.autocast,
                optimizer_step=args.optimizer_step,
            )
        elif task == "memory":
            result["memory"] = bench_memory(args.lengths)
        elif task == "train-memory":
            result["train_memory"] = bench_train_memory(args.memory_segments)
        elif task == "longest":
            how = {
                "dtype": args.dtype,
                "checkpointing": not args.no_checkpointing,
                "autocast": args.autocast,
                "optimizer_step": args.optimizer_step,
            }
            how |= settings | {"block_segments": args.block_segments or 1}
            budget = int(args.budget_gb * 1e9)
            result["longest"] = bench_longest(args.model, config, budget, args.times, torch.get_num_threads(), how)
        save(result, args.output)


def run(args: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """What the command line asks for; returns what is printed."""
    check(args)
    args.dtype = args.dtype or ("bfloat16" if args.plan else "float32")
    results = read_results(args.results)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    printed: dict[str, Any] = {"page": args.page, "results": args.results}
    if args.model is not None:
        printed = circumstances(args, command)
        if args.plan:
            make_plans(args, printed)
            save(printed, args.output)
        else:
            measure(args, printed)
        results.append(printed)
    if args.page is not None:
        try:
            write(Path(args.page), benchmark_report.page(results))
        except InputError as error:
            raise InputError(f"--page '{args.page}' cannot be written: name a file in a folder that exists") from error
    return printed


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    try:
        result = run(args, [Path(__file__).name, *argv])
    except InputError as error:
        say(f"error: {error}")
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
