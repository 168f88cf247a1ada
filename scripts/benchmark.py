"""Measure what Infini-attention costs: reading, decoding, training, memory.

    python scripts/benchmark.py MODEL                                  # everything, a converted or a plain Llama
    python scripts/benchmark.py MODEL --tasks prefill --segments 4 16  # one task
    python scripts/benchmark.py MODEL --tasks decode --contexts 2048 200704

Tasks
    prefill   our model on S segments of one text, against the floor: the base Llama on the same segments as a batch of
              independent texts. Same weights, same run, in turn; the ratio is of medians.
    decode    time per token after a short and a long context, at the same place in the segment, in turn; and of the tokens
              that complete a segment.
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

For people everything goes to stderr; the last line on stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from infini_llama.cache_infini import InfiniCache
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts.generate import peak_memory, positive

TASKS = ("prefill", "decode", "train", "memory", "train-memory")


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
    attention = ours.config._attn_implementation
    fields = {k: v for k, v in fields.items() if k not in own} | {"attn_implementation": attention}
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**fields))
    base.load_state_dict({k: v for k, v in ours.state_dict().items() if "memory_gate" not in k}, assign=True)
    base.tie_weights()  # one parameter with one gradient, as in ours
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


def in_turn(calls: dict[str, Callable], repeats: int, title: str, device: str) -> dict[str, list[float]]:
    """The seconds that each call takes, round after round; the first round is warm-up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in tqdm(range(repeats + 1), desc=title, leave=False, disable=None):
        for name, call in calls.items():
            elapsed = seconds(device, call)
            if repeat > 0:
                times[name].append(elapsed)
    return times


def against(ours: list[float], floor: list[float]) -> dict:
    return {
        "floor_s": spread(floor),
        "ratio_of_medians": statistics.median(ours) / statistics.median(floor),
        "pair_ratios": spread([a / b for a, b in zip(ours, floor)]),
    }


def rows_by_rule(times: dict[str, list[float]], rules: list[str], count: int, tokens: int) -> list[dict]:
    """For each rule, our times on this many segments and tokens, against the floor and, if there is one, that in blocks."""
    rows = []
    for rule in rules:
        mine = spread(times[rule])
        row = {"segments": count, "rule": rule, "ours_s": mine, "tokens_per_s": tokens / mine["median"]}
        row |= against(times[rule], times["floor"])
        if "floor in blocks" in times:
            row["in_blocks"] = against(times[rule], times["floor in blocks"])
        rows.append(row)
        line = f"{count:>8} {rule:>7} {mine['median']:>9.3f} {row['tokens_per_s']:>9.0f}"
        for floor in (row, row.get("in_blocks")):
            if floor is not None:
                pairs = floor["pair_ratios"]
                line += f" {floor['floor_s']['median']:>9.3f} {floor['ratio_of_medians']:>11.3f}"
                line += f"  {pairs['min']:>5.3f}..{pairs['max']:<5.3f}"
        say(line)
    return rows


HEADER = f"{'segments':>8} {'rule':>7} {'ours s':>9} {'tokens/s':>9} {'floor s':>9} {'ours/floor':>11}  pairs min..max"


@torch.no_grad()
def bench_prefill(ours, base, segments: list[int], rules: list[str], repeats: int, device: str) -> list[dict]:
    length = ours.config.segment_length

    def read(rule: str, ids: torch.Tensor) -> None:
        ours.config.memory_update = rule
        ours(ids, logits_to_keep=1)

    rows = []
    say(HEADER)
    for count in segments:
        ids = torch.randint(ours.config.vocab_size, (1, count * length), device=device)
        calls = {"floor": partial(base, ids.view(count, length), use_cache=False, logits_to_keep=1)}
        calls |= {rule: partial(read, rule, ids) for rule in rules}
        times = in_turn(calls, repeats, f"{count} segments", device)
        rows += rows_by_rule(times, rules, count, ids.numel())
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


def checkpoint_activations(model) -> None:
    # Transformers 5.22 renamed it.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


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
) -> list[dict]:
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
        rows = sum(len(batch) for batch in batches)
        for ids in batches:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss * (len(ids) / rows)).backward()
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


