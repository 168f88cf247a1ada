"""The model against the Llama it came from, against itself in every way of running it, and in its users' tools."""

import contextlib
import functools
import itertools

import pytest
import torch
from tiny import base_llama, random_ids, rounding, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    modeling_flash_attention_utils,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from infini_llama.cache_infini import InfiniCache
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import (
    PACKING_KWARGS,
    InfiniLlamaForCausalLM,
    InfiniLlamaForSequenceClassification,
    InfiniLlamaModel,
)

N = tiny_config().segment_length
LONG = 7 * N + 3  # three blocks of segments, and an open segment
# float32 sums in another order: measured up to 2e-5 on logits of size 4; a token in a wrong place moves them by 0.1.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
# The same operations on the same numbers.
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def gates_of(model: torch.nn.Module) -> list[torch.Tensor]:
    gates = [parameter for name, parameter in model.named_parameters() if "memory_gate" in name]
    assert gates
    return gates


def assert_reads_memory(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """The comparison at hand would notice a memory that is lost: without it, later logits are others."""
    with torch.no_grad():
        rule, with_memory = model.config.memory_update, model(ids).logits
        model.config.memory_update = "none"
        without_memory = model(ids).logits
    model.config.memory_update = rule
    assert (with_memory - without_memory)[:, N:].abs().mean() > 0.05


# The base model


KINDS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_up_to_one_segment_the_model_is_the_llama(kind, attention, dtype):
    """The logits of T <= N tokens are those of the Llama with the same weights, to the last bit."""
    model = tiny_model(**KINDS[kind], attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) / 4)  # biases start at 0 and norms at 1
    model.to(dtype)
    base = base_llama(model)
    for tokens in (1, N - 1, N):
        ids = random_ids(2, tokens)
        assert_equal(model(ids).logits, base(ids).logits)


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
    },
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("rope_type", sorted({"default", *ROPE_INIT_FUNCTIONS}))
@torch.no_grad()
def test_every_rope_type_is_the_llamas_in_a_segment_and_never_leaves_it(rope_type):
    """Within a segment, logits equal Llama's; a text far beyond the original 8 positions, where some types change
    their frequencies, gives the same in one call, token by token, and padded.
    """
    model = tiny_model(
        max_position_embeddings=8 if rope_type == "dynamic" else 32,  # what "dynamic" takes for the original length
        rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]},
    )
    base = base_llama(model)
    for tokens in (1, N - 1, N):
        ids = random_ids(2, tokens)
        assert_equal(model(ids).logits, base(ids).logits)
    ids = random_ids(2, LONG)
    logits = run(model, ids)
    assert_close(run(model, ids, cuts=range(1, LONG)), logits)
    mask = torch.ones(2, LONG + 2, dtype=torch.long)
    mask[0, :2] = mask[1, -2:] = 0
    padded = torch.stack([F.pad(ids[0], (2, 0)), F.pad(ids[1], (0, 2))])
    assert_close(run(model, padded, mask)[mask.bool()], logits.flatten(0, 1))


# Attention implementations


def run(model, ids, mask=None, positions=None, cuts=()):
    """The logits of a text that is cut into calls on one cache; those of padding are 0."""
    cache, logits = InfiniCache(model.config), []
    for start, stop in itertools.pairwise([0, *cuts, ids.shape[1]]):
        inputs = {"attention_mask": mask[:, :stop]} if mask is not None else {}
        inputs |= {"position_ids": positions[:, start:stop]} if positions is not None else {}
        logits.append(model(ids[:, start:stop], past_key_values=cache, **inputs).logits)
    logits = torch.cat(logits, dim=1)
    return logits if mask is None else logits * mask[..., None]


def padding_masks() -> dict[str, torch.Tensor | None]:
    left = torch.ones(3, LONG, dtype=torch.long)
    left[0, :3] = left[1, :11] = 0
    return {"none": None, "left": left, "right": left.flip(1), "scattered": (torch.rand(3, LONG) < 0.7).long()}


PADDINGS = list(padding_masks())
CUTS = {"one call": [], "chunks": [3, 4, 17, 20], "decode": list(range(12, LONG))}


