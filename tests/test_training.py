"""What training needs of the model: the loss of long texts, gates that move, state carried from call to call.

The equality of gradients with and without checkpoints is in test_modeling, their equality with the oracle in test_laws.
"""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCAB_SIZE, random_ids, tiny_model
from torch.testing import assert_close

from infini_llama.cache_infini import InfiniCache

N = 5
LONG = 32  # two blocks of 15 tokens and two more tokens


def checkpointed(model: torch.nn.Module) -> torch.nn.Module:
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model.train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def some_targets(ids: torch.Tensor) -> torch.Tensor:
    """Labels with holes, and a row that has no target at all."""
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    labels[1] = -100
    return labels


# The loss of every block


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_the_loss_per_block_is_the_loss_of_all_logits(num_items):
    """With checkpoints, loss and gradients are those of Llama's own loss function on the full logits, which are not built."""
    model, ids = tiny_model().train(), random_ids(3, LONG)
    labels = some_targets(ids)
    expected = model(ids, labels=labels, num_items_in_batch=num_items)
    expected.loss.backward()
    expected_gradients = gradients(model)
    assert expected.logits.shape == (3, LONG, VOCAB_SIZE)

    widths = []
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    out = checkpointed(model)(ids, labels=labels, num_items_in_batch=num_items)
    assert out.logits is None and widths == [15, 15, 2]
    assert_close(out.loss, expected.loss)
    out.loss.backward()
    assert_close(gradients(model), expected_gradients)


def test_every_target_counts_once_across_segments_and_blocks():
    """The loss is the mean over each token's own loss; the first of each segment and of each block is among them."""
    model, ids = checkpointed(tiny_model()), random_ids(1, LONG)
    with torch.no_grad():
        each = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total = 0.0
        for target in range(1, LONG):
            labels = torch.full_like(ids, -100)
            labels[0, target] = ids[0, target]
            alone = model(ids, labels=labels).loss
            assert_close(alone, each[target - 1])
            total += alone
        assert_close(model(ids, labels=ids).loss, total / (LONG - 1))


def test_logits_are_there_when_asked_for():
    """Without labels, in evaluation and with `logits_to_keep`, whose loss is still that of the whole text."""
    model, ids = checkpointed(tiny_model()), random_ids(2, LONG)
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.shape == (2, LONG, VOCAB_SIZE)
        kept = model(ids, labels=ids, logits_to_keep=20)
        assert_close(kept.logits, logits[:, -20:])
        assert_close(kept.loss, model(ids, labels=ids).loss)
        model.eval()
        assert_close(model(ids, labels=ids).logits, logits)
        widths = []
        model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
        bounded = model(ids, labels=ids, logits_to_keep=1)
        assert_close(bounded.loss, kept.loss)
        assert_close(bounded.logits, logits[:, -1:])
        assert max(widths) == 15


def test_a_loss_function_of_ones_own_gets_its_share_of_every_tensor():
    """`model.loss_function` is asked per block, and weights (batch, tokens) are cut like the labels."""
    model, ids = tiny_model().train(), random_ids(2, LONG)
    weights = torch.rand(2, LONG)

    def weighted(logits, labels, vocab_size, weights, shift_labels=None, num_items_in_batch=None, **kwargs):
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = F.cross_entropy(logits.transpose(1, 2), shift_labels, reduction="none", ignore_index=-100)
        return (loss * weights).sum() / 3

    model.loss_function = weighted
    expected = model(ids, labels=ids, weights=weights).loss
    assert_close(checkpointed(model)(ids, labels=ids, weights=weights).loss, expected)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_shifted_labels_lose_no_target_between_two_calls(checkpoints):
    """A text in two calls with `shift_labels` has the loss of the text in one, over the number of targets of both."""
    model, ids = tiny_model().train(), random_ids(2, LONG)
    expected = model(ids, labels=ids).loss
    if checkpoints:
        checkpointed(model)
    shifted, cache, loss = F.pad(ids[:, 1:], (0, 1), value=-100), InfiniCache(model.config), 0.0
    for part in (slice(0, 13), slice(13, LONG)):
        out = model(
            ids[:, part],
            shift_labels=shifted[:, part].contiguous(),
            num_items_in_batch=2 * (LONG - 1),
            past_key_values=cache,
        )
        loss = loss + out.loss
    assert_close(loss, expected)


