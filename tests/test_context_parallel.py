"""One sequence across ranks: the loss and the gradients of one process, and bytes that do not depend on the length.

Processes on CPUs talk through gloo. Those of one number of ranks are started once and run all cases; the tests read what
they measured. Like the laws, cases run in float64, so that 1e-9 tells equality from a coincidence.
"""

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import random_ids, tiny_config, tiny_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from infini_llama.cache_infini import InfiniCache
from infini_llama.parallel_infini import shard_sequence
from infini_llama.scripts.planning import bytes_text, communication_bytes

GUIDE = (Path(__file__).parent.parent / "docs/context_parallel.md").read_text(encoding="utf-8")
N = 5  # of tiny_config
RULES = ["linear", "delta", "least_squares"]
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="processes on CPUs need gloo")


# What the processes run


def float64_norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Llama's own rounds to float32."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def float64_loss(logits: torch.Tensor, shift_labels: torch.Tensor, num_items_in_batch: int, **kwargs) -> torch.Tensor:
    """So does Transformers' loss."""
    return (
        nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum") / num_items_in_batch
    )


def documents(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def packed(num_rows: int) -> dict[str, torch.Tensor]:
    """Documents of less than a segment, of a few, and of several spans; one begins where a span does, one inside it."""
    positions = documents(3, 17, 10, 2, 1, 26, 20)
    if num_rows == 1:
        return {"position_ids": positions[None], "input_ids": random_ids(1, 79)}
    # Rows with boundaries of their own: documents that span them all, and ones that do not.
    rows = [positions, documents(30, 3, 26, 20), documents(3, 76)[:79], documents(20, 10, 49)]
    return {"position_ids": torch.stack(rows), "input_ids": random_ids(4, 79)}


# name: the batch, where it is cut for two ranks and for four (None: by `shard_sequence`), and settings of the model
CASES: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], dict[int, list[int]] | None, dict[str, Any]]] = {
    "whole segments": (lambda: {"input_ids": random_ids(2, 8 * N)}, None, {}),
    "a rest": (lambda: {"input_ids": random_ids(2, 9 * N + 3)}, None, {}),
    "a rest alone": (lambda: {"input_ids": random_ids(2, 3 * N + 2)}, {2: [15], 4: [5, 10, 15]}, {}),
    "uneven": (lambda: {"input_ids": random_ids(2, 12 * N)}, {2: [50], 4: [5, 40, 45]}, {}),
    "packed": (partial(packed, 1), None, {}),
    "packed, by hand": (partial(packed, 1), {2: [48], 4: [38, 48, 64]}, {}),
    "packed, a document at each cut": (partial(packed, 1), {2: [33], 4: [3, 20, 33]}, {}),
    "packed rows": (partial(packed, 4), {2: [20], 4: [3, 33, 59]}, {"segment_length": 1}),
    "MHA": (lambda: {"input_ids": random_ids(1, 8 * N)}, None, {"num_key_value_heads": 4}),
    "MQA": (lambda: {"input_ids": random_ids(1, 8 * N)}, None, {"num_key_value_heads": 1}),
    "gates of tokens": (
        lambda: {"input_ids": random_ids(2, 9 * N + 3)},
        None,
        {"write_gate": True, "read_gate": True},
    ),
    "checkpointed": (lambda: {"input_ids": random_ids(2, 9 * N + 3)}, None, {}),
    "checkpointed, packed": (partial(packed, 1), {2: [48], 4: [3, 33, 48]}, {}),
}
WRAPPERS = ["ddp", "fsdp2"]


