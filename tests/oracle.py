"""The oracle: the Llama decoder with Infini-attention (arXiv 2404.07143), one token at a time, in float64.

It is slow on purpose and shares no code with what it judges: plain torch, one row, no batch, no padding, no cache.
Nothing is detached and nothing is changed in place, so autograd gives the gradient of every parameter through the memory.
Everything is float64, the RMSNorm and the rotary angles included; Transformers computes these two in float32 even
inside a float64 model, so a comparison with it is only as tight as that.

Legend
    T  tokens of the row             N  segment length
    H  query heads                   K  key/value heads; query head h uses KV head h // (H / K)
    D  head dim                      C  hidden size
    q, k, v  query, key and value of one token and one head, (D,)
    M  matrix of the memory of one KV head, (D, D); rows belong to keys, columns to values
    z  normaliser of the memory of one KV head, (D,); with least squares, the Gram matrix of all its keys, (D, D)
    beta  gate of one query head, a scalar
    sigma = ELU + 1
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OracleResult", "oracle_forward"]


class OracleResult(NamedTuple):
    """What the row leaves behind; the memory is that of its last document and never contains the open segment."""

    logits: Tensor  # (T, vocabulary)
    matrix: Tensor  # (layers, K, D, D)
    normalizer: Tensor  # (layers, K, D); (layers, K, D, D) for least squares


@dataclass
class HeadState:
    """State of one KV head of one layer: the memory of the completed segments, and the tokens of the open one."""

    matrix: Tensor  # M
    normalizer: Tensor  # z
    keys: list[Tensor] = field(default_factory=list)
    rotated_keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    strengths: list[Tensor] = field(default_factory=list)  # how much each token counts; 1 without a write gate


def oracle_forward(
    parameters: dict[str, Tensor],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_layers: int,
    segment_length: int,
    memory_update: str,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-6,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> OracleResult:
    """Run one row of real tokens through the decoder.

    Args:
        parameters: float64 tensors, named as in the state dict of Transformers' `LlamaForCausalLM`, and for each layer
            `model.layers.{i}.self_attn.memory_gate.bias`, (H,), the beta of eq 10 (not needed for `"none"`). Biases
            are optional; without `lm_head.weight` the embedding is the head.
        memory_update: `"linear"`, `"delta"`, `"least_squares"`, or `"none"` (no memory, local attention only).
        input_ids: (T,) integers; either these or `inputs_embeds`.
        inputs_embeds: (T, C) float64.
        position_ids: (T,) integers, 0 ... T - 1 if absent. A position that does not increase starts a new document.
    """
    assert memory_update in ("linear", "delta", "least_squares", "none"), memory_update
    assert (input_ids is None) != (inputs_embeds is None), "give either input_ids or inputs_embeds"
    assert num_heads % num_kv_heads == 0
    assert all(parameter.dtype == torch.float64 for parameter in parameters.values())

    embedding = parameters["model.embed_tokens.weight"]
    if inputs_embeds is None:
        inputs_embeds = embedding[input_ids]
    assert inputs_embeds.dim() == 2 and inputs_embeds.dtype == torch.float64, "one row of T float64 embeddings"
    num_tokens = inputs_embeds.shape[0]
    positions = list(range(num_tokens)) if position_ids is None else position_ids.tolist()
    assert len(positions) == num_tokens

    def empty_state() -> HeadState:
        return HeadState(
            matrix=embedding.new_zeros(head_dim, head_dim),
            normalizer=embedding.new_zeros((head_dim,) * (2 if memory_update == "least_squares" else 1)),
        )

    def empty_layers() -> list[list[HeadState]]:
        return [[empty_state() for _ in range(num_kv_heads)] for _ in range(num_layers)]

    def commit(layers: list[list[HeadState]]) -> list[list[HeadState]]:
        return [[commit_segment(state, memory_update=memory_update) for state in layer] for layer in layers]

    layers = empty_layers()
    has_memory = False
    previous = None
    logits = []
    for embedded, position in zip(inputs_embeds, positions):
        # Where the token stands: in a new document, in a new segment, or in the open segment.
        if previous is not None and position <= previous:
            layers = empty_layers()
            has_memory = False
        elif previous is not None and position // segment_length != previous // segment_length:
            # Matters only where the positions jumped over the end of the old segment: elsewhere it is committed already.
            layers = commit(layers)
            has_memory = memory_update != "none"
        previous = position

        # The token goes through the decoder.
        hidden = embedded
        for i, states in enumerate(layers):
            prefix = f"model.layers.{i}"
            normed = rms_norm(hidden, parameters[f"{prefix}.input_layernorm.weight"], eps=rms_norm_eps)
            hidden = hidden + attention(
                normed,
                parameters,
                prefix=f"{prefix}.self_attn",
                states=states,
                num_heads=num_heads,
                head_dim=head_dim,
                angle_position=position % segment_length,
                rope_theta=rope_theta,
                has_memory=has_memory,
            )
            normed = rms_norm(hidden, parameters[f"{prefix}.post_attention_layernorm.weight"], eps=rms_norm_eps)
            hidden = hidden + mlp(normed, parameters, prefix=f"{prefix}.mlp")
        hidden = rms_norm(hidden, parameters["model.norm.weight"], eps=rms_norm_eps)
        logits.append(parameters.get("lm_head.weight", embedding) @ hidden)

        # The token was the last of its segment: the segment is complete.
        if position % segment_length == segment_length - 1:
            layers = commit(layers)
            has_memory = memory_update != "none"

    return OracleResult(
        logits=torch.stack(logits),
        matrix=torch.stack([torch.stack([state.matrix for state in states]) for states in layers]),
        normalizer=torch.stack([torch.stack([state.normalizer for state in states]) for states in layers]),
    )


def attention(
    hidden: Tensor,
    parameters: dict[str, Tensor],
    *,
    prefix: str,
    states: list[HeadState],
    num_heads: int,
    head_dim: int,
    angle_position: int,
    rope_theta: float,
    has_memory: bool,
) -> Tensor:
    """Infini-attention of one token, (C,) -> (C,); its key and value join the open segment in `states`."""
    queries = linear(hidden, parameters, name=f"{prefix}.q_proj").split(head_dim)
    keys = linear(hidden, parameters, name=f"{prefix}.k_proj").split(head_dim)
    values = linear(hidden, parameters, name=f"{prefix}.v_proj").split(head_dim)
    assert len(queries) == num_heads and len(keys) == len(values) == len(states)

    strengths = [torch.ones((), dtype=hidden.dtype) for _ in states]
    if f"{prefix}.write_gate.weight" in parameters:
        strengths = torch.sigmoid(linear(hidden, parameters, name=f"{prefix}.write_gate")).unbind()

    for state, key, value, strength in zip(states, keys, values, strengths):
        state.strengths.append(strength)
        state.keys.append(key)
        state.rotated_keys.append(rotate(key, position=angle_position, theta=rope_theta))
        state.values.append(value)

    outputs = []
    for h, query in enumerate(queries):
        state = states[h // (num_heads // len(states))]
        rotated_query = rotate(query, position=angle_position, theta=rope_theta)
        local = attend(rotated_query, state.rotated_keys, state.values)
        if has_memory:
            beta = parameters[f"{prefix}.memory_gate.bias"][h]
            if f"{prefix}.memory_gate.weight" in parameters:
                beta = beta + parameters[f"{prefix}.memory_gate.weight"][h] @ hidden / math.sqrt(len(hidden))
            gate = torch.sigmoid(beta)
            retrieved = unit(query) @ state.matrix if state.normalizer.dim() == 2 else retrieve(query, state)
            outputs.append(gate * retrieved + (1 - gate) * local)  # eq 10
        else:
            outputs.append(local)
    return linear(torch.cat(outputs), parameters, name=f"{prefix}.o_proj")


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Softmax attention of one query to all tokens of the open segment up to its own."""
    scores = torch.stack([query @ key for key in keys]) / math.sqrt(query.shape[0])
    weights = torch.softmax(scores, dim=0)  # eq 6
    return sum(weight * value for weight, value in zip(weights, values))  # eq 6


