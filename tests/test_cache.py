"""`InfiniCache` as a thing its user owns: continued, reset, branched, moved, saved; refused where it cannot go on."""

import contextlib
import copy
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tiny import base_llama, random_ids, rounding, tiny_config, tiny_model
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, StaticCache

from infini_llama import cache_infini
from infini_llama.cache_infini import MAX_WAITING, InfiniCache, InfiniCacheLayer
from infini_llama.memory_infini import MemoryState
from infini_llama.modeling_infini import InfiniLlamaForCausalLM

RULES = ["linear", "delta", "least_squares", "none"]
# The segments of the tiny model have five tokens. No memory yet; a memory and an open segment; a memory and none open.
PREFIXES = [3, 12, 10]
# The same program on the same numbers.
EXACT = {"rtol": 0, "atol": 0}


@torch.no_grad()
def read(model: InfiniLlamaForCausalLM, ids: torch.Tensor, **kwargs) -> InfiniCache:
    cache = InfiniCache(model.config)
    model(ids, past_key_values=cache, **kwargs)
    return cache


@torch.no_grad()
def go_on(model: InfiniLlamaForCausalLM, cache: InfiniCache, ids: torch.Tensor, width: int = 1) -> torch.Tensor:
    """The logits of a text read in pieces of `width`. One token at a time, every boundary is met while decoding."""
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(width, dim=1)], dim=1)


