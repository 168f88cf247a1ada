"""The compressive memory of Infini-attention (arXiv 2404.07143), as pure functions of tensors.

The memory of a KV head is a matrix M and a normalizer z. Queries read from it, keys and values are written into it, and
neither carries rotary positions. All of it is computed and kept in float32, whatever the dtype of the model.

Legend, used as suffix of names and in shapes:
    B batch, or any number of rows that share nothing        S segments
    K key/value heads                                        G query heads per key/value head
    N tokens of a segment                                    D head dim (key side), V head dim (value side)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = [
    "WRITE_RULES",
    "MemoryState",
    "commit",
    "float_rows",
    "inverse_denominator",
    "mix",
    "open_gate",
    "read",
    "read_token",
    "scan",
    "sigma",
    "write",
]


class MemoryState(NamedTuple):
    """What a layer remembers: everything, in a size that does not depend on how much there was.

    Attributes:
        matrix: (..., K, D, V) float32, M in the paper.
        normalizer: (..., K, D) float32, z in the paper; (..., K, D, D) for `least_squares`. All zero for a memory that
            nothing was written into.
    """

    matrix: torch.Tensor
    normalizer: torch.Tensor

    @classmethod
    def zeros(cls, rule: str, keys: torch.Tensor, values: torch.Tensor) -> "MemoryState":
        """An empty memory for keys (B, ..., K, D) and values (B, ..., K, V): float32 (float64 for float64 keys)."""
        batch_size, num_heads, head_dim = keys.shape[0], *keys.shape[-2:]
        dtype = torch.promote_types(keys.dtype, torch.float32)
        matrix = torch.zeros(batch_size, num_heads, head_dim, values.shape[-1], dtype=dtype, device=keys.device)
        return cls(matrix, WRITE_RULES[rule].normalizer(torch.zeros_like(matrix.mT)))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MemoryState":
        """Apply `function` to both tensors."""
        return MemoryState(function(self.matrix), function(self.normalizer))

    def add(self, other: "MemoryState", where: torch.Tensor | None = None) -> "MemoryState":
        """The sum of two states; with `where`, a bool tensor (B,), only in its rows."""
        if where is not None:
            other = other.masked(where)
        return MemoryState(self.matrix + other.matrix, self.normalizer + other.normalizer)

    def masked(self, where: torch.Tensor) -> "MemoryState":
        """The state in the rows of `where`, a bool tensor (B,), and an empty memory in the others."""
        return self.map(lambda x: x * where.view(-1, *[1] * (x.dim() - 1)))


def float_rows(x: torch.Tensor) -> torch.Tensor:
    """x in float32 (float64 stays), contiguous, by at most one copy."""
    return x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format).contiguous()


def _sigma(x: torch.Tensor) -> torch.Tensor:
    rows = float_rows(x)
    exponential = rows.clamp(min=-40, max=0).exp_()
    # A large tensor costs more to allocate than to compute, so a copy is overwritten.
    is_copy = rows.dtype != x.dtype or not x.is_contiguous()
    return exponential.add_(rows.relu_() if is_copy else rows.relu())


class _Sigma(torch.autograd.Function):
    """Autograd's own derivative of the formula above takes four times as long."""

    forward = staticmethod(_sigma)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return (gradient * y.clamp(max=1)).to(ctx.dtype)  # 1 above 0, exp(x) below


def sigma(x: torch.Tensor) -> torch.Tensor:
    """The feature map ELU + 1, in float32 (float64 stays), contiguous.

    Written as exp(min(x, 0)) + max(x, 0), which stays positive where (exp(x) - 1) + 1 would have rounded to 0. It ends at
    exp(-40) = 4e-18: what is divided by is a product of two of them, and float32 ends at 1e-38.
    """
    return _Sigma.apply(x) if torch.is_grad_enabled() and x.requires_grad else _sigma(x)