def retrieve(query: Tensor, state: HeadState) -> Tensor:
    """What the memory answers to a query (or, in the delta rule, to a key); 0 / 0 is 0."""
    denominator = sigma(query) @ state.normalizer
    if denominator == 0:
        return torch.zeros_like(query)
    return (sigma(query) @ state.matrix) / denominator  # eq 7


def commit_segment(state: HeadState, *, memory_update: str) -> HeadState:
    """Write the open segment into the memory. Every token sees the memory as it was before the segment."""
    matrix, normalizer = state.matrix, state.normalizer
    if memory_update == "least_squares" and state.keys:
        # W, the minimum of |V - K M'|^2 + 0.05 |M' - M|^2 for M' = M + W, as one linear system, and then filtered, three times.
        # The square of a token's difference counts as much as the square of its strength.
        keys, values = torch.stack([unit(key) for key in state.keys]), torch.stack(state.values)
        weights = torch.diag(torch.stack(state.strengths) ** 2)
        gram = keys.T @ weights @ keys
        inverse = torch.linalg.inv(gram + 0.05 * torch.eye(len(gram), dtype=gram.dtype))
        change = inverse @ keys.T @ weights @ (values - keys @ matrix)
        return HeadState(
            matrix=matrix + torch.linalg.matrix_power(inverse @ gram, 3) @ change, normalizer=normalizer + gram
        )
    for key, value, strength in zip(state.keys, state.values, state.strengths):
        if memory_update == "linear":
            matrix = matrix + strength * torch.outer(sigma(key), value)  # eq 8
            normalizer = normalizer + strength * sigma(key)  # eq 8
        if memory_update == "delta":
            matrix = matrix + strength * torch.outer(sigma(key), value - retrieve(key, state))  # eq 9
            normalizer = normalizer + strength * sigma(key)  # eq 8, which eq 9 leaves as it is
    return HeadState(matrix=matrix, normalizer=normalizer)