# State from one step to the next


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_detached_cache_carries_the_memory_and_no_gradient(checkpoints):
    """After `detach_` the next call sees the same memory, and only its own part of the text sends gradients."""
    model, ids = tiny_model().train(), random_ids(2, LONG)
    if checkpoints:
        checkpointed(model)
    with torch.no_grad():
        cache = InfiniCache(model.config)  # with checkpoints, Transformers has no cache returned that was not given
        model(ids[:, :17], past_key_values=cache)
        expected_loss = model(ids[:, 17:], labels=ids[:, 17:], past_key_values=cache).loss

    def last_loss(detach: bool) -> torch.Tensor:
        cache = InfiniCache(model.config)
        embeds = model.model.embed_tokens(ids[:, :17]).detach().requires_grad_()
        model(inputs_embeds=embeds, past_key_values=cache)
        if detach:
            assert cache.detach_() is cache
        loss = model(ids[:, 17:], labels=ids[:, 17:], past_key_values=cache).loss
        loss.backward()
        return loss.detach(), embeds.grad

    loss, gradient = last_loss(detach=False)
    assert_close(loss, expected_loss)
    assert gradient[:, :15].abs().sum() > 0
    loss, gradient = last_loss(detach=True)
    assert_close(loss, expected_loss)
    assert gradient is None


# Gates


def test_gates_have_their_own_learning_rate_and_no_weight_decay():
    """Every trainable parameter is in one group; gates move by their rate, and only matrices decay."""
    model = tiny_model(attention_bias=True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    groups = model.parameter_groups(learning_rate=1e-3, weight_decay=0.1)
    matrices, vectors, gates = groups
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 0.01]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in vectors["params"]} == {1}
    assert [id(p) for p in gates["params"]] == [id(layer.self_attn.memory_gate.bias) for layer in model.model.layers]
    in_groups = [id(p) for group in groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in model.parameters() if p.requires_grad)

    before = [layer.self_attn.memory_gate.bias.detach().clone() for layer in model.model.layers]
    optimizer = torch.optim.AdamW(model.parameter_groups(learning_rate=0.0, weight_decay=0.1))
    ids = random_ids(2, LONG)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for layer, gate in zip(model.model.layers, before):  # the first step of Adam is its learning rate
        assert_close((layer.self_attn.memory_gate.bias - gate).abs(), torch.full_like(gate, 0.01), rtol=1e-3, atol=0)


def test_groups_without_parameters_are_left_out():
    """An adapter trains no norms, and optimizers of other libraries do not take empty groups."""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("memory_gate" in name)
    (gates,) = model.parameter_groups(learning_rate=1e-3, gate_learning_rate=0.02)
    assert gates["lr"] == 0.02 and len(gates["params"]) == 2


def test_gate_statistics_name_every_layer():
    """Mean, minimum and maximum over the heads of each layer, of the gate itself and not of beta."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.memory_gate.bias.copy_(torch.tensor([-100.0, 0.0, 0.0, 100.0]))
        model.model.layers[1].self_attn.memory_gate.bias.fill_(0.0)
    statistics = model.gate_statistics()
    assert len(statistics) == 1 + 2 * 3
    assert statistics["gates/layer_00/min"] == 0 and statistics["gates/layer_00/max"] == 1
    assert statistics["gates/layer_00/mean"] == statistics["gates/layer_01/max"] == statistics["gates/mean"] == 0.5


@pytest.mark.parametrize("backward", [True, False])
def test_a_cache_that_went_through_a_checkpoint_is_freed_with_its_last_name(backward):
    """Its state comes from a graph that can compute it again; did that graph know the cache, neither would ever go."""
    model, cache = checkpointed(tiny_model()), InfiniCache(tiny_model().config)
    loss = model(random_ids(1, LONG), labels=random_ids(1, LONG), past_key_values=cache).loss
    if backward:
        loss.backward()
    layer, state = weakref.ref(cache.layers[0]), weakref.ref(cache.layers[0].state()[0])
    assert layer() is not None and state().grad_fn is not None
    del cache, loss
    gc.collect()
    assert layer() is None and state() is None
