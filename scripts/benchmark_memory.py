"""The tasks of `benchmark.py` that measure memory: each number comes from a process of its own, so that a peak is its own."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts.generate import InputError, one_line, peak_memory, say
from infini_llama.scripts.planning import read_config

__all__ = [
    "bench_longest",
    "bench_memory",
    "bench_train_memory",
    "checkpoint_activations",
    "largest",
    "load_pair",
    "seconds",
    "train_step",
]

OUT_OF_MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "MemoryError",
    "could not create",
)
# glibc is to return what is freed: by default it comes to keep tensors in its heap, whose holes add to the peak.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def load_pair(
    name: str, dtype: torch.dtype, device: str, **settings: int | None
) -> tuple[InfiniLlamaForCausalLM, LlamaForCausalLM]:
    """Our model, with these settings in its config where they are not None, and the base Llama, on the same tensors.

    Raises:
        InputError: there is no such model, or it is no Llama.
    """
    config = read_config(name, **settings)
    try:
        ours = InfiniLlamaForCausalLM.from_pretrained(name, config=config, dtype=dtype).to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(str(error)):
            raise
        raise InputError(f"model '{name}' cannot be loaded ({one_line(error)}): name a folder or a Hub id") from error
    own = {"segment_length", "memory_update", "gate_init", "write_gate", "read_gate", "block_segments", "layer_types"}
    left_out = own | {"model_type", "architectures", "auto_map"}
    fields = {key: value for key, value in config.to_dict().items() if key not in left_out}
    fields["attn_implementation"] = ours.config._attn_implementation
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**fields))
    shared = base.state_dict().keys()
    base.load_state_dict({k: v for k, v in ours.state_dict().items() if k in shared}, assign=True)
    base.tie_weights()  # one parameter with one gradient, as in ours
    base.model.rotary_emb = ours.model.rotary_emb  # its tables are no part of the weights
    return ours, base.eval()


def checkpoint_activations(model: torch.nn.Module) -> None:
    # Transformers 5.22 renamed it.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def train_step(model: torch.nn.Module, *batches: torch.Tensor, autocast: bool = False) -> None:
    """Forward and backward over batches of ids (B, T), whose gradients add up as if they were one batch."""
    rows = sum(len(batch) for batch in batches)
    for ids in batches:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss * (len(ids) / rows)).backward()


def seconds(device: str, function: Callable, *args: Any, **kwargs: Any) -> float:
    """How long a call takes, work queued on a GPU included."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*args, **kwargs)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def is_out_of_memory(text: str) -> bool:
    return any(words in text for words in OUT_OF_MEMORY)


