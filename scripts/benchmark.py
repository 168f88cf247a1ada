"""Measure what Infini-attention costs: reading, decoding, memory.

    python scripts/benchmark.py MODEL                                  # everything, a converted or a plain Llama
    python scripts/benchmark.py MODEL --tasks prefill --segments 4 16  # one task
    python scripts/benchmark.py MODEL --tasks decode --contexts 2048 200704

Tasks
    prefill   our model on S segments of one text, against the floor: the base Llama on the same segments as a batch of
              independent texts. Same weights, same run, in turn; the ratio is of medians.
    decode    time per token after a short and a long context, at the same place in the segment, in turn; and of the tokens
              that complete a segment.
    memory    peak memory of a plain `generate()` on prompts of different lengths, each in a process of its own, with a
              small random model.

For people everything goes to stderr; the last line on stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from infini_llama.cache_infini import InfiniCache
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import InfiniLlamaForCausalLM

TASKS = ("prefill", "decode", "memory")


def say(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)


def load_pair(name: str, dtype: torch.dtype, device: str, **settings: int | None):
    """Our model, with these settings in its config where they are not None, and the base Llama, on the same tensors."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}
    fields |= {name: value for name, value in settings.items() if value is not None}
    ours = (
        InfiniLlamaForCausalLM.from_pretrained(name, config=InfiniLlamaConfig(**fields), dtype=dtype).to(device).eval()
    )
    own = {"segment_length", "memory_update", "gate_init", "block_segments", "layer_types"}
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in fields.items() if k not in own}))
    base.load_state_dict({k: v for k, v in ours.state_dict().items() if "memory_gate" not in k}, assign=True)
    base.model.rotary_emb = ours.model.rotary_emb  # its tables are no part of the weights
    return ours, base.eval()


def theory(config: InfiniLlamaConfig) -> dict[str, float]:
    """Multiply-adds per token and layer: the floor, and what reading and writing the memory adds."""
    hidden, heads, kv_heads, dim = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    floor = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config.intermediate_size
    floor += heads * dim * config.segment_length  # causal: half of 2 N D
    memory = heads * dim * (dim + 1) + kv_heads * dim * dim * (2 if config.memory_update == "delta" else 1)
    return {"floor": floor, "memory": memory, "ratio": 1 + memory / floor}


