"""What a model costs on paper: memory, communication and time, from its config alone. `benchmark.py --plan` prints it.

Every number is an estimate of what the arithmetic must move and multiply, and a floor for what a machine will take: no
padding, no fragmentation, no launches, nothing that waits. `tests/test_planning.py` compares parameters, state, FLOPs and
activations with those of small models.

How the text is spread
    1 device    block after block through all layers, as the model does it; training keeps only the state before each block.
    n devices   n contiguous spans. A layer needs the memory at the start of a span, so the spans go through the model layer
                by layer, in blocks inside the layer, and the hidden states of a span are kept; training keeps them at every
                layer. Weights, gradients and optimizer are sharded, and gathered one layer at a time.
    full        the base Llama with full attention: a fused kernel, so no scores are kept; training checkpoints its layers.
                On n devices, ring attention over as many spans.

Letters: T tokens, L layers, E hidden size, F intermediate size, H query heads, K key/value heads, D head dim, N segment
length, V vocabulary, b bytes of a number of the model. The equations are those of arXiv 2404.07143.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.scripts.evaluation_report import table
from infini_llama.scripts.generate import InputError, one_line

__all__ = [
    "Device",
    "communication_bytes",
    "decode_bytes",
    "flops",
    "kv_cache_bytes",
    "layer_parameters",
    "parameters",
    "plan",
    "plan_table",
    "prefill_activation_bytes",
    "read_config",
    "saved_activation_bytes",
    "state_bytes",
    "training_flops",
]

STATE_ITEMSIZE = 4  # float32, whatever the model's dtype
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class Device(NamedTuple):
    """What one device does in a second.

    Fields:
        flops: multiplications and additions, FLOP/s.
        bandwidth: bytes read from its memory.
        link: bytes sent to other devices.
    """

    flops: float
    bandwidth: float
    link: float


def read_config(name: str, **settings: Any) -> InfiniLlamaConfig:
    """The config of a converted model or a plain Llama, as one of ours.

    Args:
        name: a folder, a `config.json`, or a Hub id.
        settings: fields to set, where they are not None.

    Raises:
        InputError: there is no such config, or it is not that of a Llama.
    """
    try:
        if Path(name).is_file():
            fields = json.loads(Path(name).read_text(encoding="utf-8"))
        else:
            fields, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model '{name}' has no config that can be read ({one_line(error)}): name a folder, a config.json or a Hub id"
        ) from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind not in ("llama", InfiniLlamaConfig.model_type):
        raise InputError(f"model '{name}' has the model_type {kind!r}: name a Llama or an InfiniLlama")
    left_out = ("model_type", "architectures", "auto_map", "transformers_version")
    fields = {key: value for key, value in fields.items() if key not in left_out}
    fields |= {key: value for key, value in settings.items() if value is not None}
    try:
        return InfiniLlamaConfig(**fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise InputError(f"model '{name}' has a config that does not fit ({one_line(error)}): correct it") from error


# Parameters and state


def layer_parameters(config: InfiniLlamaConfig) -> int:
    """Parameters of one layer: projections, MLP, two norms, a gate per query head, and read and write gates."""
    E, F = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    count = E * (2 * queries + 2 * keys) + 3 * E * F + 2 * E + config.num_attention_heads
    count += (queries + 2 * keys + E) * config.attention_bias
    count += (E + 1) * config.num_key_value_heads * config.write_gate
    count += E * config.num_attention_heads * config.read_gate
    return count + (2 * F + E) * config.mlp_bias


def parameters(config: InfiniLlamaConfig) -> int:
    """Parameters of the causal language model, tied ones once."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer_parameters(config) + config.hidden_size


def layer_memory_bytes(config: InfiniLlamaConfig) -> int:
    """M and z of one layer, K D (D + 1) float32; for `least_squares` two matrices, K D 2 D."""
    width = 2 * config.head_dim if config.memory_update == "least_squares" else config.head_dim + 1
    return config.num_key_value_heads * config.head_dim * width * STATE_ITEMSIZE


