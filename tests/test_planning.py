"""What `benchmark.py --plan` estimates from a config is what small models have, compute and keep."""

import json
import weakref

import pytest
import torch
from tiny import base_llama, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from infini_llama.cache_infini import InfiniCache
from infini_llama.configuration_infini import InfiniLlamaConfig
from infini_llama.modeling_infini import InfiniLlamaForCausalLM
from infini_llama.scripts import benchmark, planning
from infini_llama.scripts.generate import InputError

RULES = ("delta", "linear", "least_squares", "none")
DTYPES = (torch.float32, torch.bfloat16)
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
DEVICE = planning.Device(flops=1e15, bandwidth=1e12, link=1e11)
# A multiple of the block of 128, so that every estimate of a block is one of the text.
TOKENS = 128


def small_config(**overrides) -> InfiniLlamaConfig:
    """Wide enough that no estimate hangs on what it leaves out; segments of 32 tokens, blocks of four."""
    shape = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "vocab_size": 211}
    return tiny_config(**shape | {"segment_length": 32, "block_segments": 4} | overrides)


def build(config: InfiniLlamaConfig, dtype: torch.dtype = torch.float32, full: bool = False) -> torch.nn.Module:
    model = InfiniLlamaForCausalLM(config).to(dtype)
    return base_llama(model) if full else model


def random_text(config: InfiniLlamaConfig, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(1, config.vocab_size, (1, tokens))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it have made and that still exist; `peak` is the most."""

    def __init__(self):
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):  # what is first seen as an argument was there before
                self.known.add(x.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"write_gate": True},
        {"read_gate": True},
    ],
)
def test_parameters_are_counted_exactly(overrides) -> None:
    """Those of the model, tied ones once; and one layer's."""
    config = small_config(**overrides)
    model = build(config)
    assert planning.parameters(config) == sum(x.numel() for x in model.parameters())
    assert planning.layer_parameters(config) == sum(x.numel() for x in model.model.layers[0].parameters())


@pytest.mark.parametrize(("shape", "expected"), [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496)])
def test_parameters_of_large_models_are_those_that_are_published(shape, expected) -> None:
    """Llama 3's 8.03 and 70.6 billion, and a gate per query head."""
    config = InfiniLlamaConfig(**shape)
    gates = config.num_hidden_layers * config.num_attention_heads
    assert planning.parameters(config) == expected + gates


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_state_is_what_a_cache_holds(rule, dtype, tokens) -> None:
    """To the byte, wherever in a segment the text ends."""
    config = small_config(memory_update=rule)
    cache = InfiniCache(config)
    build(config, dtype)(random_text(config, tokens), past_key_values=cache)
    expected = planning.state_bytes(config, tokens % config.segment_length, dtype.itemsize)
    assert sum(expected.values()) == cache.nbytes
    if rule != "none":
        assert expected["memory"] == sum(memory.matrix.nbytes + memory.normalizer.nbytes for memory in cache)