def build(rule: str, checkpoints: bool = False, **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    model = tiny_model(memory_update=rule, **settings).double().train()
    if checkpoints:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def cut_by_hand(batch: dict[str, torch.Tensor], cuts: list[int], group: dist.ProcessGroup) -> dict[str, Any]:
    """Without positions where they are not needed: a span then begins where the one before ended."""
    edges, rank = [0, *cuts, batch["input_ids"].shape[1]], dist.get_rank(group)
    targets = nn.functional.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
    cut = {
        name: x[:, edges[rank] : edges[rank + 1]].contiguous()
        for name, x in (batch | {"shift_labels": targets}).items()
    }
    return cut | {"num_items_in_batch": (targets != -100).sum(), "context_group": group}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def furthest(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any gradient, as a share of the largest entry of that gradient."""
    assert ours.keys() == expected.keys()
    return max(((ours[name] - x).abs().max() / x.abs().max()).item() for name, x in expected.items())


def measure_case(name: str, rule: str) -> dict[str, float]:
    make_batch, cuts, settings = CASES[name]
    torch.manual_seed(0)
    batch = make_batch()
    ids, whole = batch["input_ids"], build(rule, **settings)
    model, group = build(rule, checkpoints="checkpointed" in name, **settings), dist.group.WORLD
    whole.loss_function = model.loss_function = float64_loss
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = whole(**batch, shift_labels=targets, num_items_in_batch=(targets != -100).sum())
    expected.loss.backward()

    if cuts is None:
        span = shard_sequence(batch | {"labels": ids}, group, model.config.segment_length)
    else:
        span = cut_by_hand(batch, cuts[dist.get_world_size()], group)
    layer_calls, widths = [], []
    model.model.layers[0].register_forward_pre_hook(lambda *_: layer_calls.append(1))
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    out = model(**span)
    out.loss.backward()
    results = {"columns": span["input_ids"].shape[1], "layer calls": len(layer_calls), "widest logits": max(widths)}
    ours, loss = gradients(model), out.loss.detach().clone()
    alone = model(**span | {"context_group": None}).loss.detach().clone()
    for x in (*ours.values(), loss, alone):
        dist.all_reduce(x)
    return results | {
        "loss": (loss - expected.loss).abs().item(),
        "gradients": furthest(ours, gradients(whole)),
        "without the ranks before": (alone - expected.loss).abs().item(),
    }


def measure_wrapped(wrapper: str, rule: str) -> dict[str, float]:
    """Four ranks are a mesh of two sequences by two spans, two ranks one of one by two."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("data", "context"))
    torch.manual_seed(0)
    ids = random_ids(world_size // 2, 9 * N + 3)
    whole = build(rule)
    model = wrapped = build(rule, checkpoints=True)
    expected = whole(ids, labels=ids)
    expected.loss.backward()

    row = mesh["data"].get_local_rank()
    batch = {"input_ids": ids[row : row + 1], "labels": ids[row : row + 1]}
    batch["num_items_in_batch"] = ids[:, 1:].numel()
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for module in (*model.model.layers, model):
            fully_shard(module)
    loss = wrapped(**shard_sequence(batch, mesh["context"], N)).loss
    (loss * world_size).backward()  # both average gradients over all ranks
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    ours = gradients(wrapped)
    ours = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in ours.items()}
    return {"loss": (loss - expected.loss).abs().item(), "gradients": furthest(ours, gradients(whole))}


def measure_bytes(rule: str) -> dict[str, int]:
    """Bytes that a rank sends in each layer, by length: forward and backward."""
    model, sent, gather = build(rule).float(), [], dist.all_gather

    def counting(gathered: list[torch.Tensor], x: torch.Tensor, group: dist.ProcessGroup) -> None:
        if x.is_floating_point():  # the places, in integers, are told once per call
            sent.append(x.numel() * x.element_size() * (dist.get_world_size(group) - 1))
        gather(gathered, x, group=group)

    dist.all_gather, measured = counting, {}
    for length in (8 * N, 80 * N):
        ids = random_ids(2, length)
        model(**shard_sequence({"input_ids": ids, "labels": ids}, dist.group.WORLD, N)).loss.backward()
        measured[length] = sum(sent) / model.config.num_hidden_layers
        sent.clear()
    dist.all_gather = gather
    return measured


def measure_bad_cut() -> str:
    model, rank = build("delta"), dist.get_rank()
    with pytest.raises(ValueError) as refused:
        model(random_ids(1, 12 if rank == 0 else 10), context_group=dist.group.WORLD)
    return str(refused.value)


def work(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    LlamaRMSNorm.forward = float64_norm
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120)
    )
    results: dict[Any, Any] = {"bad cut": measure_bad_cut()}
    for rule in RULES:
        results["bytes", rule] = measure_bytes(rule)
        for name in CASES:
            results[name, rule] = measure_case(name, rule)
        for wrapper in WRAPPERS:
            results[wrapper, rule] = measure_wrapped(wrapper, rule)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def start_processes(function: Callable[..., None], num_ranks: int, *args: Any) -> None:
    """As copies of one process that has imported what takes long."""
    multiprocessing.set_forkserver_preload(["transformers.models.llama.modeling_llama", "torch.distributed.fsdp"])
    torch.multiprocessing.start_processes(function, args=args, nprocs=num_ranks, start_method="forkserver")


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank measured."""
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(work, request.param, request.param, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


# What must be true of it


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_are_one_process(measured, name: str, rule: str) -> None:
    """The losses of the spans add up to that of the sequence, and so does every gradient. What the ranks tell each other
    matters, unless a document begins with each span.
    """
    for rank in measured:
        assert rank[name, rule]["loss"] < 1e-9 and rank[name, rule]["gradients"] < 1e-9, rank[name, rule]
    assert (measured[0][name, rule]["without the ranks before"] > 1e-4) == ("a document at each cut" not in name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_sequences_beside_each_other_are_one_process(measured, wrapper: str, rule: str) -> None:
    """DDP and FSDP2 over a mesh of sequences by spans, checkpointed, give the gradients of one process, to the
    float32 in which Transformers computes its loss."""
    for rank in measured:
        assert rank[wrapper, rule]["loss"] < 1e-5 and rank[wrapper, rule]["gradients"] < 1e-6, rank[wrapper, rule]


def test_spans_are_uneven_only_where_segments_are(measured) -> None:
    """`shard_sequence` gives ranks the same number of segments, give or take one."""
    for name, (make_batch, cuts, _) in CASES.items():
        if cuts is None and "packed" not in name:
            columns = [rank[name, "delta"]["columns"] for rank in measured]
            assert sum(columns) == make_batch()["input_ids"].shape[1] and max(columns) - min(columns) <= N


def test_checkpoints_keep_layers_and_logits_small(measured) -> None:
    """With checkpointing a layer runs again in the backward pass, and logits are built for a block's tokens at most."""
    for rank in measured:
        for rule in RULES:
            assert rank["whole segments", rule]["layer calls"] == 1
            assert rank["checkpointed", rule]["layer calls"] == 2
            assert rank["checkpointed", rule]["widest logits"] <= 3 * N


@pytest.mark.parametrize("rule", RULES)
def test_bytes_per_layer_do_not_depend_on_the_length(measured, rule: str) -> None:
    """A step over ten times the tokens sends the same, which is what `scripts/benchmark.py --plan` says."""
    config = tiny_model(memory_update=rule).config
    expected = 2 * communication_bytes(config, 1, len(measured), itemsize=4, training=True)["ours"]  # of two rows
    for rank in measured:
        assert list(rank["bytes", rule].values()) == [expected, expected]


def test_a_span_that_begins_inside_a_segment_is_refused_by_all_ranks(measured) -> None:
    """Also by those whose own span is right, which would otherwise wait for the others forever."""
    for rank in measured:
        assert re.search(
            "span of rank 1 begins at position 12 of row 0.*segment of 5.*shard_sequence", rank["bad cut"]
        )


# One process


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("rule", [*RULES, "none"])
def test_one_rank_alone_is_no_parallelism(group, rule: str) -> None:
    """A group of one gives the logits of a call without a group, in evaluation too, and no cache."""
    model, ids = tiny_model(memory_update=rule), random_ids(2, 7 * N + 2)
    with torch.no_grad():
        out = model(ids, context_group=group)
        torch.testing.assert_close(out.logits, model(ids).logits)
        assert out.past_key_values is None
        torch.testing.assert_close(
            model(ids, context_group=DeviceMesh.from_group(group, "cpu"), logits_to_keep=1).logits, out.logits[:, -1:]
        )


def test_what_does_not_go_with_a_group_is_refused(group) -> None:
    """With a message that names the argument and says what to do."""
    model, ids = tiny_model(), random_ids(1, 10)
    mask = torch.ones(1, 10)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="`past_key_values`.*Leave one of them out"):
        model(ids, context_group=group, past_key_values=InfiniCache(model.config))
    with pytest.raises(ValueError, match="`attention_mask` has padding.*pad on the right"):
        model(ids, context_group=group, attention_mask=mask)
    with pytest.raises(ValueError, match="`labels` of a span.*`shift_labels` and `num_items_in_batch`"):
        model(ids, context_group=group, labels=ids)
    with pytest.raises(ValueError, match="`labels` of a span.*`shift_labels` and `num_items_in_batch`"):
        model(ids, context_group=group, shift_labels=ids)
    with pytest.raises(ValueError, match="`context_group` is 'context', which is no group"):
        model(ids, context_group="context")
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "context"))
    with pytest.raises(ValueError, match="`context_group` is a mesh of 2 dimensions.*mesh\\['context'\\]"):
        model(ids, context_group=mesh)
    with pytest.raises(ValueError, match="`attention_mask` has padding.*pad on the right"):
        shard_sequence({"input_ids": ids, "attention_mask": mask}, group, N)