def in_process(*arguments: str, **environment: str) -> dict[str, Any]:
    """What `CHILDREN[arguments[0]]` returns in a fresh process. One that dies for want of memory does not fit."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        if arguments[0] == "longest" and (done.returncode < 0 or is_out_of_memory(done.stderr)):
            return {"fits": False, "why": f"exit status {done.returncode}"}
        raise RuntimeError(f"measuring {' '.join(arguments)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# Prompts and training texts of a small random model


def bench_memory(lengths: list[int]) -> dict[str, Any]:
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


def bench_train_memory(segments: list[int]) -> dict[str, Any]:
    """Peak resident memory that a training step adds, a fresh process for each length, checkpointed and plain."""
    result: dict[str, dict] = {}
    for mode in ("checkpointed", "plain"):
        peaks = {str(count): in_process("train-memory", str(count), mode, **RETURN_MEMORY) for count in segments}
        for count, child in peaks.items():
            say(
                f"{count:>6} segments, {mode:>12}: activations {child['activations_mb']:.1f} MB, beside "
                f"{child['start_mb']:.1f} MB of the process with weights and gradients, {child['seconds']:.1f} s"
            )
        ratio = peaks[str(segments[-1])]["activations_mb"] / peaks[str(segments[0])]["activations_mb"]
        say(f"longest over shortest, {mode}: {ratio:.3f}")
        result[mode] = {"segments": peaks, "long_over_short": ratio}
    return result


def memory_child(length: str) -> dict[str, Any]:
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


def train_memory_child(segments: str, mode: str) -> dict[str, Any]:
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
        train_step(model, torch.randint(1, config.vocab_size, (1, tokens)))

    step(8)  # weights, gradients, and what loads once
    model.zero_grad()
    before = peak_memory() / 2**20
    elapsed = seconds("cpu", step, int(segments) * config.segment_length)
    peak = peak_memory() / 2**20
    return {"peak_mb": peak, "start_mb": before, "activations_mb": peak - before, "seconds": elapsed}


# The longest text that can be trained on


def largest(fits: Callable[[int], bool], limit: int | None = None) -> int:
    """The largest count that fits, to a sixteenth: twice as many until one does not, then halves of what is between.

    Args:
        fits: whether a count does; those below one that fits do too.
        limit: the largest of interest, tried first.

    Returns:
        The count, 0 if not even 1 fits.
    """
    if limit is not None and fits(limit):
        return limit
    low, high = 0, 1
    while (limit is None or high < limit) and fits(high):
        low, high = high, 2 * high
    high = high if limit is None else min(high, limit)
    while low and high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def bench_longest(
    name: str, config: InfiniLlamaConfig, budget: int, times: int, threads: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """The longest text that each model takes a training step on, in a process of at most `budget` bytes.

    Args:
        name: of the model.
        config: of ours; lengths are multiples of its N.
        budget: resident memory of the process: Python, weights, gradients, activations.
        times: ours is not tried beyond this multiple of the base's longest.
        threads: of the processes.
        settings: how steps are made, see `longest_child`.

    Raises:
        InputError: less than the budget is free, or one segment does not fit into it.
    """
    free = free_memory()
    if free is not None and budget > free:
        raise InputError(
            f"--budget-gb is {budget / 1e9:g}, but {free / 1e9:.1f} GB are free on this machine: give less, or free some"
        )
    tried: dict[str, dict[str, dict]] = {"base": {}, "ours": {}}

    def fits(system: str, segments: int) -> bool:
        tokens = segments * config.segment_length
        child = in_process(
            "longest",
            json.dumps(settings | {"model": name, "system": system, "tokens": tokens, "budget": budget}),
            OMP_NUM_THREADS=str(threads),
            **RETURN_MEMORY,
        )
        if "error" in child:
            raise InputError(child["error"])
        tried[system][str(tokens)] = child
        peak = f"peak {child['peak_mb']:.0f} MB, {child['seconds']:.1f} s" if child["fits"] else child["why"]
        say(f"{system}: {tokens} tokens {'fit' if child['fits'] else 'do not fit'} ({peak})")
        return child["fits"]

    counts = {"base": largest(lambda count: fits("base", count))}
    if counts["base"]:
        counts["ours"] = largest(lambda count: fits("ours", count), limit=times * counts["base"])
    if not all(counts.values()):
        raise InputError(
            f"--budget-gb is {budget / 1e9:g}, which does not hold a step over {config.segment_length} tokens: give more, or "
            "a smaller --segment-length or --block-segments"
        )
    ratio = counts["ours"] / counts["base"]
    at_limit = counts["ours"] == times * counts["base"]
    longest = {system: count * config.segment_length for system, count in counts.items()}
    say(
        f"longest in {budget / 1e9:g} GB: base {longest['base']} tokens, ours {longest['ours']}, "
        f"{'at least ' if at_limit else ''}{ratio:.1f} times as many"
    )
    return {
        "budget_gb": budget / 1e9,
        "longest_tokens": longest,
        "ours_over_base": ratio,
        "is_at_least": at_limit,
        "tried": tried,
    } | settings


def free_memory() -> int | None:
    """Bytes that processes can still take without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def limit_memory(budget: int) -> None:
    """Let allocations fail that would take this process beyond `budget` resident bytes. (Linux; elsewhere only measured.)"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith(("VmData", "VmRSS"))}
    if len(sizes) == 2:
        # The limit counts what is reserved. What was reserved before now, and is not resident, is no part of the budget.
        limit = sizes["VmData"] + max(0, budget - sizes["VmRSS"])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def longest_child(arguments: str) -> dict[str, Any]:
    """Whether a step fits. `arguments`, as JSON: model, system ("ours" or "base"), tokens, budget, dtype, checkpointing,
    autocast, optimizer_step, segment_length, block_segments."""
    wanted = json.loads(arguments)
    limit_memory(wanted["budget"])
    torch.manual_seed(0)
    try:
        settings = {key: wanted[key] for key in ("segment_length", "block_segments")}
        ours, base = load_pair(wanted["model"], getattr(torch, wanted["dtype"]), "cpu", **settings)
        model = {"ours": ours, "base": base}[wanted["system"]].train()
        if wanted["checkpointing"]:
            checkpoint_activations(model)
        ids = torch.randint(model.config.vocab_size, (1, wanted["tokens"]))
        elapsed = seconds("cpu", train_step, model, ids, autocast=wanted["autocast"])
        if wanted["optimizer_step"]:
            torch.optim.AdamW(model.parameters(), lr=0.0).step()
    except InputError as error:
        return {"error": str(error)}
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(f"{type(error).__name__} {error}"):
            raise
        return {"fits": False, "why": "an allocation beyond the budget"}
    peak = peak_memory()
    if peak > wanted["budget"]:
        return {"fits": False, "why": f"peak {peak / 2**20:.0f} MB"}
    return {"fits": True, "peak_mb": peak / 2**20, "seconds": elapsed}


CHILDREN = {"memory": memory_child, "train-memory": train_memory_child, "longest": longest_child}

if __name__ == "__main__":
    print(json.dumps(CHILDREN[sys.argv[1]](*sys.argv[2:])))