def ragged(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of these lengths, padded left."""
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return random_ids(*mask.shape) * mask, mask


def state(cache: InfiniCache) -> list[dict[str, torch.Tensor]]:
    return [layer.tensors() for layer in cache.layers]


def assert_written(cache: InfiniCache) -> None:
    """Rules out that a test passes on a memory that nothing was written into."""
    for memory in cache:
        assert (memory.normalizer.sum(-1) > 0).all()
        assert (memory.matrix.abs().amax((-2, -1)) > 0.01).all()


# Pass and continue


def test_an_unused_cache_is_empty() -> None:
    """Before the first token there is nothing: no rows, no tokens, no bytes; and row operations are no error."""
    cache = InfiniCache(tiny_config(num_hidden_layers=3))
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.to("cpu").reset()
    assert (len(cache), cache.get_seq_length(), cache.batch_size, cache.nbytes) == (3, 0, -1, 0)
    assert list(cache) == [None] * 3
    assert cache.get_mask_sizes(4, 0) == (4, 0)
    assert cache.get_max_length() == -1


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("rule", RULES)
def test_a_cache_stands_for_the_text_before_it(rule: str, prefix: int) -> None:
    """The logits of what follows are those of one forward over everything; the cache is passed on, not replaced."""
    model, ids = tiny_model(memory_update=rule), random_ids(2, prefix + 9)
    cache = read(model, ids[:, :prefix])
    copied = copy.deepcopy(cache)
    expected = model(ids).logits[:, prefix:]
    torch.testing.assert_close(go_on(model, cache, ids[:, prefix:]), expected, **rounding(rule))
    if (rule, prefix) != ("none", 10):  # no memory, and no open segment
        assert not torch.allclose(model(ids[:, prefix:]).logits, expected, atol=0.01), "the text before must matter"
    output = model(ids[:, prefix:], past_key_values=copied)
    assert output.past_key_values is copied
    torch.testing.assert_close(output.logits, expected, **rounding(rule))
    if rule != "none":
        assert_written(cache)


def test_the_library_builds_our_layers_from_a_config() -> None:
    """`DynamicCache(config=model.config)` has our layers, and gives the same logits as an `InfiniCache`."""
    model, ids = tiny_model(), random_ids(2, 21)
    cache = DynamicCache(config=model.config)
    assert [type(layer) for layer in cache.layers] == [InfiniCacheLayer] * 2
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
    torch.testing.assert_close(
        go_on(model, cache, ids[:, 12:]), go_on(model, read(model, ids[:, :12]), ids[:, 12:]), **EXACT
    )


def test_the_length_counts_padding_and_the_timelines_do_not() -> None:
    """`generate` cuts prompts by `get_seq_length`, in columns; the rows stand where their own tokens end."""
    model = tiny_model()
    ids, mask = ragged(4, 13, 8)
    cache = read(model, ids, attention_mask=mask)
    assert cache.get_seq_length() == cache.get_seq_length(1) == 13
    assert cache.batch_size == 3
    assert cache.layers[0].timeline.positions == (3, 12, 7)
    assert cache.layers[0].timeline.filled == (4, 3, 3)
    # Four slots of the open segments and two new ones, after the nine columns that are not looked at any more.
    assert cache.get_mask_sizes(2, 0) == (6, 9)


def test_a_call_of_padding_changes_nothing_but_the_count_of_columns() -> None:
    """Padding has no position: a call that holds nothing else leaves every row where it was."""
    model = tiny_model()
    ids, mask = ragged(4, 13, 8)
    cache = read(model, ids, attention_mask=mask)
    padded = copy.deepcopy(cache)
    with torch.no_grad():
        model(torch.zeros(3, 7, dtype=torch.int64), attention_mask=torch.zeros(3, 7), past_key_values=padded)
    assert padded.get_seq_length() == 20
    question = random_ids(3, 6)
    torch.testing.assert_close(go_on(model, padded, question), go_on(model, cache, question), **rounding())


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_cache_written_in_inference_mode_goes_on_outside_it(grad: bool, prefix: int) -> None:
    """Serving writes in inference mode; decoding under `no_grad` and training on the question both work after it."""
    model, ids = tiny_model(), random_ids(1, prefix + 9)
    cache = InfiniCache(model.config)
    with torch.inference_mode():
        model(ids[:, :prefix], past_key_values=cache)
    context = contextlib.nullcontext() if grad else torch.no_grad()
    with context:
        logits = [model(piece, past_key_values=cache).logits for piece in ids[:, prefix:].split(2, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits[:, prefix:], **rounding())
    if grad:
        sum(x.square().sum() for x in logits).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_gradients_flow_through_a_cache(rule: str, prefix: int) -> None:
    """A loss on the second of two calls has the gradients, in weights and in the first call's input, of a single call.

    After ten tokens no segment is open: what reaches the first call does so through the memory.
    """
    model, ids = tiny_model(memory_update=rule), random_ids(1, 21)
    # A direction of its own for each logit: their plain sum of squares hardly depends on the text before.
    cotangent = torch.randn(1, 21 - prefix, model.config.vocab_size)

    def gradients(widths: list[int]) -> dict[str, torch.Tensor]:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        cache = InfiniCache(model.config)
        logits = [model(inputs_embeds=x, past_key_values=cache).logits for x in embeds.split(widths, dim=1)]
        loss = (torch.cat(logits, dim=1)[:, prefix:] * cotangent).sum()
        names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if "embed_tokens" not in n])
        values = torch.autograd.grad(loss, [*parameters, embeds])
        return dict(zip([*names, "inputs_embeds"], values))

    actual, expected = gradients([prefix, 4, 21 - prefix - 4]), gradients([21])
    assert (expected["inputs_embeds"][:, :prefix].abs().amax(-1) > 1e-3).all(), "every first token must matter"
    assert all(x.abs().max() > 1e-2 for x in expected.values())
    # Sums of float32 over all tokens, on gradients of up to 100.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_evaluation_between_two_training_calls_keeps_the_gradients() -> None:
    """A `no_grad` call on a cache does not overwrite what the backward pass of an earlier call needs."""
    model, ids = tiny_model(), random_ids(1, 12)

    def gradient(evaluate: bool) -> torch.Tensor:
        model.zero_grad()
        cache = InfiniCache(model.config)
        loss = sum(model(piece, past_key_values=cache).logits.square().sum() for piece in ids[:, :8].split(2, dim=1))
        if evaluate:
            go_on(model, cache, ids[:, 8:])
        loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), **EXACT)


# The life cycle


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_reset_cache_equals_a_fresh_one(prefix: int) -> None:
    """After `reset` nothing of the old text is left: other text, rows, segment length and write rule are welcome."""
    model, ids = tiny_model(), random_ids(3, 21)
    cache = read(model, random_ids(2, prefix))
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes) == (0, -1, 0)
    model.config.segment_length, model.config.memory_update = 4, "linear"
    fresh = InfiniCache(model.config)
    torch.testing.assert_close(go_on(model, cache, ids, width=7), go_on(model, fresh, ids, width=7), **EXACT)
    torch.testing.assert_close(state(cache), state(fresh), **EXACT)
    assert_written(cache)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_branches_do_not_disturb_each_other(prefix: int) -> None:
    """Copies of one cache go on with different text, in turns; each gets, to the bit, what it gets alone."""
    model, ids, questions = tiny_model(), random_ids(1, prefix), random_ids(3, 1, 9)
    expected = [go_on(model, read(model, ids), question) for question in questions]
    original = read(model, ids)
    caches = [copy.deepcopy(original), copy.deepcopy(original), original]
    logits = [[], [], []]
    for step in range(9):
        for branch, cache in enumerate(caches):
            logits[branch].append(go_on(model, cache, questions[branch, :, step : step + 1]))
    for branch in range(3):
        torch.testing.assert_close(torch.cat(logits[branch], dim=1), expected[branch], **EXACT)
    assert not torch.allclose(expected[0], expected[1], atol=0.1)


ROW_OPERATIONS: dict[str, tuple[Callable[[InfiniCache], None], list[int]]] = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@pytest.mark.parametrize("operation", ROW_OPERATIONS)
@pytest.mark.parametrize("lengths", [(12, 12, 12), (10, 10, 10), (4, 13, 8)])
@pytest.mark.parametrize("rule", RULES)
def test_rows_move_with_all_their_state(rule: str, lengths: tuple[int, ...], operation: str) -> None:
    """Repeated, selected and reordered rows go on as each of them does alone, also from different timelines."""
    model = tiny_model(memory_update=rule)
    ids, mask = ragged(*lengths)
    cache = read(model, ids, attention_mask=mask)
    operate, rows = ROW_OPERATIONS[operation]
    operate(cache)
    assert cache.batch_size == len(rows)
    questions = random_ids(len(rows), 8)
    logits = go_on(model, cache, questions)
    for i, row in enumerate(rows):
        alone = go_on(model, read(model, ids[row : row + 1, mask[row] == 1]), questions[i : i + 1])
        torch.testing.assert_close(logits[i : i + 1], alone, **rounding(rule))


@pytest.mark.parametrize("rule", ["linear", "delta", "least_squares"])
def test_decoded_tokens_wait_to_be_written_and_are_in_time(rule: str) -> None:
    """At most 64 of them, whatever happens meanwhile; and memory and logits are those of a text read in one call."""
    model, ids = tiny_model(memory_update=rule, segment_length=100), random_ids(2, 330)
    cache, logits = read(model, ids[:, :130]), []
    for place in range(130, 330):
        logits.append(go_on(model, cache, ids[:, place : place + 1]))
        waiting = {len(layer._waiting) for layer in cache.layers}
        assert waiting <= set(range(1 if place % 100 == 99 else MAX_WAITING))
        if place == 250:
            assert min(waiting) > 0
            for _ in range(2):
                cache.reorder_cache(torch.tensor([1, 0]))
    whole = model(ids, use_cache=True)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits[:, 130:].detach(), **rounding(rule))
    for memory, expected in zip(cache, whole.past_key_values):
        torch.testing.assert_close(memory, expected.map(torch.Tensor.detach), **rounding(rule))


def test_nothing_can_be_cropped() -> None:
    """`crop(0)` does nothing; tokens cannot be taken out again, and the error says what to do instead."""
    model, ids = tiny_model(), random_ids(1, 12)
    cache = read(model, ids)
    cache.crop(0)
    for amount in (-1, 5):
        with pytest.raises(ValueError, match=rf"`crop\({amount}\)`.*copy.deepcopy\(cache\)"):
            cache.crop(amount)
    torch.testing.assert_close(state(cache), state(read(model, ids)), **EXACT)
    assert not cache.is_croppable


class RecordMoves(TorchFunctionMode):
    """Notes which tensors are sent to which device; the only device that all machines have is the one they are on."""

    def __init__(self):
        super().__init__()
        self.moves: set[tuple[int, str]] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to:
            self.moves.add((args[0].data_ptr(), str(args[1])))
        return func(*args, **kwargs or {})


def test_all_state_is_offloaded_and_comes_back() -> None:
    """`offload` sends every tensor to the CPU, `prefetch` back to the device of the layer, and the text goes on."""
    model, ids = tiny_model(), random_ids(1, 21)
    cache = read(model, ids[:, :12])
    expected = go_on(model, copy.deepcopy(cache), ids[:, 12:])
    layer = cache.layers[1]
    tensors = [layer.keys, layer.values, *layer.memory, *layer.pending]
    with RecordMoves() as record:
        cache.offload(1)
    assert record.moves == {(x.data_ptr(), "cpu") for x in tensors}
    layer.prefetch()
    torch.testing.assert_close(go_on(model, cache, ids[:, 12:]), expected, **EXACT)
    layer.device = torch.device("meta")
    layer.prefetch()
    assert {x.device.type for x in layer.tensors().values()} == {"meta"}


def test_to_moves_every_tensor_of_every_layer() -> None:
    """`cache.to(device)` returns the cache with all its state there, and `prefetch` no longer brings it back."""
    cache = read(tiny_model(), random_ids(1, 12))
    names = [list(tensors) for tensors in state(cache)]
    assert cache.to("meta") is cache
    cache.layers[0].prefetch()
    assert [list(tensors) for tensors in state(cache)] == names
    assert {x.device.type for tensors in state(cache) for x in tensors.values()} == {"meta"}


@pytest.mark.parametrize(("rule", "width"), [*itertools.product(RULES, [7, 1000]), ("delta", 1)])
def test_the_size_does_not_depend_on_the_number_of_tokens(rule: str, width: int) -> None:
    """Forty segments take the bytes of four, in `nbytes` and in what the tensors really hold on to."""
    model = tiny_model(memory_update=rule)

    def sizes(num_tokens: int) -> tuple[int, int]:
        cache = InfiniCache(model.config)
        go_on(model, cache, random_ids(1, num_tokens), width=width)
        storages = [x.untyped_storage() for tensors in state(cache) for x in tensors.values()]
        return cache.nbytes, sum({x.data_ptr(): x.nbytes() for x in storages}.values())

    few, many = sizes(4 * 5 + 2), sizes(40 * 5 + 2)
    assert many == few
    heads, head_dim = 2, 8
    memory = 0 if rule == "none" else 2 * heads * head_dim * (head_dim + (head_dim if rule == "least_squares" else 1))
    open_segment = 2 * 2 * heads * head_dim
    assert many[0] == 2 * 4 * (memory + open_segment)  # layers, bytes of float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "autocast"])
def test_the_memory_is_float32(dtype: torch.dtype | str) -> None:
    """What is remembered is float32 in models of any precision and under autocast, after prefill and decoding."""
    model, ids = tiny_model(), random_ids(2, 17)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast")
    cache = InfiniCache(model.config)
    if dtype != "autocast":
        model = model.to(dtype)
    with autocast:
        for piece in (ids[:, :12], *ids[:, 12:].split(1, dim=1)):
            go_on(model, cache, piece, width=12)
            states = [part for layer in cache.layers for part in (layer.memory, layer.pending)]
            assert {type(part) for part in states} == {MemoryState}
            assert {x.dtype for part in states for x in part} == {torch.float32}
    assert_written(cache)


# Save and load


def saved(model: InfiniLlamaForCausalLM, path: Path, num_tokens: int = 12) -> Path:
    read(model, random_ids(1, num_tokens)).save(path)
    return path


@pytest.mark.parametrize("lengths", [(12,), (10,), (4, 13, 8)], ids=["open", "closed", "ragged"])
@pytest.mark.parametrize("rule", RULES)
def test_a_loaded_memory_goes_on_as_the_saved_one(rule: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    """Logits and greedy text after a loaded memory are those after the memory that was saved; no text is needed."""
    model = tiny_model(memory_update=rule)
    ids, mask = ragged(*lengths)
    cache, path = read(model, ids, attention_mask=mask), tmp_path / "memory.safetensors"
    cache.save(path)
    loaded, question = InfiniCache.load(path, model), random_ids(len(lengths), 3)
    assert isinstance(loaded, InfiniCache)
    torch.testing.assert_close(state(loaded), state(cache), **EXACT)
    assert loaded.layers[1].timeline == cache.layers[1].timeline

    texts = [
        model.generate(question, past_key_values=copy.deepcopy(x), max_new_tokens=9, do_sample=False)
        for x in (loaded, cache)
    ]
    assert torch.equal(*texts)
    actual, expected = go_on(model, loaded, question), go_on(model, cache, question)
    torch.testing.assert_close(actual, expected, **EXACT)
    assert not torch.allclose(model(question).logits, expected, atol=0.01) or (rule, lengths) == ("none", (10,))


def test_a_memory_can_be_saved_from_a_forward_with_gradients(tmp_path: Path) -> None:
    """A forward without `no_grad` can be saved too; what is loaded carries no graph."""
    model, path = tiny_model(), tmp_path / "memory.safetensors"
    cache = model(random_ids(1, 12)).past_key_values
    assert cache.layers[1].memory.matrix.requires_grad
    cache.save(path)
    assert not any(x.requires_grad for tensors in state(InfiniCache.load(path, model)) for x in tensors.values())


def test_saving_a_loaded_memory_gives_the_same_file(tmp_path: Path) -> None:
    """Nothing is lost on the way through a file, and the paths may be strings."""
    model = tiny_model()
    first, second = saved(model, tmp_path / "first"), tmp_path / "second"
    InfiniCache.load(str(first), model).save(str(second))
    assert header_of(first) == header_of(second)  # safetensors writes the metadata in any order


@pytest.mark.parametrize("rule", RULES)
def test_the_file_does_not_grow_with_the_text(rule: str, tmp_path: Path) -> None:
    """Forty segments take the file of four."""
    model = tiny_model(memory_update=rule)
    few, many = (saved(model, tmp_path / f"{n}", 5 * n + 2).stat().st_size for n in (4, 40))
    assert many == few


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["full", "interrupted"])
@pytest.mark.parametrize("old", [None, b"an older memory"], ids=["new file", "old file"])
def test_a_failed_save_leaves_the_disk_as_it_was(
    old: bytes | None, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file appears whole or not at all: an old one stays as it is, and no half of a new one is left over."""
    path = tmp_path / "memory.safetensors"
    if old is not None:
        path.write_bytes(old)

    def fail(source, target):
        assert Path(source).stat().st_size > 1000, "the new file is there, under another name"
        raise error

    monkeypatch.setattr(cache_infini.os, "replace", fail)
    with pytest.raises(type(error)):
        saved(tiny_model(), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({path.name: old} if old is not None else {})


def test_a_save_replaces_an_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    """The folder holds the one new file afterwards."""
    model, path = tiny_model(), tmp_path / "memory.safetensors"
    path.write_bytes(b"an older memory")
    saved(model, path)
    assert list(tmp_path.iterdir()) == [path]
    assert InfiniCache.load(path, model).get_seq_length() == 12


@pytest.mark.parametrize("name", ["missing/memory", "folder"])
def test_a_save_that_cannot_be_written_says_where_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    """A missing folder, or a folder in place of the file: the error has the path, and the disk stays as it was."""
    (tmp_path / "folder").mkdir()
    with pytest.raises((OSError, SafetensorError), match=str(tmp_path / name.split("/")[0])):
        saved(tiny_model(), tmp_path / name)
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_an_empty_cache_is_not_saved(tmp_path: Path) -> None:
    """There is nothing to save before the first token, and after a reset."""
    model = tiny_model()
    cache = read(model, random_ids(1, 12))
    cache.reset()
    for empty in (InfiniCache(model.config), cache):
        with pytest.raises(ValueError, match="empty.*Run the model"):
            empty.save(tmp_path / "memory.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "here", "there", "overrides"),
    [
        ("segment_length", 7, 5, {"segment_length": 7}),
        ("memory_update", "'linear'", "'delta'", {"memory_update": "linear"}),
        ("num_layers", 3, 2, {"num_hidden_layers": 3}),
        ("num_key_value_heads", 4, 2, {"num_key_value_heads": 4}),
        ("head_dim", 4, 8, {"head_dim": 4}),
    ],
)
def test_a_memory_of_another_shape_is_refused(name: str, here, there, overrides: dict, tmp_path: Path) -> None:
    """The error names what differs, in the file and in the model."""
    path = saved(tiny_model(), tmp_path / "memory.safetensors")
    other = tiny_model(**overrides)
    with pytest.raises(ValueError, match=f"differs in: {name} {there} in the file, {here} in the model. Load it into"):
        InfiniCache.load(path, other)


def train(model: InfiniLlamaForCausalLM, *names: str) -> None:
    """One step of the smallest learning rate in use, on a checkpoint that, like most, came in bfloat16."""
    parameters = [p for n, p in model.named_parameters() if any(name in n for name in names)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    ids = random_ids(1, 12)
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def permute(model: InfiniLlamaForCausalLM, name: str) -> None:
    with torch.no_grad():
        weight = model.get_parameter(f"model.layers.1.self_attn.{name}.weight")
        weight.copy_(weight.roll(1, dims=0))


@pytest.mark.parametrize(
    ("change", "num_layers"),
    [
        (lambda model: train(model, "k_proj"), 2),
        (lambda model: train(model, "layers.1.self_attn.v_proj"), 1),
        (lambda model: permute(model, "k_proj"), 1),
        (lambda model: permute(model, "v_proj"), 1),
    ],
    ids=["keys trained", "values of a layer trained", "keys permuted", "values permuted"],
)
def test_a_memory_of_other_projections_is_refused(change: Callable, num_layers: int, tmp_path: Path) -> None:
    """Keys and values mean nothing to other key and value projections: one small training step is enough to refuse."""
    model = tiny_model().bfloat16().float()
    path = saved(model, tmp_path / "memory.safetensors")
    change(model)
    with pytest.raises(ValueError, match=f"differs in: key and value projections, in {num_layers} of 2 layers"):
        InfiniCache.load(path, model)


@pytest.mark.parametrize("names", [["q_proj"], ["mlp"], ["memory_gate", "o_proj", "lm_head"]])
def test_a_memory_serves_a_model_whose_other_weights_changed(names: list[str], tmp_path: Path) -> None:
    """What was written depends on the text's keys and values; only the projections that make them are compared."""
    model = tiny_model().bfloat16().float()
    path, question = saved(model, tmp_path / "memory.safetensors"), random_ids(1, 7)
    before = go_on(model, InfiniCache.load(path, model), question)
    train(model, *names)
    after = go_on(model, InfiniCache.load(path, model), question)
    assert not torch.equal(before, after)


def test_a_memory_loads_into_the_same_checkpoint_in_bfloat16(tmp_path: Path) -> None:
    """What a float32 model wrote, the same checkpoint loaded in bfloat16 goes on with."""
    model, ids, load_dtype = tiny_model(), random_ids(1, 21), torch.bfloat16
    cache, path = read(model, ids[:, :12]), tmp_path / "memory.safetensors"
    cache.save(path)
    half = copy.deepcopy(model).to(load_dtype)
    loaded = InfiniCache.load(path, half)
    layer = loaded.layers[1]
    assert layer.keys.dtype == layer.values.dtype == load_dtype
    assert {x.dtype for part in (layer.memory, layer.pending) for x in part} == {torch.float32}
    actual, expected = go_on(half, loaded, ids[:, 12:]).float(), go_on(model, cache, ids[:, 12:])
    without = go_on(model, InfiniCache(model.config), ids[:, 12:])
    # Rounding of weights and activations to 8 bits in two layers; far from what the text before changes.
    assert (actual - expected).abs().max() < 0.1 < (without - expected).abs().max()


@pytest.mark.parametrize("load_dtype", [torch.float32, torch.float16], ids=str)
def test_a_memory_of_a_bfloat16_model_loads_into_other_precisions(load_dtype: torch.dtype, tmp_path: Path) -> None:
    """What a bfloat16 checkpoint wrote, the same weights in float32 or float16 go on with."""
    model = tiny_model().bfloat16()
    path = saved(model, tmp_path / "memory.safetensors")
    loaded = InfiniCache.load(path, model.to(load_dtype))
    assert loaded.layers[0].keys.dtype == load_dtype


def header_of(path: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, and its data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("share", [0, 0.0005, 0.002, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    """A file cut off anywhere, from nothing to all but a few bytes, is refused and called by its name."""
    model = tiny_model()
    path = saved(model, tmp_path / "memory.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="memory.safetensors' is truncated or not a safetensors file"):
        InfiniCache.load(path, model)


def test_an_altered_byte_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    """Any changed byte, in tensors, names, shapes or metadata, is refused with a ValueError that names the file."""
    model = tiny_model()
    path = saved(model, tmp_path / "memory.safetensors")
    content = path.read_bytes()
    (header_length,) = struct.unpack("<Q", content[:8])
    data_start = 8 + header_length
    for place in [*range(data_start), *range(data_start, len(content), 17), len(content) - 1]:
        altered = bytearray(content)
        altered[place] ^= 1
        path.write_bytes(altered)
        with pytest.raises(ValueError, match="memory.safetensors' (is|was)"):
            InfiniCache.load(path, model)
            pytest.fail(f"byte {place} of {len(content)} was altered and nobody noticed")


@pytest.mark.parametrize("key", ["format", "description", "checksum"])
@pytest.mark.parametrize("value", [None, "something else"], ids=["missing", "changed"])
def test_altered_metadata_is_refused(key: str, value: str | None, tmp_path: Path) -> None:
    """A file whose description of itself is changed or incomplete is refused."""
    model = tiny_model()
    path = saved(model, tmp_path / "memory.safetensors")
    header, data = header_of(path)
    header["__metadata__"].pop(key)
    if value is not None:
        header["__metadata__"][key] = value
    write_header(path, header, data)
    with pytest.raises(ValueError, match="was altered|is not a memory of this library"):
        InfiniCache.load(path, model)


def test_a_moved_timeline_is_refused(tmp_path: Path) -> None:
    """Where the text stood is covered by the checksum: a memory cannot be passed off as that of a longer text."""
    model = tiny_model()
    path = saved(model, tmp_path / "memory.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    assert tensors["timeline.seen"][0] == 12
    tensors["timeline.seen"][0] += 5
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="was altered"):
        InfiniCache.load(path, model)


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Somebody else's safetensors file, no safetensors file, a folder, no file: each is called what it is."""
    model = tiny_model()
    foreign, text = tmp_path / "foreign", tmp_path / "text"
    save_file({"weight": torch.zeros(3)}, foreign)
    text.write_text("Once upon a time there was a memory.")
    messages = {foreign: "not a memory of this library", text: "not a safetensors file", tmp_path: "not a safetensors"}
    for path, message in messages.items():
        with pytest.raises(ValueError, match=message):
            InfiniCache.load(path, model)
    with pytest.raises(FileNotFoundError, match="no memory file at .*nowhere"):
        InfiniCache.load(tmp_path / "nowhere", model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # read by PEFT, not by us
def test_a_memory_loads_for_the_inner_model_and_for_an_adapter(tmp_path: Path) -> None:
    """The projections are found without a head and below PEFT, and an adapter on them counts as a change."""
    peft = pytest.importorskip("peft", reason="peft comes with the development extras")
    model = tiny_model()
    path = saved(model, tmp_path / "memory.safetensors")
    assert InfiniCache.load(path, model.model).get_seq_length() == 12

    def adapted(name: str):
        config = peft.LoraConfig(target_modules=[name], init_lora_weights=False)
        return peft.get_peft_model(copy.deepcopy(model), config)

    assert InfiniCache.load(path, adapted("q_proj")).get_seq_length() == 12
    with pytest.raises(ValueError, match="key and value projections, in 2 of 2 layers"):
        InfiniCache.load(path, adapted("v_proj"))


# What a model refuses to go on with


def test_a_cache_remembers_what_it_was_written_with(tmp_path: Path) -> None:
    """Segment length and write rule must not change under a cache, neither a living one nor a loaded one."""
    model = tiny_model()
    cache, path, ids = read(model, random_ids(1, 12)), tmp_path / "memory.safetensors", random_ids(1, 9)
    cache.save(path)
    for name, value in (("segment_length", 7), ("memory_update", "linear"), ("memory_update", "none")):
        old = getattr(model.config, name)
        loaded = InfiniCache.load(path, model)
        setattr(model.config, name, value)
        for written in (cache, loaded):
            with pytest.raises(ValueError, match=f"written with {name}={old!r}, but .* {value!r}. Set it back"):
                model(ids, past_key_values=written)
        setattr(model.config, name, old)
    assert state(cache)[0].keys() == state(read(model, random_ids(1, 12)))[0].keys()
    torch.testing.assert_close(go_on(model, cache, ids), go_on(model, InfiniCache.load(path, model), ids), **EXACT)


def test_the_block_may_change_under_a_cache() -> None:
    """How many segments go through a layer at once is no property of what was written."""
    model, ids = tiny_model(), random_ids(1, 40)
    cache = read(model, ids[:, :12])
    model.config.block_segments = 1
    logits = go_on(model, cache, ids[:, 12:], width=28)
    torch.testing.assert_close(logits, model(ids).logits[:, 12:], **rounding())


def offloaded_cache(model: torch.nn.Module) -> DynamicCache:
    """Not by `offloading=True`, which opens a stream: without a driver, PyTorch for CUDA cannot."""
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    return cache


REFUSED_CACHES: dict[str, tuple[Callable, str]] = {
    "rows": (lambda model: read(model, random_ids(3, 12)), r"holds 3 rows, the input 2.*batch_repeat_interleave"),
    "layers": (lambda model: InfiniCache(tiny_config(num_hidden_layers=3)), r"has 3 layers, the model 2"),
    "lazy": (lambda model: DynamicCache(), "has 0 layers, the model 2"),
    "full attention": (lambda model: DynamicCache(config=base_llama(model).config), "is a DynamicCache"),
    "static": (lambda model: StaticCache(config=base_llama(model).config, max_cache_len=64), "is a StaticCache"),
    "offloaded": (offloaded_cache, "is an offloaded cache"),
    "tuple": (lambda model: ((torch.zeros(2, 2, 3, 8),) * 2,) * 2, "is a tuple"),
}


@pytest.mark.parametrize("name", REFUSED_CACHES)
def test_a_cache_that_cannot_be_right_is_refused(name: str) -> None:
    """The error names the value and the remedy, and comes before anything is written."""
    model = tiny_model()
    make, message = REFUSED_CACHES[name]
    cache = make(model)
    seen = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    with pytest.raises(ValueError, match=f"`past_key_values` {message}") as error:
        model(random_ids(2, 3), past_key_values=cache)
    assert name == "rows" or "`InfiniCache(model.config)`" in str(error.value)
    assert seen is None or cache.get_seq_length() == seen