@pytest.fixture
def flash_kernels(monkeypatch) -> list[str]:
    """Transformers' own way to flash attention, down to its two kernels, which are plain torch here and compute what
    they are documented to compute. Returns the list of their calls.
    """
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        calls.append("dense")
        # (batch, tokens, heads, head_dim); the causal mask is aligned to the last query and the last key.
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = visible if causal else None
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        calls.append("varlen")
        spans = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()))
        rows = [flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **options) for (a, b), (c, d) in spans]
        return torch.cat(rows, dim=1)[0]

    utils = modeling_flash_attention_utils
    functions = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    processing = (utils._lazy_define_process_function(flash_attn_varlen_func), dict)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, processing))
    return calls


def quiet_flex_attention(test):
    """What torch says about flex attention uncompiled, and about how Transformers makes its masks."""
    for message in ("flex_attention called without torch.compile", "_compile flag on create_block_mask"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


@contextlib.contextmanager
def attention(model, name):
    """Another attention implementation, set on the config itself: by name, flash attention refuses to be on a CPU."""
    # flex attention is always compiled, which takes a minute; uncompiled, it runs its own reference implementation.
    stance = torch.compiler.set_stance("force_eager") if name == "flex_attention" else contextlib.nullcontext()
    model.config._attn_implementation = name
    with stance, torch.no_grad():
        yield


@quiet_flex_attention
@pytest.mark.parametrize("name", ["eager", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_every_attention_implementation_gives_the_same(padding, cuts, name, flash_kernels):
    """sdpa, eager, flex attention and flash attention agree, in prefill, chunks and decoding, with any padding."""
    model, ids, mask = tiny_model(), random_ids(3, LONG), padding_masks()[padding]
    with attention(model, "sdpa"):
        expected = run(model, ids, mask, cuts=CUTS[cuts])
    with attention(model, name):
        assert_close(run(model, ids, mask, cuts=CUTS[cuts]), expected)
    assert bool(flash_kernels) == (name == "flash_attention_2")


@quiet_flex_attention
@pytest.mark.parametrize("name", ["eager", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("cuts", CUTS)
def test_every_attention_implementation_keeps_packed_documents_apart(cuts, name, flash_kernels):
    """Positions that restart give each document what it gives alone, whatever the implementation."""
    model, ids = tiny_model(), random_ids(2, LONG)
    lengths = [[8, 14, 16], [23, 1, 14]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    with attention(model, name):
        logits = run(model, ids, positions=positions, cuts=CUTS[cuts])
    with torch.no_grad():
        for row in range(2):
            for document, got in zip(ids[row].split(lengths[row]), logits[row].split(lengths[row])):
                assert_close(got, model(document[None]).logits[0])


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2"])
def test_a_flash_collators_description_of_packing_is_not_needed(name, flash_kernels):
    """`cu_seq_lens_q` and its kin, which describe whole documents and not segments, change nothing."""
    model, ids = tiny_model(), random_ids(1, LONG)
    positions = torch.cat([torch.arange(8), torch.arange(LONG - 8)])[None]
    lengths = torch.tensor([0, 8, LONG], dtype=torch.int32)
    packing = dict.fromkeys(PACKING_KWARGS, lengths) | {"max_length_q": LONG - 8, "max_length_k": LONG - 8}
    with attention(model, name):
        expected = model(ids, position_ids=positions).logits
        assert_equal(model(ids, position_ids=positions, **packing).logits, expected)


@quiet_flex_attention
@pytest.mark.slow
def test_compiled_flex_attention_gives_the_same():
    """The kernel that flex attention compiles for the CPU agrees with sdpa on several segments and on padding."""
    model, ids, mask = tiny_model(num_hidden_layers=1), random_ids(3, 12), padding_masks()["left"][:, :12]
    with torch.no_grad():
        expected = run(model, ids), run(model, ids, mask)
        model.set_attn_implementation("flex_attention")
        assert_close((run(model, ids), run(model, ids, mask)), expected)


# Outputs


@torch.no_grad()
def test_attentions_are_the_weights_of_local_attention():
    """(batch, heads, tokens, slots) per layer, each row of weights a distribution over the slots up to its own; in the
    first layer, whose input knows no memory, those of the Llama that sees each segment alone.
    """
    model = tiny_model(attn_implementation="eager")
    base, ids = base_llama(model), random_ids(2, LONG)
    attentions = model(ids, output_attentions=True).attentions
    assert [x.shape for x in attentions] == [(2, 4, LONG, N)] * 2
    for weights in attentions:
        assert_close(weights.sum(-1), torch.ones(2, 4, LONG))
        for token in range(LONG):
            assert not weights[:, :, token, token % N + 1 :].any()
    for start in range(0, LONG, N):
        segment = ids[:, start : start + N]
        expected = base(segment, output_attentions=True).attentions
        assert_close(attentions[0][:, :, start : start + N, : segment.shape[1]], expected[0])
        if start == 0:
            assert_equal(tuple(x[:, :, :N] for x in attentions), expected)


@torch.no_grad()
def test_attentions_of_padding_are_zero():
    """A padding token attends to nothing, and real tokens have the same weights as without padding."""
    model = tiny_model(attn_implementation="eager")
    ids, mask = random_ids(3, LONG), padding_masks()["left"]
    attentions = model(ids, attention_mask=mask, output_attentions=True).attentions
    for row, valid in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, valid], output_attentions=True).attentions
        for weights, expected in zip(attentions, alone):
            assert_close(weights[row, :, valid], expected[0])
            assert not weights[row, :, ~valid].any()


@pytest.mark.parametrize("tokens", [1, N, LONG])
@torch.no_grad()
def test_hidden_states_are_given_for_every_token(tokens):
    """The embeddings, then the output of each layer, the last one normalised; in the first segment, those of Llama."""
    model = tiny_model()
    base, ids = base_llama(model), random_ids(2, tokens)
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    assert [x.shape for x in hidden_states] == [(2, tokens, 32)] * 3
    assert_equal(tuple(x[:, :N] for x in hidden_states), base(ids[:, :N], output_hidden_states=True).hidden_states)
    assert_equal(hidden_states[0], model.get_input_embeddings()(ids))
    assert_equal(hidden_states[-1], model.model(ids).last_hidden_state)


@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_outputs_do_not_depend_on_the_size_of_a_block(padding):
    """`block_segments` changes neither logits nor hidden states nor attentions."""
    model = tiny_model(attn_implementation="eager")
    ids, mask = random_ids(3, LONG), padding_masks()[padding]
    outputs = []
    for model.config.block_segments in (1, 2, 3, 100):
        out = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        real = slice(None) if mask is None else mask.bool()
        outputs.append(
            [x[real] for x in (out.logits, *out.hidden_states)] + [x.transpose(1, 2)[real] for x in out.attentions]
        )
    for other in outputs[1:]:
        assert_close(other, outputs[0])


@pytest.mark.parametrize("keep", [1, 3, N, 17, LONG, LONG + 9, torch.tensor([0, 4, 5, LONG - 1])], ids=str)
@torch.no_grad()
def test_logits_to_keep_selects_tokens(keep):
    """A number keeps so many last tokens, indices keep those tokens; the logits are those of the full output."""
    model, ids = tiny_model(), random_ids(2, LONG)
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    full = model(ids)
    out = model(ids, logits_to_keep=keep)
    assert_close(out.logits, full.logits[:, kept])
    assert_equal(list(out.past_key_values), list(full.past_key_values))
    if isinstance(keep, int):
        assert model.model(ids, logits_to_keep=keep).last_hidden_state.shape[1] == min(keep, LONG)


@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_embeddings_do_what_their_ids_do(padding):
    """`inputs_embeds` gives the logits and the memory of `input_ids`."""
    model, ids, mask = tiny_model(), random_ids(3, LONG), padding_masks()[padding]
    by_ids = model(ids, attention_mask=mask)
    by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    assert_equal(by_embeddings.logits, by_ids.logits)
    assert_equal(list(by_embeddings.past_key_values), list(by_ids.past_key_values))


@pytest.mark.parametrize("num_items_in_batch", [None, 50])
def test_every_target_counts_once(num_items_in_batch):
    """The loss is the cross entropy of all shifted targets, those across segments and blocks too, over their number or
    over `num_items_in_batch`; so a target that is left out lowers its sum by just its own share.
    """
    model, ids = tiny_model(), random_ids(2, LONG)
    labels = ids.clone()
    labels[0, 7] = labels[1, -4:] = -100
    out = model(ids, labels=labels, num_items_in_batch=num_items_in_batch)
    target_losses = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    assert (target_losses > 0).sum() == 2 * (LONG - 1) - 5
    assert_close(out.loss, target_losses.sum() / (num_items_in_batch or 2 * (LONG - 1) - 5))


def test_the_first_token_of_a_segment_learns_from_the_last_of_the_one_before():
    """With one target only, the first token of a segment or of a block, gradients reach every parameter."""
    model, ids = tiny_model(), random_ids(1, LONG)
    for target in (2 * N, 3 * N):
        model.zero_grad()
        labels = torch.full_like(ids, -100)
        labels[0, target] = ids[0, target]
        model(ids, labels=labels).loss.backward()
        assert all(parameter.grad.any() for parameter in model.parameters())


# Precision


def state_dtypes(cache) -> set[torch.dtype]:
    return {x.dtype for layer in cache.layers for state in (layer.memory, layer.pending) for x in state}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_half_precision_model_keeps_gates_and_state_in_float32(dtype, tmp_path):
    """After loading in half precision, and after saving and loading that, gates and memory are float32 and nothing
    else is; 20 segments give finite logits.
    """
    original = tiny_model()
    original.save_pretrained(tmp_path / "float32")
    model = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    model.save_pretrained(tmp_path / "half")
    reloaded = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "half")
    ids = random_ids(2, 20 * N + 2)
    logits = []
    for half in (model, reloaded):
        assert_equal(gates_of(half), gates_of(original))
        assert {p.dtype for name, p in half.named_parameters() if "memory_gate" not in name} == {dtype}
        out = half(ids)
        assert state_dtypes(out.past_key_values) == {torch.float32}
        assert out.logits.dtype == dtype and out.logits.isfinite().all()
        logits.append(out.logits)
    assert_equal(*logits)


def test_autocast_stays_out_of_the_memory():
    """Under bfloat16 autocast the projections are bfloat16, and the memory is what float32 makes of their outputs."""
    model, ids = tiny_model(memory_update="linear"), random_ids(2, 20 * N + 2)
    keys, values = [], []
    layer = model.model.layers[0].self_attn
    layer.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    layer.v_proj.register_forward_hook(lambda module, args, output: values.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    assert state_dtypes(out.past_key_values) == {torch.float32}
    keys, values = (torch.cat(x, 1)[:, : 20 * N].unflatten(2, (2, 8)).transpose(1, 2) for x in (keys, values))
    assert keys.dtype == values.dtype == torch.bfloat16
    sigma_k = F.elu(keys.float()) + 1
    assert_close(tuple(next(iter(out.past_key_values))), (sigma_k.mT @ values.float(), sigma_k.sum(2)))
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


# Loading and saving


def test_a_model_can_be_built_without_memory_for_it():
    """On the meta device nothing is allocated, and no value is needed to build the model."""
    with torch.device("meta"):
        model = InfiniLlamaForCausalLM(tiny_config())
    assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"meta"}


DISK_OFFLOAD = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, DISK_OFFLOAD], ids=["no map", "cpu", "disk"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
@torch.no_grad()
def test_a_loaded_model_is_the_saved_one(max_shard_size, device_map, tmp_path):
    """Saved whole or in shards, loaded onto a device or partly left on the disk: the same logits over several
    segments, in one call and over a cache.
    """
    model, ids = tiny_model(), random_ids(2, LONG)
    model.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (max_shard_size == "10KB")
    offload = {"offload_folder": tmp_path / "offload"} if device_map is DISK_OFFLOAD else {}
    loaded = InfiniLlamaForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map, **offload)
    assert not loaded.training
    if device_map is not DISK_OFFLOAD:
        assert_equal(loaded.state_dict(), model.state_dict())
    assert_reads_memory(model, ids)
    for cuts in CUTS.values():
        assert_equal(run(loaded, ids, cuts=cuts), run(model, ids, cuts=cuts))


@pytest.mark.parametrize("writer, reader", list(itertools.product(["whole", "offloaded"], repeat=2)))
@torch.no_grad()
def test_a_memory_file_knows_a_model_by_its_weights_and_not_by_where_they_are(writer, reader, tmp_path):
    """A memory saved by a model that is whole or partly on the disk goes on in the same one, whole or on the disk."""
    model, ids = tiny_model(), random_ids(1, LONG)
    model.save_pretrained(tmp_path / "model")
    offloaded = InfiniLlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=DISK_OFFLOAD, offload_folder=tmp_path / "offload"
    )
    models = {"whole": model, "offloaded": offloaded}
    cache = InfiniCache(model.config)
    models[writer](ids[:, :22], past_key_values=cache)
    cache.save(tmp_path / "memory.safetensors")
    cache = InfiniCache.load(tmp_path / "memory.safetensors", models[reader])
    assert_close(models[reader](ids[:, 22:], past_key_values=cache).logits, model(ids).logits[:, 22:])


@torch.no_grad()
def test_a_plain_llama_loads_with_fresh_gates(tmp_path):
    """`InfiniLlamaForCausalLM.from_pretrained` of a Llama sets the gates to `gate_init` and changes no weight."""
    base = base_llama(tiny_model())
    base.save_pretrained(tmp_path)
    model = InfiniLlamaForCausalLM.from_pretrained(tmp_path, segment_length=N, gate_init=-1.5)
    assert_equal(torch.cat(gates_of(model)), torch.full((8,), -1.5))
    assert_equal({k: v for k, v in model.state_dict().items() if "memory_gate" not in k}, base.state_dict())
    ids = random_ids(2, N)
    assert_equal(model(ids).logits, base(ids).logits)
    model.save_pretrained(tmp_path / "infini")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "infini").state_dict(), model.state_dict())