def test_without_torch_distributed_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="`torch.distributed`, which is not initialized.*torchrun"):
        tiny_model()(random_ids(1, 10), context_group="context")


def test_a_sequence_that_is_too_short_for_the_ranks_is_refused(group, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one with exactly a segment for each is not."""
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    with pytest.raises(ValueError, match="`input_ids`: the rows of 15 tokens begin 3 segments of 5.*4 ranks"):
        shard_sequence({"input_ids": random_ids(1, 15)}, group, N)
    for rank in range(4):
        monkeypatch.setattr(dist, "get_rank", lambda group=None, rank=rank: rank)
        span = shard_sequence({"input_ids": random_ids(1, 16)}, group, N)
        assert span["position_ids"].tolist() == [list(range(5 * rank, min(16, 5 * rank + 5)))]


# The guide


def run_guide(rank: int, folder: Path) -> None:
    os.chdir(folder)
    rendezvous = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": 2}
    dist.init_process_group = partial(dist.init_process_group, timeout=timedelta(seconds=120), **rendezvous)
    (program,) = re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)
    session: dict[str, Any] = {}
    exec(compile(program, "context_parallel.md", "exec"), session)
    torch.save(session["loss"], folder / f"loss-{rank}.pt")


def test_the_guide_trains(tmp_path: Path) -> None:
    """Its Python runs in two processes, on a tiny model in the place of SmolLM2."""
    tiny_model(segment_length=64, max_position_embeddings=64).save_pretrained(tmp_path / "infini-smollm2")
    # Not by `torchrun`: on a busy machine, gloo's threads may not let a process end that ends as programs do.
    start_processes(run_guide, 2, tmp_path)
    losses = [torch.load(tmp_path / f"loss-{rank}.pt") for rank in range(2)]
    assert losses[0] == losses[1] and losses[0].isfinite()


def test_the_table_of_the_guide_is_what_plans_say() -> None:
    """For the shape of Llama-3.1-8B, with the paper's two rules, against ring attention."""
    for tokens in (131_072, 1_048_576):
        sizes = []
        for rule in ("linear", "delta"):
            config = tiny_config(num_attention_heads=32, num_key_value_heads=8, head_dim=128, memory_update=rule)
            sent = communication_bytes(config, tokens, 8, itemsize=2, training=True)
            sizes.append(sent["ours"])
        row = " | ".join(map(bytes_text, (*sizes, sent["ring"])))
        assert f"| {tokens:,} | {row} |" in GUIDE