def unit(x: Tensor) -> Tensor:
    """The direction of sigma(x), of length 1."""
    return sigma(x) / sigma(x).norm()


def sigma(x: Tensor) -> Tensor:
    """ELU + 1. Below zero it is exp(x), which, unlike (exp(x) - 1) + 1, does not round to 0."""
    # The clamp keeps exp finite in the branch that `where` drops, whose gradient would be 0 * inf.
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def rotate(x: Tensor, *, position: int, theta: float) -> Tensor:
    """RoPE: dimensions j and j + D/2 are a point of the plane, turned by the angle position * theta^(-2j/D)."""
    half = x.shape[0] // 2
    angles = position * theta ** (-2 * torch.arange(half, dtype=x.dtype, device=x.device) / x.shape[0])
    first, second = x[:half], x[half:]
    return torch.cat(
        [
            first * torch.cos(angles) - second * torch.sin(angles),
            second * torch.cos(angles) + first * torch.sin(angles),
        ]
    )


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def mlp(x: Tensor, parameters: dict[str, Tensor], *, prefix: str) -> Tensor:
    gate = linear(x, parameters, name=f"{prefix}.gate_proj")
    silu = gate * torch.sigmoid(gate)
    return linear(silu * linear(x, parameters, name=f"{prefix}.up_proj"), parameters, name=f"{prefix}.down_proj")


def linear(x: Tensor, parameters: dict[str, Tensor], *, name: str) -> Tensor:
    product = parameters[f"{name}.weight"] @ x
    bias = parameters.get(f"{name}.bias")
    return product if bias is None else product + bias