@pytest.mark.parametrize("tokens", [TOKENS, 2 * TOKENS, 2 * TOKENS + 40])
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_flops_of_reading_are_those_that_torch_counts(rule, tokens) -> None:
    """Within 2 %: where a text ends inside a segment, the last call computes a few products otherwise."""
    config = small_config(memory_update=rule, attn_implementation="eager")  # torch counts no fused attention on a CPU
    with FlopCounterMode(display=False) as counter:
        build(config)(random_text(config, tokens), past_key_values=InfiniCache(config), logits_to_keep=1)
    parts = planning.flops(config, tokens, fused=False)
    if rule == "least_squares":  # torch does not count an inverse
        shape = config.num_hidden_layers * config.num_key_value_heads
        parts["write"] -= shape * (tokens // config.segment_length) * 2 * config.head_dim**3
    assert sum(parts.values()) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert (parts["read"] == 0) == (parts["write"] == 0) == (rule == "none")


@torch.no_grad()
def test_flops_of_full_attention_are_those_that_torch_counts() -> None:
    """Exactly, with all logits; a fused kernel leaves out what causality forbids, nearly half of the pairs."""
    config = small_config(attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        build(config, full=True)(random_text(config))
    parts = planning.flops(config, TOKENS, logits=TOKENS, full=True, fused=False)
    assert sum(parts.values()) == counter.get_total_flops()
    fused = planning.flops(config, TOKENS, full=True)
    assert fused["attention"] / parts["attention"] == pytest.approx((TOKENS + 1) / (2 * TOKENS))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_flops_of_a_training_step_are_those_that_torch_counts(rule, blocks) -> None:
    """Within 3 %: nothing is propagated into the empty memory that a text starts with. Checkpoints compute all blocks but
    the last again."""
    config = small_config(memory_update=rule, attn_implementation="eager")
    model, ids = build(config).train(), random_text(config, blocks * config.block_length)
    benchmark.checkpoint_activations(model)
    with FlopCounterMode(display=False) as counter:
        benchmark.train_step(model, ids)
    expected = planning.training_flops(config, ids.numel(), recomputed=(blocks - 1) / blocks, fused=False)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("overrides", [{}, {"intermediate_size": 384}, {"head_dim": 32, "num_key_value_heads": 4}])
def test_activations_that_training_keeps_are_those_that_autograd_saves(overrides, rule, dtype, full) -> None:
    """Within 1 %, which is scalars and bits of masks: every storage that the graph saves, once, without the weights."""
    config = small_config(memory_update=rule, **overrides)
    model, ids = build(config, dtype, full).train(), random_text(config)
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
    saved = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(input_ids=ids, labels=ids, use_cache=False)
    measured = sum(x.untyped_storage().nbytes() for x in saved.values())
    assert planning.saved_activation_bytes(config, TOKENS, dtype.itemsize, full=full) == pytest.approx(
        measured, rel=0.01
    )


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    # Within 3 % for the proportions of a Llama; heads that are wider than the hidden states show what the rotation leaves
    # behind for a moment, which is not estimated.
    [({}, 0.03), ({"intermediate_size": 384}, 0.03), ({"head_dim": 32, "num_key_value_heads": 4}, 0.15)],
)
@torch.no_grad()
def test_activations_of_reading_are_those_that_are_alive_at_once(overrides, tolerance, rule, dtype, full) -> None:
    """The peak of all tensors that a block makes on its way through the model."""
    config = small_config(memory_update=rule, **overrides)
    model = build(config, dtype, full).eval()
    with LiveBytes() as live:
        model(random_text(config), use_cache=False, logits_to_keep=1)
    expected = planning.prefill_activation_bytes(config, TOKENS, dtype.itemsize, full=full)
    assert expected == pytest.approx(live.peak, rel=tolerance)


def test_a_checkpointed_text_keeps_one_block_and_the_states_before_the_others() -> None:
    """Within 5 % (targets, masks): the plan's activations and states are what is alive before the backward pass."""
    config = small_config()
    model, ids = build(config).train(), random_text(config, 6 * config.block_length)
    benchmark.checkpoint_activations(model)
    with LiveBytes() as live:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        alive = live.now
    ours = planning.plan(config, ids.numel(), 1, "float32", DEVICE)["memory"]["training"]["ours"]
    assert loss.requires_grad
    assert ours["activations"] + ours["states before blocks"] == pytest.approx(alive, rel=0.05)
    assert ours["states before blocks"] == 5 * 2 * planning.state_bytes(config, 0, 4)["memory"]


@pytest.mark.parametrize("rule", ["delta", "linear", "least_squares"])
def test_what_devices_send_does_not_depend_on_the_length(rule) -> None:
    """Ours is one map of the memory for each of the others; ring attention sends keys and values."""
    config = InfiniLlamaConfig(**LLAMA_8B, memory_update=rule)
    short, long = (planning.communication_bytes(config, n, 8, itemsize=2) for n in (1_000_000, 10_000_000))
    numbers = {"linear": 128 * 128 + 128, "delta": 2 * 128 * 128 + 128, "least_squares": 3 * 128 * 128}
    assert short["ours"] == long["ours"] == 7 * 4 * 8 * numbers[rule]
    assert short["ring"] == 7 * 2 * 8 * 128 * 2 * 125_000 and long["ring"] == 10 * short["ring"]
    step = planning.communication_bytes(config, 1_000_000, 8, itemsize=2, training=True)
    backward = {"linear": 128 * 128 + 128, "delta": 128 * 128 + 128, "least_squares": 128 * 128}
    assert step == {"ours": short["ours"] + 7 * 4 * 8 * backward[rule], "ring": 3 * short["ring"]}
    assert planning.communication_bytes(config, 1000, 1, itemsize=2) == {"ours": 0, "ring": 0}


@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B])
def test_memory_of_a_plan_is_bounded_and_that_of_full_attention_is_not(shape) -> None:
    """On one device reading takes the same at any length; figures of the paper's setting are those that are known."""
    config = InfiniLlamaConfig(**shape)
    short, long = (planning.plan(config, n, 1, "bfloat16", DEVICE) for n in (1_048_576, 10_485_760))
    ours, full = long["memory"]["prefill"]["ours"], long["memory"]["prefill"]["full"]
    assert ours == short["memory"]["prefill"]["ours"]
    assert full["keys and values"] == 10 * short["memory"]["prefill"]["full"]["keys and values"]
    assert ours["total"] == sum(value for name, value in ours.items() if name != "total")
    if shape is LLAMA_8B:  # 16.9 MB of memory, and 137 GB of keys and values at a million tokens
        assert ours["memory and pending"] == 2 * 16_908_288
        assert short["memory"]["prefill"]["full"]["keys and values"] == 137_438_953_472
        assert long["memory"]["training"]["ours"]["optimizer"] == 12 * planning.parameters(config)
    seconds = long["seconds"]
    assert seconds["decode"]["ours"] == short["seconds"]["decode"]["ours"]
    assert seconds["prefill"]["ours"] == long["flops"]["prefill"]["ours"] / DEVICE.flops