@torch.no_grad()
def test_a_plain_llama_loads_with_write_gates_that_are_nearly_open(tmp_path):
    """They write 88 % of every token, and are saved and loaded with the rest."""
    base_llama(tiny_model()).save_pretrained(tmp_path)
    model = InfiniLlamaForCausalLM.from_pretrained(tmp_path, segment_length=N, write_gate=True)
    for layer in model.model.layers:
        strength = layer.self_attn.write_gate(torch.randn(2, 3, model.config.hidden_size))
        assert_equal(strength, torch.sigmoid(torch.full((2, model.config.num_key_value_heads, 3, 1), 2.0)))
        layer.self_attn.write_gate.weight.normal_()
    model.save_pretrained(tmp_path / "infini")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "infini").state_dict(), model.state_dict())


@torch.no_grad()
def test_read_gates_begin_as_those_of_the_paper(tmp_path):
    """The same model until their weights are trained; float32 in any model, and saved and loaded."""
    plain, ids = tiny_model(), random_ids(2, 3 * N)
    plain.save_pretrained(tmp_path)
    model = InfiniLlamaForCausalLM.from_pretrained(tmp_path, read_gate=True, dtype=torch.bfloat16)
    for layer in model.model.layers:
        gate = layer.self_attn.memory_gate
        assert gate.weight.dtype == torch.float32 and not gate.weight.any()
        hidden = torch.randn(2, 3, model.config.hidden_size)
        assert_equal(gate(hidden), gate.bias.expand(2, 3, -1))
        assert_equal(gate(), gate.bias)
    model.float().load_state_dict(plain.state_dict(), strict=False)
    assert_close(model(ids).logits, plain(ids).logits, **rounding())
    for layer in model.model.layers:
        layer.self_attn.memory_gate.weight.normal_()
    difference = (model(ids).logits - plain(ids).logits).abs()
    assert not difference[:, :N].any() and difference[:, N:].amax() > 1e-2
    model.save_pretrained(tmp_path / "infini")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "infini").state_dict(), model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("rule", ["linear", "delta", "least_squares"])