def in_process(*arguments: str, **environment: str) -> dict:
    """What `CHILDREN[arguments[0]]` returns in a fresh process, so that its peak is its own."""
    command = [sys.executable, os.path.abspath(__file__), "none", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"measuring {' '.join(arguments)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bench_memory(lengths: list[int]) -> dict:
    """Peak resident memory of a plain `generate()`, a fresh process for each length."""
    peaks = {}
    for length in lengths:
        child = peaks[str(length)] = in_process("memory", str(length))
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


def bench_train_memory(segments: list[int]) -> dict:
    """Peak resident memory that a training step adds, a fresh process for each length, checkpointed and plain."""
    result: dict[str, dict] = {}
    for mode in ("checkpointed", "plain"):
        # glibc is to return what is freed: by default it comes to keep tensors in its heap, whose holes add to the peak.
        peaks = {
            str(count): in_process("train-memory", str(count), mode, MALLOC_MMAP_THRESHOLD_="65536")
            for count in segments
        }
        for count, child in peaks.items():
            say(
                f"{count:>6} segments, {mode:>12}: activations {child['activations_mb']:.1f} MB, beside "
                f"{child['start_mb']:.1f} MB of the process with weights and gradients, {child['seconds']:.1f} s"
            )
        ratio = peaks[str(segments[-1])]["activations_mb"] / peaks[str(segments[0])]["activations_mb"]
        say(f"longest over shortest, {mode}: {ratio:.3f}")
        result[mode] = {"segments": peaks, "long_over_short": ratio}
    return result


def memory_child(length: str) -> dict:
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
    before = peak_memory() / 2**20
    ids = torch.randint(1, 1024, (1, int(length)))
    elapsed = seconds("cpu", model.generate, ids, max_new_tokens=8, do_sample=False)
    return {
        "peak_mb": peak_memory() / 2**20,
        "start_mb": before,
        "ids_mb": 3 * ids.nbytes / 2**20,  # as given, as a copy for the model, and with the new token
        "seconds": elapsed,
    }


def train_memory_child(segments: str, mode: str) -> dict:
    torch.manual_seed(0)
    config = InfiniLlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        segment_length=128,
        block_segments=8,
        tie_word_embeddings=True,
    )
    model = InfiniLlamaForCausalLM(config).train()
    if mode == "checkpointed":
        checkpoint_activations(model)

    def step(tokens: int) -> None:
        ids = torch.randint(1, config.vocab_size, (1, tokens))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step(8)  # weights, gradients, and what loads once
    model.zero_grad()
    before = peak_memory() / 2**20
    elapsed = seconds("cpu", step, int(segments) * config.segment_length)
    peak = peak_memory() / 2**20
    return {"peak_mb": peak, "start_mb": before, "activations_mb": peak - before, "seconds": elapsed}


CHILDREN = {"memory": memory_child, "train-memory": train_memory_child}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a converted model or a plain Llama: a folder or a Hub id")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to measure")
    parser.add_argument(
        "--segments", type=positive, nargs="+", help="prefill (4 8 16 32), train (16): segments per text"
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        choices=["delta", "linear", "none"],
        default=["delta", "linear"],
        help="prefill, train: write rules",
    )
    parser.add_argument("--repeats", type=positive, default=5, help="prefill, train: counted runs of each")
    parser.add_argument("--no-checkpointing", action="store_true", help="train: both models keep their activations")
    parser.add_argument("--autocast", action="store_true", help="train: under bfloat16 autocast")
    parser.add_argument("--optimizer-step", action="store_true", help="train: with a step of AdamW, at rate 0")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 200_704], help="decode: tokens read before")
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
    parser.add_argument("--segment-length", type=positive, help="override the model's")
    parser.add_argument("--block-segments", type=positive, help="override the model's")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights"
    )
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--threads", type=positive, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.child:
        task, *arguments = args.child
        print(json.dumps(CHILDREN[task](*arguments)))
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
    if set(args.tasks) & {"prefill", "decode", "train"}:
        ours, base = load_pair(
            args.model,
            getattr(torch, args.dtype),
            args.device,
            segment_length=args.segment_length,
            block_segments=args.block_segments,
        )
        cost = theory(ours.config)
        result["attention"] = ours.config._attn_implementation
        result |= {"segment_length": ours.config.segment_length, "block_length": ours.config.block_length}
        result["theory"] = cost
        say(
            f"per token and layer: floor {cost['floor'] / 1e6:.2f} M multiply-adds, memory {cost['memory'] / 1e6:.3f} M; "
            f"expected ratio {cost['ratio']:.3f} if both ran at the same speed"
        )
        rule = ours.config.memory_update
        if "prefill" in args.tasks:
            result["prefill"] = bench_prefill(
                ours, base, args.segments or [4, 8, 16, 32], args.rules, args.repeats, args.device
            )
            ours.config.memory_update = rule
        if "decode" in args.tasks:
            result["decode"] = bench_decode(ours, base, args.contexts, args.tokens, args.device)
        if "train" in args.tasks:
            result["train"] = bench_train(
                ours,
                base,
                args.segments or [16],
                args.rules,
                args.repeats,
                args.device,
                checkpointing=not args.no_checkpointing,
                autocast=args.autocast,
                optimizer_step=args.optimizer_step,
            )
    if "memory" in args.tasks:
        result["memory"] = bench_memory(args.lengths)
    if "train-memory" in args.tasks:
        result["train_memory"] = bench_train_memory(args.memory_segments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