def test_devices_share_what_can_be_shared() -> None:
    """Weights, optimizer, FLOPs and the text; not the block that each computes."""
    config = InfiniLlamaConfig(**LLAMA_8B)
    one, eight = (planning.plan(config, 1_048_576, n, "bfloat16", DEVICE) for n in (1, 8))
    ours = eight["memory"]["training"]["ours"]
    assert ours["optimizer"] == one["memory"]["training"]["ours"]["optimizer"] // 8
    assert ours["hidden states"] == 32 * 131_072 * 4096 * 2
    assert eight["seconds"]["prefill"]["ours"] == one["seconds"]["prefill"]["ours"] / 8
    activations = [x["memory"]["prefill"]["ours"]["activations"] for x in (one, eight)]
    assert activations[0] == activations[1]
    assert one["communication"]["weights"] == {"prefill": 0, "training": 0}


@pytest.mark.parametrize("kind", ["folder", "config.json", "plain Llama"])
def test_a_plan_needs_a_config_and_nothing_else(kind, tmp_path, capsys, monkeypatch) -> None:
    """No weights are there, none are loaded; every length has a table for people and a plan in the JSON document."""
    config = InfiniLlamaConfig(**LLAMA_8B)
    fields = LLAMA_8B | {"model_type": "llama", "rope_theta": 500_000.0}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields if kind == "plain Llama" else config.to_dict()), encoding="utf-8")
    monkeypatch.setattr(benchmark, "load_pair", lambda *args, **kwargs: pytest.fail("weights were asked for"))
    model = str(path if kind == "config.json" else tmp_path)
    output = tmp_path / "out"
    sizes = ["--length", "1000000", "10000000", "--devices", "8", "--output", str(output)]
    assert benchmark.main(["--plan", model, *sizes]) == 0
    out, err = capsys.readouterr()
    plans = json.loads(out.splitlines()[-1])["plan"]
    assert [plan["length"] for plan in plans] == [1_000_000, 10_000_000]
    assert plans[0]["parameters"] == planning.parameters(config) and plans[0]["dtype"] == "bfloat16"
    assert err.count("Estimates:") == 2 and "| estimated | ours | full attention |" in err
    written = (output / "benchmark.md").read_text(encoding="utf-8")
    assert "# On paper" in written and str(tmp_path) not in written
    assert not (output / "benchmark.png").exists()


def test_options_change_the_plan(tmp_path, capsys) -> None:
    """Segments, blocks, rule, dtype, and what a device does."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"model_type": "llama"}), encoding="utf-8")
    options = ["--rules", "linear", "--segment-length", "512", "--block-segments", "2", "--dtype", "float32"]
    options += ["--flops", "1e12", "--bandwidth", "1e11", "--link", "1e9"]
    assert benchmark.main([str(tmp_path), "--plan", "--length", "5000", *options]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["memory_update"], plan["segment_length"], plan["block_length"]) == ("linear", 512, 1024)
    assert plan["dtype"] == "float32" and plan["device"] == {"flops": 1e12, "bandwidth": 1e11, "link": 1e9}
    assert plan["seconds"]["prefill"]["ours"] == plan["flops"]["prefill"]["ours"] / 1e12


def test_what_is_no_config_of_a_llama_is_refused(tmp_path) -> None:
    """In words that name it and say what to do."""
    (tmp_path / "gpt.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "text.json").write_text('{"model_type": "llama", "hidden_size": "many"}', encoding="utf-8")
    for name, words in {
        "gpt.json": "model_type 'gpt2'",
        "broken.json": "no config that can be read",
        "text.json": "does not fit",
        "nowhere": "name a folder, a config.json or a Hub id",
    }.items():
        with pytest.raises(InputError, match=words):
            planning.read_config(str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "model"], "--plan needs --length"),
        (["--plan", "--length", "5"], "MODEL is missing"),
        (["model", "--length", "5"], "--length belongs to --plan"),
    ],
)
def test_incomplete_plans_are_refused(arguments, words, capsys) -> None:
    """Before anything is read, on the last line of stderr, with status 2."""
    assert benchmark.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("error: ") and words in err and not out