def test_closed_write_gates_leave_no_nan(rule):
    """Where next to nothing is written, read in one call or token by token."""
    model, ids = tiny_model(memory_update=rule, write_gate=True), random_ids(1, 3 * N)
    for layer in model.model.layers:
        layer.self_attn.write_gate.bias.fill_(-1e4)
    cache = InfiniCache(model.config)
    one_by_one = torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, dim=1)], dim=1)
    assert one_by_one.isfinite().all()
    assert_close(one_by_one, model(ids).logits)


# Configuration


BAD_VALUES = [
    ("segment_length", 0),
    ("segment_length", -1),
    ("segment_length", 2.5),
    ("segment_length", "x"),
    ("segment_length", None),
    ("memory_update", "foo"),
    ("memory_update", None),
    ("block_segments", 0),
    ("block_segments", 1.5),
    ("gate_init", "open"),
    ("write_gate", "open"),
    ("read_gate", 2),
    ("layer_types", "infini_attention"),
]


@pytest.mark.parametrize("field, value", BAD_VALUES, ids=str)
def test_a_bad_value_is_refused_by_name(field, value):
    """A new config and the config of a loaded model both refuse it, and the message has the field and the value."""
    with pytest.raises(Exception, match=rf"(?s){field}.*{value}"):
        tiny_config(**{field: value})
    model = tiny_model()
    before = getattr(model.config, field)
    with pytest.raises(Exception, match=rf"(?s){field}.*{value}"):
        setattr(model.config, field, value)
    assert getattr(model.config, field) == before