def inverse_denominator(sigma_x: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
    """1 / (sigma(x) z), for equations 7 and 9; 0 where sigma(x) z is 0.

    Args:
        sigma_x: (..., N, D).
        normalizer: (..., D).

    Returns:
        (..., N, 1).
    """
    if not torch.is_grad_enabled():  # in few operations
        return (sigma_x @ normalizer.unsqueeze(-1)).reciprocal_().nan_to_num_(nan=torch.nan, posinf=0.0)
    # z in units of its largest entry: the derivative squares the denominator, and float32 ends at 1e-38.
    unit = normalizer.detach().amax(-1, keepdim=True).unsqueeze(-1)
    unit = torch.where(unit > 0, unit, 1)
    denominator = sigma_x @ (normalizer.unsqueeze(-1) / unit)
    return torch.where(denominator > 0, denominator, torch.inf).reciprocal() / unit


def open_gate(beta: torch.Tensor, memory: MemoryState) -> torch.Tensor:
    """sigmoid(beta) of equation 10; 0 while the memory is empty, so that A_local alone is left.

    Args:
        beta: (K, 1, G), one per query head, or (B, K, N, G), one per token.
        memory: (B, K, ...).

    Returns:
        (B, K, 1 or N, G, 1).
    """
    is_written = memory.normalizer.flatten(2).sum(-1) > 0  # (B, K)
    gate = torch.sigmoid(beta.to(memory.normalizer.dtype))
    return gate.unsqueeze(-1) * is_written[:, :, None, None, None]


def read(rule: str, sigma_q: torch.Tensor, memory: MemoryState, gate: torch.Tensor | None = None) -> torch.Tensor:
    """A_mem = sigma(Q) M / (sigma(Q) z), equation 7, times `gate`. Nothing is read (0) from an empty memory.

    The query heads of a group read the memory of their key/value head, as further rows of one matrix product.

    Args:
        rule: a key of `WRITE_RULES`, the one that wrote the memory.
        sigma_q: (B, K, N, G, D).
        memory: matrix (B, K, D, V), and its normalizer.
        gate: (B, K, 1 or N, G, 1), a factor of A_mem; it costs least here, beside the denominators.

    Returns:
        (B, K, N, G, V).
    """
    rows = sigma_q.flatten(2, 3)  # (B, K, NG, D)
    scale = WRITE_RULES[rule].reading_scale(rows, memory.normalizer).unflatten(2, sigma_q.shape[2:4])
    if gate is not None:
        scale = scale * gate
    return (rows @ memory.matrix).unflatten(2, sigma_q.shape[2:4]) * scale  # eq 7


def mix(gate: torch.Tensor, local: torch.Tensor, gated_memory: torch.Tensor) -> torch.Tensor:
    """A = sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_local, equation 10.

    Args:
        gate: (..., 1), from `open_gate`.
        local: (..., V) in any dtype.
        gated_memory: (..., V) float32, sigmoid(beta) A_mem: what `read` gives with this gate.

    Returns:
        (..., V) float32.
    """
    return torch.addcmul(gated_memory, 1 - gate, local.to(gated_memory.dtype))  # eq 10


class Linear:
    """Equation 8: M += sigma(K)^T V, z += sigma(K).

    A rule says what keys and queries are, how they read, and how a full segment enters the memory. What a segment makes of M
    has to be affine in M: that is what makes segments parallel (see `scan`).
    """

    @staticmethod
    def features(sigma_x: torch.Tensor) -> torch.Tensor:
        """What stands for sigma(K) wherever it is written: (..., N, D) as it is."""
        return sigma_x

    @staticmethod
    def weigh(
        sigma_k: torch.Tensor, values: torch.Tensor, strength: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (..., N, D) and values of tokens that count as much as `strength` (..., N, 1) says, from 0 to 1."""
        return sigma_k * strength, values

    @staticmethod
    def normalizer(sigma_k: torch.Tensor) -> torch.Tensor:
        """What keys (..., N, D) add to the normalizer: z, (..., D)."""
        return sigma_k.sum(-2)  # eq 8

    @staticmethod
    def reading_scale(sigma_q: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
        """What sigma(Q) M is multiplied by, for each of the queries (..., N, D): (..., N, 1)."""
        return inverse_denominator(sigma_q, normalizer)  # eq 7

    @staticmethod
    def reading_keys(sigma_k: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor | None:
        """R (..., N, D): what is written is V - R M. None: the values as they are, whatever is bound to the keys."""
        return None

    @staticmethod
    def commit(
        normalizer: torch.Tensor, *sums: torch.Tensor, where: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """What segments that are full make of sums (..., D, any) over their tokens, whose keys add `normalizer`.

        With `where`, bool of the first dimensions, the others leave theirs as they are.
        """
        return sums


class Delta(Linear):
    """Equation 9 writes what is new in the values: M += sigma(K)^T (V - sigma(K) M / (sigma(K) z)); z as in equation 8."""

    @staticmethod
    def reading_keys(sigma_k, normalizer):
        return sigma_k * inverse_denominator(sigma_k, normalizer)


class LeastSquares(Linear):
    """Not in the paper. The change of M that explains the segment best for its size, as far as the keys speak for it:

        M += F^3 (K^T K + r)^-1 K^T (V - K M)        F = (K^T K + r)^-1 K^T K

    with unit keys K = sigma(K) / |sigma(K)|, and A_mem = Q M with unit queries. Without F, the sum is where |V - K M'|^2 +
    r |M' - M|^2 is least. F is nearly 1 in directions that the keys take, and nearly 0 in those that they hardly touch. There
    every segment would write a little, and forget a little of what was there, and thousands of segments add that up.

    In the paper's rules each repetition of a text adds to M and z, until what was written once is too small a part of what
    is read. Here a repetition has nothing new and changes nothing, and what was written once stays as it was in the part of
    its key that is orthogonal to later keys. The normalizer is K^T K.
    """

    # Where the squares of the unit keys add up to L in a direction, (L / (L + r))^4 of what is new there is written: 2/3 for
    # L = 0.5, and less than a part in a million for L = 0.0015. So the power says for how many segments the memory lasts.
    RIDGE, POWER = 0.05, 3

    @staticmethod
    def features(sigma_x):
        return sigma_x * LeastSquares.reading_scale(sigma_x)  # 0 stays 0

    @staticmethod
    def weigh(sigma_k, values, strength):
        return sigma_k * strength, values * strength  # weighted squares: both sides of V - K M

    @staticmethod
    def normalizer(sigma_k):
        return sigma_k.mT @ sigma_k

    @staticmethod
    def reading_scale(sigma_q, normalizer=None):
        return (sigma_q.square().sum(-1, keepdim=True) + 1e-30).rsqrt()

    @staticmethod
    def reading_keys(sigma_k, normalizer):
        return sigma_k

    @staticmethod
    def commit(normalizer, *sums, where=None):
        ridge = LeastSquares.RIDGE * torch.eye(normalizer.shape[-1], dtype=normalizer.dtype, device=normalizer.device)
        # Not by a Cholesky factor, whose gradient costs several times as much as this one's two products.
        inverse = torch.linalg.inv(normalizer + ridge)
        joined = torch.cat(sums, dim=-1)
        share, solved = inverse @ normalizer, inverse @ joined
        for _ in range(LeastSquares.POWER):  # not their product first, which would round a hundred times coarser
            solved = share @ solved
        if where is not None:
            solved = torch.where(where[(...,) + (None,) * (solved.dim() - where.dim())], solved, joined)
        return solved.split([x.shape[-1] for x in sums], dim=-1)


WRITE_RULES: dict[str, type[Linear]] = {"linear": Linear, "delta": Delta, "least_squares": LeastSquares}
"""How a memory is written and read, by the name in `config.memory_update`."""


def write(
    rule: str,
    sigma_k: torch.Tensor,
    values: torch.Tensor,
    memory: MemoryState,
    strength: torch.Tensor | None = None,
) -> MemoryState:
    """What tokens of one segment add to the memory that the segment started with, equations 8 and 9; see `commit`.

    All rules add up inside a segment, so the tokens may come in any number of calls.

    Args:
        rule: a key of `WRITE_RULES`.
        sigma_k: (B, K, N, D); rows of tokens that are not to be written are 0.
        values: (B, K, N, V) in any dtype.
        memory: the memory at the start of the segment.
        strength: (B, K, N, 1), how much each token counts, from 0 to 1. None: 1.

    Returns:
        The increment, in the shapes of `memory`.
    """
    sigma_k, values = WRITE_RULES[rule].features(sigma_k), values.to(sigma_k.dtype)
    if strength is not None:
        sigma_k, values = WRITE_RULES[rule].weigh(sigma_k, values, strength)
    reading_keys = WRITE_RULES[rule].reading_keys(sigma_k, memory.normalizer)
    if reading_keys is not None:
        values = values - reading_keys @ memory.matrix
    return MemoryState(sigma_k.mT @ values, WRITE_RULES[rule].normalizer(sigma_k))  # eq 8, eq 9


def commit(rule: str, pending: MemoryState) -> MemoryState:
    """What the memory grows by when a segment is full, and `pending` is what all of its tokens have added."""
    (matrix,) = WRITE_RULES[rule].commit(pending.normalizer, pending.matrix)
    return MemoryState(matrix, pending.normalizer)


def read_token(
    rule: str, sigma_q: torch.Tensor, local: torch.Tensor, beta: torch.Tensor, memory: MemoryState
) -> torch.Tensor:
    """What `read` and `mix` do, for one token of each row, without gradient, where no memory is empty.

    So little is computed for one token that the number of operations is what decoding pays for.

    Args:
        rule: a key of `WRITE_RULES`.
        sigma_q: (B, K, G, D).
        local: (B, K, G, V) in any dtype, A_local.
        beta: (1 or B, K, G).
        memory: of (B, K, ...).

    Returns:
        A (B, K, G, V) float32.
    """
    sigma_q = WRITE_RULES[rule].features(sigma_q.flatten(0, 1))
    bound = torch.bmm(sigma_q, memory.matrix.flatten(0, 1))
    if memory.normalizer.dim() == 3:  # z
        denominator = torch.bmm(sigma_q, memory.normalizer.view(-1, sigma_q.shape[-1], 1))
        bound.div_(denominator.clamp_min_(torch.finfo(bound.dtype).tiny))  # eq 7; 0 where it is 0, as for `read`
    gate = torch.sigmoid(beta.to(bound.dtype)).unsqueeze(-1)
    return torch.lerp(local.to(bound.dtype), bound.view_as(local), gate)  # eq 10


def scan(
    rule: str,
    sigma_k: torch.Tensor,
    values: torch.Tensor,
    memory: MemoryState,
    pending: MemoryState,
    *,
    restarts: torch.Tensor | None = None,
    completes: torch.Tensor | None = None,
    relay: Callable[..., torch.Tensor] | None = None,
    strength: torch.Tensor | None = None,
) -> tuple[MemoryState, MemoryState, MemoryState]:
    """Write S consecutive segments, with everything that is large computed for all of them at once.

    With C = sigma(K)^T V and A = sigma(K)^T R (R from the rule, known once the prefix sums of z are), a segment maps
    M to M + C - A M, once the rule has committed C and A. What runs segment after segment is only that D x D map. The S
    segments together are such a map too.

    Args:
        rule: a key of `WRITE_RULES`.
        sigma_k: (B, S, K, N, D); rows of slots that hold no new token are 0.
        values: (B, S, K, N, V) in any dtype.
        memory: the memory at the start of the first segment.
        pending: what earlier tokens of the first segment, which are not in `sigma_k`, have added.
        restarts: (B, S) bool, segments that begin a new document, with an empty memory. None: no segment does.
        completes: (B, S) bool, segments that are full, or followed by another one of their document. None: all are.
        relay: where these segments follow others that are elsewhere: given what these make of `memory`, and the factor of
            M if it has one, it returns what to start with instead. See `parallel_infini`.
        strength: (B, S, K, N, 1), as for `write`.

    Returns:
        The memory at the start of each segment, (B, S, K, ...); the memory after the last completed segment; and what
        the segment that stayed open has added so far (0 where none did).
    """
    write_rule = WRITE_RULES[rule]
    sigma_k, values = write_rule.features(sigma_k), values.to(sigma_k.dtype)
    if strength is not None:
        sigma_k, values = write_rule.weigh(sigma_k, values, strength)
    sums_C = sigma_k.mT @ values  # (B, S, K, D, V)
    sums_z = write_rule.normalizer(sigma_k)  # (B, S, K, D), or as the rule has it
    # What is pending has been read for already: it joins the sums of the first segment, and not its A.
    sums_C[:, 0] += pending.matrix
    sums_z[:, 0] += pending.normalizer
    num_segments = sigma_k.shape[1]

    def run(
        state: torch.Tensor, increment: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        trailing = [1] * (state.dim() - 1)
        starts, still_open = [], torch.zeros_like(state)
        for s in range(num_segments):
            if restarts is not None:
                state = state.masked_fill(restarts[:, s].view(-1, *trailing), 0)
            starts.append(state)
            added = increment(s, state)
            if completes is None:
                state = state + added
            else:
                complete = completes[:, s].view(-1, *trailing)
                state = state + added.masked_fill(~complete, 0)
                # A row's later segments, if it has any, hold no token and leave this alone; a segment followed by
                # another document is marked complete, into a memory that the restart then empties.
                still_open = still_open + added.masked_fill(complete, 0)
        return torch.stack(starts, dim=1), state, still_open

    def add_z(s: int, z: torch.Tensor) -> torch.Tensor:
        return sums_z[:, s]  # eq 8

    start_z = memory.normalizer
    if relay is not None:
        start_z = relay(run(start_z, add_z)[1])
    starts_z, last_z, open_z = run(start_z, add_z)

    reading_keys = write_rule.reading_keys(sigma_k, starts_z)
    maps_A = []  # none or one: what a rule commits like C
    if reading_keys is not None:
        maps_A = [sigma_k.mT @ reading_keys]  # (B, S, K, D, D)
    sums_C, *maps_A = write_rule.commit(sums_z, sums_C, *maps_A, where=completes)

    def add_M(s: int, M: torch.Tensor) -> torch.Tensor:
        return sums_C[:, s] - maps_A[0][:, s] @ M if maps_A else sums_C[:, s]  # eq 8, eq 9

    start_M = memory.matrix
    if relay is not None:
        carry = None
        if maps_A:
            identity = torch.eye(maps_A[0].shape[-1]).to(maps_A[0]).expand_as(maps_A[0][:, 0])
            carry = run(identity, lambda s, P: -maps_A[0][:, s] @ P)[1]
        start_M = relay(run(start_M, add_M)[1], carry)
    starts_M, last_M, open_M = run(start_M, add_M)
    return MemoryState(starts_M, starts_z), MemoryState(last_M, last_z), MemoryState(open_M, open_z)