def seconds(device: str, function: Callable, *args, **kwargs) -> float:
    """How long a call takes, work queued on a GPU included."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*args, **kwargs)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@torch.no_grad()
def bench_prefill(ours, base, segments: list[int], rules: list[str], repeats: int, device: str) -> list[dict]:
    length = ours.config.segment_length
    rows = []
    say(
        f"{'segments':>8} {'rule':>7} {'floor s':>9} {'ours s':>9} {'ours/floor':>11}  pairs min..max  {'tokens/s':>9}"
    )
    for count in segments:
        ids = torch.randint(ours.config.vocab_size, (1, count * length), device=device)
        times: dict[str, list[float]] = {name: [] for name in ("floor", *rules)}
        for repeat in tqdm(range(repeats + 1), desc=f"{count} segments", leave=False, disable=None):
            for name, measured in times.items():
                if name == "floor":
                    elapsed = seconds(device, base, ids.view(count, length), use_cache=False, logits_to_keep=1)
                else:
                    ours.config.memory_update = name
                    elapsed = seconds(device, ours, ids, logits_to_keep=1)
                if repeat > 0:  # the first is warm-up
                    measured.append(elapsed)
        for rule in rules:
            pairs = [a / b for a, b in zip(times[rule], times["floor"])]
            floor, mine = spread(times["floor"]), spread(times[rule])
            ratio = mine["median"] / floor["median"]
            row = {"segments": count, "rule": rule, "floor_s": floor, "ours_s": mine, "ratio_of_medians": ratio}
            row |= {"pair_ratios": spread(pairs), "tokens_per_s": ids.numel() / mine["median"]}
            rows.append(row)
            say(
                f"{count:>8} {rule:>7} {floor['median']:>9.3f} {mine['median']:>9.3f} {ratio:>11.3f}  "
                f"{min(pairs):.3f}..{max(pairs):.3f}  {row['tokens_per_s']:>11.0f}"
            )
    return rows


@torch.no_grad()
def bench_decode(ours, base, contexts: list[int], tokens: int, device: str) -> dict:
    """Token by token after each context, in turn, all at the same place in the segment."""
    vocab, length = ours.config.vocab_size, ours.config.segment_length
    caches = {}
    for context in contexts:
        cache = InfiniCache(ours.config)
        chunk = ours.config.block_length
        for start in tqdm(range(0, context, chunk), desc=f"reading {context}", leave=False, disable=None):
            ids = torch.randint(vocab, (1, min(chunk, context - start)), device=device)
            ours(ids, past_key_values=cache, logits_to_keep=1)
        caches[context] = cache
    base_cache = None
    steps = {context: [] for context in contexts} | {"base": []}
    completing: list[float] = []
    for step in tqdm(range(tokens), desc="decoding", leave=False, disable=None):
        token = torch.randint(vocab, (1, 1), device=device)
        for context, cache in caches.items():
            is_last = (context + step) % length == length - 1
            elapsed = seconds(device, ours, token, past_key_values=cache, logits_to_keep=1)
            steps[context].append(elapsed)
            if is_last:
                completing.append(elapsed)
        if base_cache is None or (contexts[0] + step) % length == 0:
            base_cache = base(token, use_cache=True).past_key_values  # the base sees one segment only
        elapsed = seconds(device, base, token, past_key_values=base_cache, logits_to_keep=1)
        steps["base"].append(elapsed)
    first, last = contexts[0], contexts[-1]
    everything = [x for context in contexts for x in steps[context]]
    result = {
        "tokens": tokens,
        "segment_length": length,
        "s_per_token": {str(name): spread(values) for name, values in steps.items()},
        "long_over_short": statistics.median(steps[last]) / statistics.median(steps[first]),
        "ours_over_base": statistics.median(everything) / statistics.median(steps["base"]),
        "completing_over_median": statistics.median(completing) / statistics.median(everything)
        if completing
        else None,
        "completing_tokens": len(completing),
    }
    for name, values in steps.items():
        say(
            f"{'base, one segment' if name == 'base' else f'after {name} tokens':>24}: {spread(values)['median'] * 1e3:.2f} ms"
        )
    say(f"long over short context: {result['long_over_short']:.3f}; ours over base: {result['ours_over_base']:.3f}")
    if completing:
        say(
            f"the {len(completing)} tokens that complete a segment: {result['completing_over_median']:.3f} of the median"
        )
    return result


def bench_memory(lengths: list[int]) -> dict:
    """Peak resident memory of a plain `generate()`, a fresh process for each length."""
    peaks = {}
    for length in lengths:
        command = [sys.executable, os.path.abspath(__file__), "none", "--memory-child", str(length)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"measuring {length} tokens failed: {done.stderr.strip()[-2000:]}")
        peaks[str(length)] = json.loads(done.stdout.splitlines()[-1])
        child = peaks[str(length)]
        say(
            f"{length:>9} tokens: peak {child['peak_mb']:.1f} MB, {child['peak_mb'] - child['ids_mb']:.1f} MB without the "
            f"input ids, {child['seconds']:.1f} s"
        )
    first, last = (peaks[str(length)] for length in (lengths[0], lengths[-1]))
    ratio = (last["peak_mb"] - last["ids_mb"]) / (first["peak_mb"] - first["ids_mb"])
    growth = (last["peak_mb"] - last["ids_mb"] - last["start_mb"]) / (
        first["peak_mb"] - first["ids_mb"] - first["start_mb"]
    )
    say(f"longest over shortest: {ratio:.3f} of the process, {growth:.3f} of what the prompt added to it")
    return {"lengths": peaks, "long_over_short": ratio, "long_over_short_added": growth}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def memory_child(length: int) -> dict:
    torch.manual_seed(0)
    config = InfiniLlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        segment_length=512,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = InfiniLlamaForCausalLM(config).eval()
    model.generate(torch.randint(1, 1024, (1, 8)), max_new_tokens=4, do_sample=False)  # what loads once
    before = peak_mb()
    ids = torch.randint(1, 1024, (1, length))
    elapsed = seconds("cpu", model.generate, ids, max_new_tokens=8, do_sample=False)
    return {
        "peak_mb": peak_mb(),
        "start_mb": before,
        "ids_mb": 3
        * ids.numel()
        * ids.element_size()
        / 2**20,  # as given, as a copy for the model, and with the new token
        "seconds": elapsed,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a converted model or a plain Llama: a folder or a Hub id")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to measure")
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 8, 16, 32], help="prefill: segments per text")
    parser.add_argument("--rules", nargs="+", default=["delta", "linear"], help="prefill: write rules")
    parser.add_argument("--repeats", type=int, default=5, help="prefill: counted runs of each")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 200_704], help="decode: tokens read before")
    parser.add_argument("--tokens", type=int, default=512, help="decode: tokens to time after each context")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_000, 1_000_000], help="memory: prompt lengths")
    parser.add_argument("--segment-length", type=int, help="override the model's")
    parser.add_argument("--block-segments", type=int, help="override the model's")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights"
    )
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    parser.add_argument("--memory-child", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.memory_child:
        print(json.dumps(memory_child(args.memory_child)))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    result = {
        "command": [os.path.basename(sys.argv[0]), *(argv if argv is not None else sys.argv[1:])],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {args.device}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": args.dtype,
    }
    if set(args.tasks) & {"prefill", "decode"}:
        ours, base = load_pair(
            args.model,
            getattr(torch, args.dtype),
            args.device,
            segment_length=args.segment_length,
            block_segments=args.block_segments,
        )
        cost = theory(ours.config)
        result |= {"segment_length": ours.config.segment_length, "block_length": ours.config.block_length}
        result["theory"] = cost
        say(
            f"per token and layer: floor {cost['floor'] / 1e6:.2f} M multiply-adds, memory {cost['memory'] / 1e6:.3f} M; "
            f"expected ratio {cost['ratio']:.3f} if both ran at the same speed"
        )
        rule = ours.config.memory_update
        if "prefill" in args.tasks:
            result["prefill"] = bench_prefill(ours, base, args.segments, args.rules, args.repeats, args.device)
            ours.config.memory_update = rule
        if "decode" in args.tasks:
            result["decode"] = bench_decode(ours, base, args.contexts, args.tokens, args.device)
    if "memory" in args.tasks:
        result["memory"] = bench_memory(args.lengths)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