@pytest.mark.parametrize(
    "layer_types, match",
    [
        (["infini_attention"], r"`layer_types` has 1 entries but `num_hidden_layers` is 2"),
        (["infini_attention", "full_attention"], r"`layer_types` has the entries \['full_attention'\]"),
    ],
)
def test_bad_layer_types_are_refused(layer_types, match, tmp_path):
    """A new config refuses them at once; one that they are set on, at the latest when it is saved."""
    with pytest.raises(Exception, match=match):
        tiny_config(layer_types=layer_types)
    config = tiny_config()
    with pytest.raises(Exception, match=match):
        config.layer_types = layer_types
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [("segment_length", 3), ("segment_length", 11), ("memory_update", "linear"), ("memory_update", "none")],
)
@torch.no_grad()
def test_a_setting_changed_on_a_loaded_model_is_that_of_a_model_built_with_it(field, value):
    """Setting it on the config of a model that has already run gives the logits of a new model with that setting."""
    model, ids = tiny_model(), random_ids(2, LONG)
    before = model(ids).logits
    new = tiny_model(**{field: value})
    new.load_state_dict(model.state_dict())
    setattr(model.config, field, value)
    assert_equal(model(ids).logits, new(ids).logits)
    assert (model(ids).logits - before)[:, N:].abs().mean() > 0.05