def state_bytes(config: InfiniLlamaConfig, filled: int, itemsize: int) -> dict[str, int]:
    """What `InfiniCache.nbytes` counts for one row.

    Args:
        config: of the model.
        filled: tokens in the open segment, at most N.
        itemsize: b.

    Returns:
        Bytes of `memory`, of `pending` (what the open segment will add to it) and of the `open_segment`'s keys and values.
    """
    memory = config.num_hidden_layers * layer_memory_bytes(config) * (config.memory_update != "none")
    return {"memory": memory, "pending": memory, "open_segment": kv_cache_bytes(config, filled, itemsize)}


def kv_cache_bytes(config: InfiniLlamaConfig, tokens: int, itemsize: int) -> int:
    """Keys and values of this many tokens in all layers, 2 L K D b each."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize * tokens


# Arithmetic


def flops(
    config: InfiniLlamaConfig, tokens: int, *, logits: int = 1, full: bool = False, fused: bool = True
) -> dict[str, int]:
    """Floating point operations of the matrix products of a forward pass over one text; a multiply-add is two.

    Args:
        config: of the model.
        tokens: T.
        logits: tokens whose logits are computed.
        full: the base Llama with full attention, without memory.
        fused: attention skips the pairs that causality forbids. False: as `eager` attention, all pairs.

    Returns:
        `projections` (and MLP), `attention`, `read`, `write` of all layers, and `head`.
    """
    E, D, N = config.hidden_size, config.head_dim, config.segment_length
    H, K, L = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    segment = tokens if full else N
    segments, rest = divmod(tokens, segment)
    pairs = sum(count * (n * (n + 1) // 2 if fused else n * n) for count, n in ((segments, segment), (1, rest)))
    read = write = 0
    if not full and config.memory_update != "none":
        read = tokens * H * (2 * D * D + 2 * D)  # eq 7, and its denominators
        write = tokens * K * 2 * D * D  # eq 8
        if config.memory_update == "delta":
            # sigma(K) z, sigma(K)^T R, and the D x D map of each segment, see `memory_infini.scan`.
            write += tokens * K * (2 * D + 2 * D * D) + segments * K * 2 * D**3
        if config.memory_update == "least_squares":
            # No denominators; K^T K, for the normalizer and for the map. Of each segment the map, an inverse, F, and four
            # products with C and A.
            read = tokens * H * 2 * D * D
            write += tokens * K * 4 * D * D + segments * K * (2 + 2 + 2 + 4 * 4) * D**3
    layer = {
        "projections": tokens * 2 * (E * D * (2 * H + 2 * K) + 3 * E * config.intermediate_size),
        "attention": pairs * H * 4 * D,  # eq 6: scores, and the values they weigh
        "read": read,
        "write": write,
    }
    return {name: L * value for name, value in layer.items()} | {"head": logits * 2 * config.vocab_size * E}


def training_flops(
    config: InfiniLlamaConfig, tokens: int, *, recomputed: float, full: bool = False, fused: bool = True
) -> int:
    """Floating point operations of a training step over one text, without the optimizer's.

    The backward pass takes two matrix products for each one of the forward pass; fused attention five for two, because it
    computes the scores again.

    Args:
        config, tokens, full, fused: as for `flops`.
        recomputed: share of the forward pass that checkpoints run a second time.
    """
    forward = flops(config, tokens, logits=tokens, full=full, fused=fused)
    extra = forward["attention"] / 2 if fused else 0
    return round(sum(forward.values()) * (3 + recomputed) + extra)


def decode_bytes(
    config: InfiniLlamaConfig, keys: int, itemsize: int, *, full: bool = False, weights: int | None = None
) -> dict[str, int]:
    """What the memory of the device must move for one more token.

    Args:
        config: of the model.
        keys: of how many tokens keys and values are kept: those of the open segment, or with `full` of the whole context.
        itemsize: b.
        full: the base Llama with full attention.
        weights: bytes of weights, if they are not `parameters` times b.

    Returns:
        Bytes of `weights` (of the embedding one row is read, unless the head is tied to it), `state` (the memory
        is read; what tokens write waits for one write of many) and `keys_and_values`.
    """
    untied = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * itemsize
    weights = parameters(config) * itemsize if weights is None else weights
    state = 0 if full else state_bytes(config, 0, itemsize)["memory"]
    return {
        "weights": weights - untied,
        "state": state,
        "keys_and_values": kv_cache_bytes(config, keys, itemsize),
    }


# Activations


def prefill_activation_bytes(config: InfiniLlamaConfig, tokens: int, itemsize: int, *, full: bool = False) -> int:
    """The most that is alive at once while this many tokens go through a layer without gradients, hidden states included.

    Args:
        config: of the model.
        tokens: that go through it together, a block.
        itemsize: b.
        full: the base Llama.
    """
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    # The input of the layer and its norm. The base Llama holds on to the embeddings as well.
    held = itemsize * (3 * E if full else 2 * E) + itemsize * 2 * D + 8
    # What attention has added to the input; gate, up, and their product.
    mlp = held + itemsize * (E + 3 * F)
    # Queries, keys and values before and after rotation, the output.
    attention = held + itemsize * (3 * queries + 3 * keys)
    if full or config.memory_update == "none":
        return tokens * max(mlp, attention)
    segments = math.ceil(tokens / config.segment_length)
    matrices = layer_memory_bytes(config)
    # sigma(K), values, what the keys read with or unit keys; of each segment C, A, and the memory at its start, which is
    # stacked. `least_squares` commits them all at once: C and A side by side before and after, what they are multiplied by.
    wide, per_segment = {"linear": (2, 3), "delta": (3, 4), "least_squares": (3, 6.5)}[config.memory_update]
    write = STATE_ITEMSIZE * keys * wide * tokens + round(segments * matrices * per_segment)
    # sigma(Q), g A_mem, A_local in float32, and their mix.
    read = STATE_ITEMSIZE * 4 * queries * tokens + segments * matrices
    return max(tokens * mlp, tokens * attention + max(write, read))


def layer_saved_bytes(config: InfiniLlamaConfig, tokens: int, itemsize: int, *, full: bool = False) -> int:
    """What one layer keeps of this many tokens for its backward pass."""
    F, D = config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    norms = 2 * norm_saved_bytes(config, itemsize)
    # Rotated queries and keys, values, output; log of the sums of the softmax.
    attention = itemsize * D * (2 * H + 2 * K) + 4 * H
    per_segment = 0
    if not full:
        attention += itemsize * D * H  # in the order of the tokens, it is another tensor than in that of the segments
    if not full and config.memory_update != "none":
        attention += STATE_ITEMSIZE * D * (2 * H + 2 * K)  # sigma(Q), what it reads; sigma(K), values
        attention += STATE_ITEMSIZE * D * H * (itemsize < STATE_ITEMSIZE)  # A_local in float32
        attention += 13 * H  # denominators
        per_segment = layer_memory_bytes(config)  # the memory at its start
        if config.memory_update == "delta":
            attention += STATE_ITEMSIZE * D * K + 9 * K  # what the keys read with, and denominators
            per_segment *= 3  # the map A, and M once more where it is multiplied by A
        if config.memory_update == "least_squares":
            attention += STATE_ITEMSIZE * D * K  # unit keys beside those of sigma
            # That, and what it is committed with: C and A before, between and after four products, (K^T K + r)^-1, F, K^T K.
            per_segment = per_segment * 15 // 2
    mlp = itemsize * 4 * F
    segments = math.ceil(tokens / config.segment_length)
    return tokens * (norms + attention + mlp) + segments * per_segment


def norm_saved_bytes(config: InfiniLlamaConfig, itemsize: int) -> int:
    """Of one token: the input in float32, the factor, the normalised input, and the output, which a projection reads."""
    return config.hidden_size * (4 + 2 * itemsize) + 4


def head_saved_bytes(config: InfiniLlamaConfig, tokens: int, itemsize: int) -> int:
    """Norm, LM head and loss: the largest tensor is the float32 log-softmax."""
    return tokens * (norm_saved_bytes(config, itemsize) + 4 * config.vocab_size + 8)


def saved_activation_bytes(config: InfiniLlamaConfig, tokens: int, itemsize: int, *, full: bool = False) -> int:
    """What this many tokens keep for the backward pass in all layers, LM head and loss included, without checkpoints.

    Args:
        config: of the model.
        tokens: of a block.
        itemsize: b, of a model in this dtype without autocast.
        full: the base Llama.
    """
    layers = config.num_hidden_layers * layer_saved_bytes(config, tokens, itemsize, full=full)
    rotary = tokens * 2 * config.head_dim * itemsize + tokens * 8  # cosines and sines, ids
    return layers + head_saved_bytes(config, tokens, itemsize) + rotary


# Communication


def communication_bytes(
    config: InfiniLlamaConfig, tokens: int, devices: int, itemsize: int, training: bool = False
) -> dict[str, int]:
    """What one device sends for one layer and one text, of which each device has a contiguous span.

    Args:
        config: of the model.
        tokens: of the whole text.
        devices: n.
        itemsize: b.
        training: forward and backward pass; a checkpointed layer repeats the forward pass. False: forward alone.

    Returns:
        `ours`: what its span does to the memory, to each of the others (an all-gather, from which every device computes the
        state before its span). `linear` adds to M and z: K (D D + D) float32. `delta` maps M to C - A M + M, and adds to z:
        K (2 D D + D), and `least_squares` has D D in place of D. Backward come the gradients of M and of z, which K^T K has
        none of. None depends on T.
        `ring`: the keys and values of its span, n - 1 times around the ring: 2 K D b T / n each time; backward they go
        once more, with their gradients.
    """
    K, D = config.num_key_value_heads, config.head_dim
    forward = {"none": 0, "linear": D * D + D, "delta": 2 * D * D + D, "least_squares": 3 * D * D}
    backward = {"none": 0, "linear": D * D + D, "delta": D * D + D, "least_squares": D * D}
    numbers = forward[config.memory_update] + training * backward[config.memory_update]
    ring = (1 + 2 * training) * 2 * K * D * itemsize * math.ceil(tokens / devices)
    return {"ours": (devices - 1) * STATE_ITEMSIZE * K * numbers, "ring": (devices - 1) * ring}


# The plan


def plan(config: InfiniLlamaConfig, length: int, devices: int, dtype: str, device: Device) -> dict[str, Any]:
    """Memory of each device, communication and time for one text; see the head of this file for how it is spread.

    Args:
        config: of the model.
        length: T.
        devices: n.
        dtype: of weights and activations. Training in bfloat16 or float16 has float32 master weights beside them.
        device: what each of them does in a second.

    Returns:
        `memory`: bytes of each device for `prefill` and `training`, `ours` and `full`, by what they hold, with `total`.
        `communication`: bytes that a device sends. `flops`: of all devices together. `seconds`: FLOPs at the given rate and
        bytes at the given bandwidths.
    """
    b, L, E = ITEMSIZE[dtype], config.num_hidden_layers, config.hidden_size
    span = math.ceil(length / devices)
    block = min(config.block_length, span)
    blocks = math.ceil(span / block)
    count = parameters(config)
    spread = devices > 1
    gathered = max(layer_parameters(config), config.vocab_size * E) * b if spread else 0
    weights = {"weights": count * b // devices, "gathered weights": gathered}

    state = state_bytes(config, min(length, config.segment_length), b)
    prefill = {
        "ours": weights
        | {"memory and pending": state["memory"] + state["pending"], "keys and values": state["open_segment"]}
        | {
            "activations": prefill_activation_bytes(config, block, b),
            "hidden states": span * E * b if spread else 0,
        },
        "full": weights
        | {"memory and pending": 0, "keys and values": kv_cache_bytes(config, span, b)}
        | {"activations": prefill_activation_bytes(config, span, b, full=True), "hidden states": 0},
    }

    optimizer = {
        "gradients": count * b // devices,
        # AdamW: two moments, and master weights where the model's own are too coarse for its steps.
        "optimizer": count * (8 + (4 if b < 4 else 0)) // devices,
    }
    if spread:
        working = max(layer_saved_bytes(config, block, b), head_saved_bytes(config, block, b))
        kept = blocks * 2 * layer_memory_bytes(config) * (config.memory_update != "none")
    else:
        working = saved_activation_bytes(config, block, b)
        kept = (blocks - 1) * (state["memory"] + state["pending"])
    checkpoints = L * span * E * b
    whole = max(layer_saved_bytes(config, span, b, full=True), head_saved_bytes(config, span, b))
    training = {
        "ours": weights
        | optimizer
        | {"activations": working, "states before blocks": kept, "hidden states": checkpoints if spread else 0},
        "full": weights | optimizer | {"activations": whole, "states before blocks": 0, "hidden states": checkpoints},
    }
    for rows in (prefill, training):
        for column in rows.values():
            column["total"] = sum(column.values())

    per_layer = communication_bytes(config, length, devices, b)
    shards = count * b * (devices - 1) // devices
    communication = {
        "per layer": per_layer,
        "prefill": {name: L * value for name, value in per_layer.items()},
        "training": {
            name: L * value for name, value in communication_bytes(config, length, devices, b, training=True).items()
        },
        # Gathered for forward and backward, and gradients scattered.
        "weights": {"prefill": shards, "training": 3 * shards},
    }
    work = {
        "prefill": {
            "ours": sum(flops(config, length).values()),
            "full": sum(flops(config, length, full=True).values()),
        },
        "training": {
            # The last block of one device keeps its activations.
            "ours": training_flops(config, length, recomputed=1.0 if spread else (blocks - 1) / blocks),
            "full": training_flops(config, length, recomputed=1.0, full=True),
        },
    }
    moved = {
        "ours": decode_bytes(config, config.segment_length // 2, b),
        "full": decode_bytes(config, length, b, full=True),
    }
    seconds: dict[str, dict[str, float]] = {
        task: {name: value / (devices * device.flops) for name, value in row.items()} for task, row in work.items()
    }
    seconds["decode"] = {name: sum(row.values()) / (devices * device.bandwidth) for name, row in moved.items()}
    for task in work:
        sent = communication["weights"][task]
        seconds[f"{task} communication"] = {
            "ours": (communication[task]["ours"] + sent) / device.link,
            "full": (communication[task]["ring"] + sent) / device.link,
        }
    return {
        "length": length,
        "devices": devices,
        "dtype": dtype,
        "memory_update": config.memory_update,
        "segment_length": config.segment_length,
        "block_length": config.block_length,
        "parameters": count,
        "device": device._asdict(),
        "memory": {"prefill": prefill, "training": training},
        "communication": communication,
        "flops": work,
        "decode_bytes": moved,
        "seconds": seconds,
    }


def bytes_text(count: float) -> str:
    """In decimal units: 16.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def seconds_text(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 600 else f"{value / 3600:,.3g} h"


def plan_table(content: dict[str, Any]) -> str:
    """Markdown of what `plan` returned: ours beside full attention."""
    n, device = content["devices"], content["device"]
    lines = [
        f"{content['length']:,} tokens, {n} device{'s' if n > 1 else ''}, {content['dtype']}, "
        f"{content['parameters']:,} parameters, {content['memory_update']}, N = {content['segment_length']}, blocks of "
        f"{content['block_length']} tokens. Estimates: {device['flops']:.3g} FLOP/s, {device['bandwidth']:.3g} bytes/s from "
        f"memory and {device['link']:.3g} bytes/s between devices are taken as given, and nothing waits for anything.",
    ]
    rows = []
    for task, columns in content["memory"].items():
        for name in columns["ours"]:
            values = [columns[system][name] for system in ("ours", "full")]
            if any(values):
                rows.append([f"{task}, memory of a device: {name}", *(bytes_text(x) if x else "" for x in values)])
    sent = content["communication"]
    if n > 1:
        values = sent["per layer"]
        rows.append(["a device sends for one layer, forward", bytes_text(values["ours"]), bytes_text(values["ring"])])
        for task, share in sent["weights"].items():
            values = sent[task]
            rows.append(
                [f"{task}, a device sends for attention", bytes_text(values["ours"]), bytes_text(values["ring"])]
            )
            rows.append([f"{task}, a device sends of sharded weights", bytes_text(share), bytes_text(share)])
    for task, values in content["flops"].items():
        rows.append([f"{task}, FLOPs", f"{values['ours']:.3g}", f"{values['full']:.3g}"])
    for task, values in content["seconds"].items():
        if any(values.values()):
            name = "decode, a token" if task == "decode" else f"{task}, time"
            rows.append([name, seconds_text(values["ours"]), seconds_text(values["full"])])
    return "\n\n".join([*lines, table(["estimated", "ours", "full attention"], rows)])
