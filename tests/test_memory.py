"""The equations of the memory, one by one, against loops over single tokens written from the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from infini_llama.memory_infini import (
    WRITE_RULES,
    LeastSquares,
    MemoryState,
    commit,
    inverse_denominator,
    mix,
    open_gate,
    read,
    read_token,
    scan,
    sigma,
    write,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64 throughout
RULES = list(WRITE_RULES)
sizes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


def random_memory(B: int, K: int, D: int, V: int, rule: str = "delta") -> MemoryState:
    normalizer = WRITE_RULES[rule].normalizer(torch.rand(B, K, 3, D).double() + 0.1)
    return MemoryState(torch.randn(B, K, D, V).double(), normalizer)


def empty_memory(B: int, K: int, D: int, V: int, rule: str = "delta") -> MemoryState:
    return MemoryState.zeros(rule, torch.zeros(B, K, D).double(), torch.zeros(B, K, V).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sigma_is_elu_plus_one_in_float32(dtype: torch.dtype) -> None:
    """sigma(x) = ELU(x) + 1, computed in float32 or better."""
    x = torch.linspace(-8, 8, 101, dtype=dtype)
    assert sigma(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # float32 rounding of the reference, which adds 1 to a number near -1
    torch.testing.assert_close(sigma(x).double(), nn.functional.elu(x.double()) + 1, rtol=1e-6, atol=1e-6)


def test_sigma_stays_positive_and_smooth() -> None:
    """Where ELU + 1 rounds to zero, sigma is still positive; its derivative is that of ELU, also at 0."""
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 1.0, 30.0], requires_grad=True)
    assert (nn.functional.elu(x) + 1)[1] == 0  # what is being avoided
    y = sigma(x)
    assert (y > 0).all()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.where(x > 0, 1.0, x.exp()).detach())


@given(sizes, st.integers(1, 3))
def test_read_is_equation_7_for_each_query_head(shape: tuple, groups: int) -> None:
    """Query head h reads the memory of KV head h // G: sigma(q) M / (sigma(q) z)."""
    B, K, N, D, V = shape
    memory, sigma_q = random_memory(B, K, D, V), torch.rand(B, K, N, groups, D).double() + 0.01
    retrieved = read("delta", sigma_q, memory)
    for b in range(B):
        for h in range(K * groups):
            q = sigma_q[b, h // groups, :, h % groups]
            expected = (q @ memory.matrix[b, h // groups]) / (q @ memory.normalizer[b, h // groups])[:, None]
            torch.testing.assert_close(retrieved[b, h // groups, :, h % groups], expected, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_reading_an_empty_memory_gives_zero_and_finite_gradients(rule: str) -> None:
    """The division is safe for any z: an empty memory reads as 0, without a NaN in value or gradient."""
    memory = MemoryState(*(x.requires_grad_() for x in empty_memory(1, 1, 3, 3, rule)))
    sigma_q = torch.rand(1, 1, 4, 1, 3).double().requires_grad_()
    retrieved = read(rule, sigma_q, memory)
    assert (retrieved == 0).all()
    gradients = torch.autograd.grad(
        retrieved.sum() + inverse_denominator(sigma_q[:, :, :, 0], empty_memory(1, 1, 3, 3).normalizer).sum(),
        [sigma_q, *memory],
        allow_unused=True,
    )
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@given(sizes)
def test_linear_write_is_equation_8(shape: tuple) -> None:
    """M += sigma(k)^T v and z += sigma(k), token by token."""
    B, K, N, D, V = shape
    memory, sigma_k, values = (
        random_memory(B, K, D, V),
        torch.rand(B, K, N, D).double(),
        torch.randn(B, K, N, V).double(),
    )
    matrix, normalizer = torch.zeros_like(memory.matrix), torch.zeros_like(memory.normalizer)
    for n in range(N):
        matrix += torch.einsum("bkd,bkv->bkdv", sigma_k[:, :, n], values[:, :, n])
        normalizer += sigma_k[:, :, n]
    torch.testing.assert_close(write("linear", sigma_k, values, memory), MemoryState(matrix, normalizer), **EXACT)


@given(sizes, st.booleans())
def test_delta_write_is_equation_9(shape: tuple, is_empty: bool) -> None:
    """M += sigma(k)^T (v - sigma(k) M / (sigma(k) z)) with the memory of before the segment; an empty one binds nothing."""
    B, K, N, D, V = shape
    memory = (empty_memory if is_empty else random_memory)(B, K, D, V)
    sigma_k, values = torch.rand(B, K, N, D).double() + 0.01, torch.randn(B, K, N, V).double()
    matrix, normalizer = torch.zeros_like(memory.matrix), torch.zeros_like(memory.normalizer)
    for b in range(B):
        for k in range(K):
            for n in range(N):
                key = sigma_k[b, k, n]
                bound = 0 if is_empty else (key @ memory.matrix[b, k]) / (key @ memory.normalizer[b, k])
                matrix[b, k] += torch.outer(key, values[b, k, n] - bound)
                normalizer[b, k] += key
    torch.testing.assert_close(write("delta", sigma_k, values, memory), MemoryState(matrix, normalizer), **EXACT)


@given(sizes, st.booleans())
def test_least_squares_writes_the_least_change_that_explains_the_segment(shape: tuple, is_empty: bool) -> None:
    """Unfiltered, the gradient of |V - K M|^2 + r |M - M_before|^2 is 0 there. The filter is (G / (G + r))^3, G = K^T K."""
    B, K, N, D, V = shape
    memory = (empty_memory if is_empty else random_memory)(B, K, D, V, "least_squares")
    sigma_k, values = torch.rand(B, K, N, D).double() + 0.01, torch.randn(B, K, N, V).double()
    change = commit("least_squares", write("least_squares", sigma_k, values, memory)).matrix
    keys = sigma_k / sigma_k.norm(dim=-1, keepdim=True)
    eigenvalues, directions = torch.linalg.eigh(keys.mT @ keys)
    filtered = directions.mT @ change  # in the basis of G
    ridge, present = LeastSquares.RIDGE, (eigenvalues > 1e-3)[..., None]
    assert (filtered * ~present).abs().max() < 1e-3  # nothing is written where there are no keys
    factors = torch.where(present, ((eigenvalues + ridge) / eigenvalues)[..., None] ** LeastSquares.POWER, 0)
    unfiltered = directions @ (filtered * factors)
    gradient = keys.mT @ (keys @ (memory.matrix + unfiltered) - values) + ridge * unfiltered
    gradient = (directions.mT @ gradient) * present
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=1e-6, atol=1e-4)


def test_least_squares_keeps_what_was_written_once_whatever_is_repeated_after_it() -> None:
    """How much of what is read depends on the value of a needle, after a text of 24 tokens again and again."""
    torch.manual_seed(0)
    sigma_k, values = torch.rand(1, 1, 25, 64).double(), torch.randn(1, 1, 25, 64).double()
    kept = {}
    for rule in RULES:
        contrasts = {}
        for repetitions in (10, 10_000):
            found = []
            for value in (values[:, :, :1], -values[:, :, :1]):
                memory = empty_memory(1, 1, 64, 64, rule)
                memory = memory.add(commit(rule, write(rule, sigma_k[:, :, :1], value, memory)))
                for _ in range(repetitions):
                    memory = memory.add(commit(rule, write(rule, sigma_k[:, :, 1:], values[:, :, 1:], memory)))
                found.append(read(rule, sigma_k[:, :, :1, None], memory))
            contrasts[repetitions] = (found[0] - found[1]).norm() / (found[0] + found[1]).norm()
        kept[rule] = contrasts[10_000] / contrasts[10]
    assert kept["least_squares"] > 0.9
    assert kept["linear"] < 0.01 and kept["delta"] < 0.01


@pytest.mark.parametrize("rule", RULES)
@given(shape=sizes, num_segments=st.integers(1, 5), seed=st.integers(0, 99))
def test_scan_equals_one_write_after_the_other(rule: str, shape: tuple, num_segments: int, seed: int) -> None:
    """The parallel form over segments is the recurrence, with restarts, open segments and pending writes."""
    torch.manual_seed(seed)
    B, K, N, D, V = shape
    memory = (random_memory if seed % 2 else empty_memory)(B, K, D, V, rule)
    pending = (random_memory if seed % 3 else empty_memory)(B, K, D, V, rule)
    sigma_k = torch.rand(B, num_segments, K, N, D).double() + 0.01
    values = torch.randn(B, num_segments, K, N, V).double()
    restarts = torch.rand(B, num_segments) < 0.3
    # All segments of a row are complete but perhaps its last.
    completes = torch.ones(B, num_segments, dtype=torch.bool)
    completes[:, -1] = torch.rand(B) < 0.5
    starts, last, still_open = scan(rule, sigma_k, values, memory, pending, restarts=restarts, completes=completes)
    for b in range(B):
        state = MemoryState(memory.matrix[b : b + 1], memory.normalizer[b : b + 1])
        for s in range(num_segments):
            if restarts[b, s]:
                state = empty_memory(1, K, D, V, rule)
            torch.testing.assert_close(starts.matrix[b : b + 1, s], state.matrix, **EXACT)
            torch.testing.assert_close(starts.normalizer[b : b + 1, s], state.normalizer, **EXACT)
            added = write(rule, sigma_k[b : b + 1, s], values[b : b + 1, s], state)
            if s == 0:
                added = added.add(MemoryState(pending.matrix[b : b + 1], pending.normalizer[b : b + 1]))
            if completes[b, s]:
                state = state.add(commit(rule, added))
        torch.testing.assert_close(last.matrix[b : b + 1], state.matrix, **EXACT)
        expected = added.matrix * ~completes[b, -1]
        torch.testing.assert_close(still_open.matrix[b : b + 1], expected, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_all_rules_add_up_inside_a_segment(rule: str) -> None:
    """A segment may be written in any pieces: what its tokens add depends on the memory before it alone."""
    memory, sigma_k, values = (
        random_memory(2, 3, 4, 5, rule),
        torch.rand(2, 3, 8, 4).double(),
        torch.randn(2, 3, 8, 5).double(),
    )
    whole = write(rule, sigma_k, values, memory)
    pieces = [write(rule, k, v, memory) for k, v in zip(sigma_k.split(3, 2), values.split(3, 2))]
    torch.testing.assert_close(pieces[0].add(pieces[1]).add(pieces[2]), whole, **EXACT)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_for_a_token_is_read_and_mix(rule: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    B, K, G, D = 3, 2, 3, 8
    sigma_q, local = sigma(torch.randn(B, K, 1, G, D)), torch.randn(B, 1, K, G, D, dtype=dtype)
    memory = random_memory(B, K, D, D, rule).map(torch.Tensor.float)
    for beta in (torch.randn(1, K, 1, G), torch.randn(B, K, 1, G)):  # of heads, and of tokens
        gate = open_gate(beta.squeeze(0), memory)
        expected = mix(gate.transpose(1, 2), local, read(rule, sigma_q, memory, gate).transpose(1, 2))
        output = read_token(rule, sigma_q.squeeze(2), local.squeeze(1), beta.squeeze(2), memory)
        torch.testing.assert_close(output, expected.squeeze(1))


def test_mix_is_equation_10_and_local_alone_while_empty() -> None:
    """sigmoid(beta) is the share of the memory, per query head; a row without memory keeps all of A_local, bit for bit."""
    beta, local = torch.randn(2, 1, 3), torch.randn(2, 2, 5, 3, 4)
    sigma_q = sigma(torch.randn(2, 2, 5, 3, 4))
    memory = MemoryState(torch.randn(2, 2, 4, 4), torch.tensor([[[1.0] * 4] * 2, [[0.0] * 4] * 2]))
    memory = MemoryState(memory.matrix * (memory.normalizer > 0)[..., None], memory.normalizer)
    gate = open_gate(beta, memory)
    mixed = mix(gate, local, read("linear", sigma_q, memory, gate))
    share = torch.sigmoid(beta)[None, ..., None]
    torch.testing.assert_close(mixed[0], (share * read("linear", sigma_q, memory) + (1 - share) * local)[0])
    assert torch.equal(mixed[1], local[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_derivative_of_sigma_is_that_of_elu_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    """Also the second derivative, and for inputs that are not contiguous."""
    x = torch.linspace(-6, 6, 24).reshape(4, 6).to(dtype).T.requires_grad_()
    exact = x.detach().double().requires_grad_()
    for function, at in ((sigma, x), (lambda y: nn.functional.elu(y) + 1, exact)):
        (first,) = torch.autograd.grad((function(at) ** 2).sum(), at, create_graph=True)
        assert first.dtype == at.dtype
        first.sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)
    assert sigma(x).is_contiguous()


def test_the_delta_rule_replaces_a_binding_but_the_normalizer_counts_it_twice() -> None:
    """Delta leaves the new value in M where linear leaves the sum; with the paper's z both are divided by two writes."""
    key = torch.tensor([[[[1.0, 0.0]]]]).double()
    old, new = torch.tensor([[[[4.0]]]]).double(), torch.tensor([[[[8.0]]]]).double()
    results, bindings = {}, {}
    for rule in ("linear", "delta"):
        memory = empty_memory(1, 1, 2, 1)
        for value in (old, new):
            memory = memory.add(write(rule, key, value, memory))
        bindings[rule] = memory.matrix[0, 0, 0, 0].item()
        results[rule] = read(rule, key[:, :, :, None], memory).item()
    assert bindings == {"linear": 12.0, "delta": 8.0}
    assert results == {"linear": 6.0, "delta": 4.0}


def test_half_precision_inputs_are_accumulated_in_float32() -> None:
    """8192 + 32 is 8192 in bfloat16: a memory of bfloat16 keys and values must not lose what it adds."""
    sigma_k, values = sigma(torch.zeros(1, 1, 8192, 1)), torch.ones(1, 1, 8192, 1, dtype=torch.bfloat16)
    memory = MemoryState.zeros("linear", torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1))
    memory = memory.add(write("linear", sigma_k, values, memory))
    memory = memory.add(write("linear", sigma_k[:, :, :32], values[:, :, :32], memory))
    assert memory.matrix.item() == memory.normalizer.item() == 8224