def test_a_segment_longer_than_the_models_range_is_warned_about(caplog):
    """Positions would leave what the base model was trained on, and the message gives both numbers."""
    tiny_config(segment_length=64, max_position_embeddings=64)
    assert "segment_length" not in caplog.text
    tiny_config(segment_length=65, max_position_embeddings=64)
    assert "`segment_length` (65) exceeds the 64 positions" in caplog.text


def test_a_config_survives_saving_and_the_auto_classes_know_it(tmp_path):
    """Every field comes back, and the auto classes build our classes from it without remote code."""
    settings = {"segment_length": 7, "memory_update": "linear", "gate_init": -2, "block_segments": 4}
    config = tiny_config(**settings)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is InfiniLlamaConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert settings.items() <= loaded.to_dict().items()
    for auto_class, model_class in (
        (AutoModel, InfiniLlamaModel),
        (AutoModelForCausalLM, InfiniLlamaForCausalLM),
        (AutoModelForSequenceClassification, InfiniLlamaForSequenceClassification),
    ):
        model = auto_class.from_config(loaded)
        assert type(model) is model_class
        assert_equal(torch.cat(gates_of(model)), torch.full((8,), -2.0))


# Bad input


def bad_inputs() -> dict[str, tuple[dict, str]]:
    ids = random_ids(2, 7)
    embeds = torch.randn(2, 7, 32)
    return {
        "nothing": ({}, "exactly one of input_ids or inputs_embeds"),
        "both": ({"input_ids": ids, "inputs_embeds": embeds}, "exactly one of input_ids or inputs_embeds"),
        "no token": ({"input_ids": ids[:, :0]}, r"no tokens.*\(2, 0\)"),
        "no embedding": ({"inputs_embeds": embeds[:, :0]}, r"no tokens.*\(2, 0, 32\)"),
        "4d mask": ({"attention_mask": torch.ones(2, 1, 7, 7)}, r"`attention_mask`.*\(2, 1, 7, 7\)"),
        "1d mask": ({"attention_mask": torch.ones(7)}, r"`attention_mask`.*\(7,\)"),
        "short mask": ({"attention_mask": torch.ones(2, 6)}, r"`attention_mask`.*\(2, 6\).*\(2, 7\)"),
        "mask of other rows": ({"attention_mask": torch.ones(3, 7)}, r"`attention_mask`.*\(3, 7\).*\(2, 7\)"),
        "short positions": ({"position_ids": torch.arange(6)[None]}, r"`position_ids`.*\(1, 6\).*\(2, 7\)"),
        "1d positions": ({"position_ids": torch.arange(7)}, r"`position_ids`.*\(7,\).*\(2, 7\)"),
        "positions of other rows": ({"position_ids": torch.zeros(3, 7)}, r"`position_ids`.*\(3, 7\).*\(2, 7\)"),
    }


