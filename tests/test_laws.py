"""The laws of the project, on random shapes, against an oracle that shares no code with the model.

Everything runs in float64, so that a tolerance of 1e-9 tells a law from a coincidence: float32 rounding is nine orders of
magnitude above it. Transformers computes the norms and the rotary table of Llama in float32 whatever the model's dtype;
a fixture lifts that. (So does its eager attention; `test_modeling.py` compares the attention implementations.)
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleResult, oracle_forward
from tiny import base_llama, random_ids, tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from infini_llama.cache_infini import InfiniCache
from infini_llama.memory_infini import MemoryState
from infini_llama.modeling_infini import InfiniLlamaForCausalLM

EXACT = {"rtol": 1e-9, "atol": 1e-9}
RULES = ["linear", "delta", "least_squares"]


@pytest.fixture(autouse=True)
def float64_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self: LlamaRotaryEmbedding, x: torch.Tensor, position_ids: torch.Tensor) -> tuple:
        exponents = torch.arange(0, 2 * len(self.inv_freq), 2, dtype=torch.float64) / (2 * len(self.inv_freq))
        inv_freq = 1 / self.config.rope_parameters["rope_theta"] ** exponents
        angles = (position_ids[..., None].double() * inv_freq).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rotary)


@st.composite
def models(draw: st.DrawFn, rules: list[str] = RULES) -> InfiniLlamaForCausalLM:
    """A float64 model of random shape: MHA, GQA or MQA, any segment length, any block."""
    kv_heads, groups, head_dim = draw(st.sampled_from([(1, 1, 4), (1, 3, 2), (2, 1, 4), (2, 2, 4), (3, 2, 2)]))
    return tiny_model(
        hidden_size=8 * groups * kv_heads,
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        segment_length=draw(st.integers(1, 7)),
        block_segments=draw(st.integers(1, 4)),
        memory_update=draw(st.sampled_from(rules)),
        write_gate=draw(st.booleans()),
        read_gate=draw(st.booleans()),
    ).double()


@st.composite
def chunks(draw: st.DrawFn, length: int) -> list[int]:
    """Any way of cutting `length` tokens into forward calls, one token at a time included."""
    if draw(st.booleans()) and length <= 12:
        return [1] * length
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=5)) if length > 1 else set()
    edges = [0, *sorted(cuts), length]
    return [stop - start for start, stop in zip(edges, edges[1:])]


def oracle(model: InfiniLlamaForCausalLM, ids: torch.Tensor, parameters=None, positions=None) -> OracleResult:
    config = model.config
    return oracle_forward(
        parameters or model.state_dict(),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_layers=config.num_hidden_layers,
        segment_length=config.segment_length,
        memory_update=config.memory_update,
        rms_norm_eps=config.rms_norm_eps,
        input_ids=ids,
        position_ids=positions,
    )


def memory_of(cache: InfiniCache, row: int) -> MemoryState:
    """(layers, K, D, D) and (layers, K, D)."""
    return MemoryState(
        torch.stack([memory.matrix[row] for memory in cache]),
        torch.stack([memory.normalizer[row] for memory in cache]),
    )


def run(model, ids, widths, **kwargs) -> tuple[torch.Tensor, InfiniCache]:
    """The logits of a text that is fed in calls of these widths; keyword tensors are cut along."""
    cache, logits, stop = InfiniCache(model.config), [], 0
    for width in widths:
        start, stop = stop, stop + width
        cut = {name: x[:, start:stop] for name, x in kwargs.items()}
        logits.append(model(ids[:, start:stop], past_key_values=cache, **cut).logits)
    return torch.cat(logits, dim=1), cache


def assert_row_is_oracle(model, logits, cache, row, ids, positions=None) -> None:
    expected = oracle(model, ids, positions=positions)
    memory = memory_of(cache, row)
    torch.testing.assert_close(logits, expected.logits, **EXACT)
    torch.testing.assert_close(memory.matrix, expected.matrix, **EXACT)
    torch.testing.assert_close(memory.normalizer, expected.normalizer, **EXACT)
    if model.config.memory_update != "none":
        has_memory = [layer.timeline.has_memory[row] for layer in cache.layers]
        assert has_memory == (memory.normalizer.flatten(1).sum(-1) > 0).tolist()


@given(models(), st.integers(1, 30))
@torch.no_grad()
def test_outputs_and_final_state_equal_the_oracle(model: InfiniLlamaForCausalLM, length: int) -> None:
    """Oracle: a token-by-token reference agrees in logits and in the final memory of every layer."""
    ids = random_ids(2, length)
    cache = InfiniCache(model.config)
    logits = model(ids, past_key_values=cache).logits
    for row in range(2):
        assert_row_is_oracle(model, logits[row], cache, row, ids[row])
    if length > model.config.segment_length:
        assert memory_of(cache, 0).matrix.abs().sum() > 0


@given(models(), st.integers(2, 24))
@settings(max_examples=40)
def test_every_gradient_equals_the_oracle(model: InfiniLlamaForCausalLM, length: int) -> None:
    """Oracle: the gradients of every parameter agree, for a random cotangent of the logits and of the final state."""
    ids = random_ids(1, length)
    parameters = {name: x.detach().clone().requires_grad_() for name, x in model.state_dict().items()}
    expected = oracle(model, ids[0], parameters)
    cache = InfiniCache(model.config)
    logits = model(ids, past_key_values=cache).logits
    memory = memory_of(cache, 0)
    cotangents = [torch.randn_like(x) for x in (expected.logits, expected.matrix, expected.normalizer)]

    def objective(*outputs: torch.Tensor) -> torch.Tensor:
        return sum((x * c).sum() for x, c in zip(outputs, cotangents))

    names = [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad(
        objective(logits[0], *memory), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    theirs = torch.autograd.grad(
        objective(*expected), [parameters[name] for name in names], allow_unused=True, materialize_grads=True
    )
    for name, our, their in zip(names, ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    if length > model.config.segment_length:
        gates = [our for name, our in zip(names, ours) if "memory_gate" in name]
        assert all(gate.abs().sum() > 0 for gate in gates), "a gate without gradient can never open"


@given(models(), st.integers(1, 40), st.data())
@torch.no_grad()
def test_any_split_gives_the_same_logits_and_state(model, length: int, data: st.DataObject) -> None:
    """Any split: one forward of a text, and any way of cutting it into calls with the cache, are the same."""
    ids = random_ids(2, length)
    logits, cache = run(model, ids, [length])
    split_logits, split_cache = run(model, ids, data.draw(chunks(length)))
    torch.testing.assert_close(split_logits, logits, **EXACT)
    for row in range(2):
        torch.testing.assert_close(memory_of(split_cache, row), memory_of(cache, row), **EXACT)
    assert split_cache.layers[0].timeline == cache.layers[0].timeline


@given(models(), st.data())
@torch.no_grad()
def test_any_batch_gives_each_row_what_it_gives_alone(model, data: st.DataObject) -> None:
    """Any batch: padding on the left, on the right or in between, in any split, changes nothing for the real tokens."""
    lengths = data.draw(st.lists(st.integers(0, 24), min_size=1, max_size=4).filter(any))
    side = data.draw(st.sampled_from(["left", "right", "anywhere"]))
    width = max(lengths) + (data.draw(st.integers(0, 6)) if side == "anywhere" else 0)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        columns = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "anywhere": torch.randperm(width)[:length],
        }[side]
        mask[row, columns] = 1
    ids = random_ids(len(lengths), width)
    logits, cache = run(model, ids, data.draw(chunks(width)), attention_mask=mask)
    assert logits.isfinite().all()
    for row, real in enumerate(mask.bool()):
        if real.any():
            assert_row_is_oracle(model, logits[row, real], cache, row, ids[row, real])


@given(models(), st.data())
@torch.no_grad()
def test_documents_that_restart_never_leak(model, data: st.DataObject) -> None:
    """Packing: positions that restart begin a new document; positions that jump skip tokens; both in any split."""
    positions = []
    for start, steps in data.draw(
        st.lists(
            st.tuples(st.integers(0, 9), st.lists(st.sampled_from([1, 1, 1, 1, 4]), max_size=10)),
            min_size=1,
            max_size=4,
        )
    ):
        # A document begins at 0; only the first may begin in the middle, as the rest of a longer one.
        document = [start if not positions else 0]
        for step in steps:
            document.append(document[-1] + step)
        positions += document
    positions = torch.tensor([positions])
    ids = random_ids(*positions.shape)
    logits, cache = run(model, ids, data.draw(chunks(positions.shape[1])), position_ids=positions)
    assert_row_is_oracle(model, logits[0], cache, 0, ids[0], positions[0])


@given(models(), st.lists(st.integers(1, 12), min_size=2, max_size=4))
@torch.no_grad()
def test_a_packed_batch_equals_its_documents(model, lengths: list[int]) -> None:
    """Packing: each document gives in a packed row what it gives alone."""
    documents = [random_ids(1, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(torch.cat(documents, dim=1), position_ids=positions).logits
    alone = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, **EXACT)


@given(models(), st.integers(1, 40), st.integers(1, 9))
@torch.no_grad()
def test_any_block_gives_the_same(model, length: int, block_segments: int) -> None:
    """Any block: how many segments are processed together changes no logit and no state, with padding or without."""
    ids, mask = random_ids(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    for attention_mask in (None, mask):
        results = []
        for model.config.block_segments in (1, block_segments):
            cache = InfiniCache(model.config)
            results.append((model(ids, attention_mask=attention_mask, past_key_values=cache).logits, cache))
        real = mask.bool() if attention_mask is not None else torch.ones_like(mask).bool()
        torch.testing.assert_close(results[0][0][real], results[1][0][real], **EXACT)
        for row in range(2):
            torch.testing.assert_close(memory_of(results[0][1], row), memory_of(results[1][1], row), **EXACT)


@given(models(rules=["linear", "delta", "none"]), st.booleans())
@torch.no_grad()
def test_up_to_a_segment_it_is_the_base_model(model, one_token: bool) -> None:
    """Base model: input of at most N tokens gives exactly the logits of the Llama it was made from."""
    for length in {1, max(1, model.config.segment_length - 1), model.config.segment_length}:
        ids = random_ids(2, length)
        assert torch.equal(model(ids).logits, base_llama(model)(ids).logits)


@given(models(rules=["none"]), st.integers(1, 30))
@torch.no_grad()
def test_without_memory_segments_are_independent_texts(model, length: int) -> None:
    """The control: with `memory_update="none"` each segment is what the base model says of it alone."""
    ids, base = random_ids(1, length), base_llama(model)
    alone = [base(segment).logits for segment in ids.split(model.config.segment_length, dim=1)]
    torch.testing.assert_close(model(ids).logits, torch.cat(alone, dim=1), **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_of_the_last_segment_reaches_the_first(rule: str) -> None:
    """Gradients flow through memory: by default over the whole sequence, and memory is the only way they can."""
    model = tiny_model(memory_update=rule).double()
    embeddings = nn.Parameter(torch.randn(1, 40, model.config.hidden_size, dtype=torch.float64))
    model(inputs_embeds=embeddings).logits[:, -1].pow(2).sum().backward()
    assert embeddings.grad[:, :5].abs().sum() > 0
    model.config.memory_update = "none"
    embeddings.grad = None
    model(inputs_embeds=embeddings).logits[:, -1].pow(2).sum().backward()
    assert embeddings.grad[:, :35].abs().sum() == 0 and embeddings.grad[:, 35:].abs().sum() > 0