@pytest.mark.parametrize("case", list(bad_inputs()))
def test_bad_input_is_refused(case):
    """A `ValueError` names the argument, its shape and the shape that was expected; a cache is left as it was."""
    model = tiny_model()
    cache = model(random_ids(2, 12)).past_key_values
    inputs, match = bad_inputs()[case]
    if not inputs.keys() & {"input_ids", "inputs_embeds"} and inputs:
        inputs["input_ids"] = random_ids(2, 7)
    with pytest.raises(ValueError, match=match):
        model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 12


# Compilation


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_compiled_decode_step_gives_the_same_and_stops_compiling(backend):
    """Logits equal those of the uncompiled step across boundaries; after two nothing is compiled anew.

    The step that completes a segment is compiled at the first boundary for its sizes, and at the second for any.
    """
    model, ids = tiny_model(), random_ids(1, LONG)
    expected = run(model, ids, cuts=range(7, LONG))
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    cache = InfiniCache(model.config)
    logits = [model(ids[:, :7], past_key_values=cache).logits]
    for token in range(7, LONG):
        stance = "fail_on_recompile" if token > 7 + 2 * N else "default"
        with torch.compiler.set_stance(stance):
            logits.append(compiled(ids[:, token : token + 1], past_key_values=cache).logits)
    torch.compiler.reset()
    assert_close(torch.cat(logits, dim=1), expected)


@torch.no_grad()
def test_layers_are_compiled_once_for_all():
    """Each on its own, as `accelerate.utils.compile_regions` does: one graph without a memory, one with, whatever the layers."""
    model, ids = tiny_model(num_hidden_layers=4), random_ids(2, 4 * N)
    expected = run(model, ids, cuts=[2 * N])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    assert_close(run(model, ids, cuts=[2 * N]), expected)
    assert len(graphs) == 2
    torch.compiler.reset()


# Sequence classification


@torch.no_grad()
def test_classification_sees_through_padding_and_survives_saving(tmp_path):
    """The scores of a text of several segments are those of its last token, padded on either side or not, in a batch,
    and after loading.
    """
    model = InfiniLlamaForSequenceClassification(tiny_config(num_labels=3)).eval()
    ids, other = random_ids(1, 17), random_ids(1, 26)
    expected = model(ids).logits
    assert expected.shape == (1, 3)
    assert_close(expected, model.score(model.model(ids).last_hidden_state[:, -1]))
    for padding in ((9, 0), (0, 9)):
        batch = torch.cat([F.pad(ids, padding), other])
        assert_close(model(batch, attention_mask=(batch != 0).long()).logits[:1], expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is InfiniLlamaForSequenceClassification
    assert_equal(loaded(ids).logits, expected)


# Gradient checkpointing


def enable_checkpointing(model: torch.nn.Module, **kwargs) -> None:
    # Transformers 5.22 renamed it.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(kwargs or None)


def loss_and_gradients(model: torch.nn.Module, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("tokens", [N, 3 * N, LONG], ids=["one segment", "one block", "several blocks"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_gradient_checkpointing_changes_no_gradient(rule, tokens, use_reentrant):
    """Loss and every gradient are those of the run that keeps its activations, and each block but the last, with which
    the backward pass begins, is computed twice; with a cache, with which a text may go on, the last one too.
    """
    model = tiny_model(memory_update=rule).train()
    inputs = {"input_ids": random_ids(3, tokens), "attention_mask": padding_masks()["left"][:, :tokens]}
    expected = loss_and_gradients(model, **inputs)
    # A gradient of zeros where nothing is read: data-parallel training waits for one of every parameter.
    assert expected["model.layers.0.self_attn.memory_gate.bias"].any() == (tokens > N)
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    model(**inputs)
    without_checkpoints = len(calls)
    enable_checkpointing(model, use_reentrant=use_reentrant)
    calls.clear()
    assert_close(loss_and_gradients(model, **inputs), expected)
    assert len(calls) == 2 * without_checkpoints - 1
    calls.clear()
    assert_close(loss_and_gradients(model, **inputs, past_key_values=InfiniCache(model.config)), expected)
    assert len(calls) == 2 * without_checkpoints


def test_gradient_checkpointing_gives_every_output():
    """Hidden states and attentions of several blocks are there, and the same."""
    model, ids = tiny_model(attn_implementation="eager").train(), random_ids(2, LONG)
    outputs = []
    for _ in range(2):
        out = model(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
        outputs.append((out.logits, out.hidden_states, out.attentions))
        enable_checkpointing(model)
    assert_close(*outputs)


# NaN and inf


def assert_finite(model, ids, **inputs) -> None:
    """Logits, state and gradients are finite, and there is a gradient."""
    out = model(ids, **inputs)
    assert out.logits.isfinite().all()
    assert all(x.isfinite().all() for state in out.past_key_values for x in state)
    out.logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    assert gradients["lm_head.weight"].any()


@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("tokens", [1, N - 1, N, N + 1, LONG])
def test_every_length_is_finite(tokens, rule):
    """From one token on, with segments just open, just full and just begun."""
    assert_finite(tiny_model(memory_update=rule), random_ids(2, tokens))


@pytest.mark.parametrize("cuts", CUTS)
@torch.no_grad()
def test_a_row_of_padding_harms_nobody(cuts):
    """Rows of padding only, alone or beside others, are finite, leave the others as they are, and can begin later."""
    model, ids = tiny_model(), random_ids(2, LONG)
    alone = run(model, ids[:1], cuts=CUTS[cuts])
    mask = torch.ones_like(ids)
    mask[1] = 0
    cache = model(ids, attention_mask=torch.zeros_like(ids)).past_key_values
    assert not any(x.any() for state in cache for x in state)
    assert_close(model(ids, past_key_values=cache).logits[:1], model(ids[:1]).logits)
    assert_close(run(model, ids, mask, cuts=CUTS[cuts])[:1], alone)
    cache = model(ids, attention_mask=mask).past_key_values
    assert not any(x[1].any() for state in cache for x in state)
    assert_close(model(ids, past_key_values=cache).logits[1], model(ids[1:]).logits[0])


def test_gradients_of_a_row_of_padding_are_finite():
    """Also where a whole batch is padding."""
    ids = random_ids(2, LONG)
    for mask in (torch.zeros_like(ids), torch.tensor([[1], [0]]).expand_as(ids)):
        assert_finite(tiny_model(), ids, attention_mask=mask)


# sigma(k) from far too large, through 1e-13 and 1e-22, to denormal numbers and to 0.
@pytest.mark.parametrize("key", [1e6, 1e3, 20, -20, -30, -50, -60, -95, -100, -1000])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_keys_of_any_size_are_finite(rule, key):
    """The division by sigma(k) z is safe for any z, forward and backward."""
    model = tiny_model(memory_update=rule, attention_bias=True)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.k_proj.bias, key)
    assert_finite(model, random_ids(2, LONG))


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_projections_of_any_size_are_finite(rule, projection):
    """Queries, keys and values in the thousands, of either sign."""
    model = tiny_model(memory_update=rule)
    for layer in model.model.layers:
        getattr(layer.self_attn, projection).weight.data *= 1e3
    assert_finite(model, random_ids(2, LONG))


@pytest.mark.parametrize("key", [20, -20, -30])
@pytest.mark.parametrize("rule", ["linear", "delta"])
@torch.no_grad()
def test_keys_of_any_size_are_read_exactly(rule, key):
    """What counts are the ratios between keys: float32 agrees with float64 where all of them are tiny or large."""
    model, ids = tiny_model(memory_update=rule, attention_bias=True), random_ids(2, LONG)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.k_proj.bias, key)
    logits = model(ids).logits
    assert_reads_memory(model, ids)
    assert_close(logits, model.double()(ids).logits.float())
