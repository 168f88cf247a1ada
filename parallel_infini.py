"""Context parallelism for Infini-attention (arXiv 2404.07143): one sequence across the ranks of a process group.

Each rank holds a *span*: whole segments, in the order of the ranks. Local attention never leaves a segment, so ranks need
nothing of each other but the memory at the start of their span. Seen from there, the spans before it are maps

    z to z + added          M to M + added (`linear`), M to carry M + added (`delta`; carry is the product of its I - A)

or, where a document begins in the span, maps that forget what they are given. In every layer each rank sends its map, D x V
or D x (D + V) numbers per KV head whatever the length of the span, and composes those of the ranks before it.

Legend: R ranks, and that of `memory_infini`.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from .timeline_infini import Timeline

__all__ = ["Relay", "find_places", "process_group", "refuse_padding", "shard_sequence"]


class Relay:
    """Hands memories on from rank to rank, in every layer of one forward call; see `memory_infini.scan`.

    Each call is a collective, and so is its backward pass: all ranks must use what comes out, also the first one, which
    gets an empty memory.

    Args:
        group: the ranks, in the order of their spans.
        keeps: (R, B) bool, False where a document begins in this span of the row: nothing from before gets through.
    """

    def __init__(self, group: dist.ProcessGroup, keeps: torch.Tensor):
        self.group, self.keeps = group, keeps

    def __call__(self, added: torch.Tensor, carry: torch.Tensor | None = None) -> torch.Tensor:
        """What comes into this rank's span.

        Args:
            added: (B, K, D, ...), what the span would hand on if nothing came into it.
            carry: (B, K, D, D), by which it multiplies what comes into it. None: 1, or 0 where a document begins.

        Returns:
            The state at the start of the span, in the shape of `added`.
        """
        return _Handover.apply(added, carry, self)


class _Handover(torch.autograd.Function):
    """x[r + 1] = carry[r] x[r] + added[r] from x[0] = 0. Gradients go the same way, from the last rank to the first."""

    @staticmethod
    def forward(ctx, added: torch.Tensor, carry: torch.Tensor | None, relay: Relay) -> torch.Tensor:
        ctx.group, ctx.rank = relay.group, dist.get_rank(relay.group)
        if carry is None:
            ctx.times, all_added = torch.mul, _gather(added, ctx.group)
            carries = relay.keeps.to(added).view(*relay.keeps.shape, *[1] * (added.dim() - 1))
        else:
            ctx.times, maps = torch.matmul, _gather(torch.cat([carry, added], dim=-1), ctx.group)
            carries, all_added = maps.split([carry.shape[-1], added.shape[-1]], dim=-1)
        incoming = torch.zeros_like(added)
        for before in range(ctx.rank):
            incoming = ctx.times(carries[before], incoming) + all_added[before]
        ctx.save_for_backward(incoming, carries[ctx.rank + 1 :].clone())
        return incoming

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        incoming, carries = ctx.saved_tensors
        gradients = _gather(gradient, ctx.group)[ctx.rank + 1 :]
        outgoing = torch.zeros_like(gradient)
        for carry, later in zip(carries.flip(0), gradients.flip(0)):
            outgoing = ctx.times(carry.mT, outgoing) + later
        return outgoing, outgoing @ incoming.mT if ctx.times is torch.matmul else None, None


def _gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tensors of all ranks, (R, ...)."""
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(gathered), x.contiguous(), group=group)
    return gathered


def find_places(
    context_group: dist.ProcessGroup | DeviceMesh,
    positions: torch.Tensor | None,
    shape: tuple[int, int],
    segment_length: int,
    device: torch.device,
) -> tuple[Timeline, Relay]:
    """Tell the other ranks which span this one has, and learn where it begins.

    Args:
        context_group: the ranks, in the order of their spans.
        positions: (B, T) int64 on the CPU; None: each row goes on where the span before ends.
        shape: B, T of the span.
        segment_length: N.
        device: on which the ranks talk.

    Returns:
        The timeline at the start of the span, and what hands memories on.

    Raises:
        ValueError: on all ranks, if a span begins inside a segment.
    """
    group = process_group(context_group)
    batch_size, num_columns = shape
    span = torch.tensor([num_columns, -1, 0, 0]).repeat(batch_size, 1)  # columns, first and last position, any restart
    if positions is not None:
        restarts = (positions[:, 1:] <= positions[:, :-1]).any(1)
        span[:, 1:] = torch.stack([positions[:, 0], positions[:, -1], restarts], dim=1)
    columns, first, last, restarts = _gather(span.to(device), group).cpu().unbind(-1)  # (R, B) each
    seen, row_last = 0, torch.full((batch_size,), -1)
    keeps, starts = [], []
    for rank in range(len(columns)):
        going_on = first[rank] == -1
        row_first = torch.where(going_on, row_last + 1, first[rank])
        inside = ~_opens_segment(row_last, row_first, segment_length)
        if bool(inside.any()):
            row = int(inside.int().argmax())
            raise ValueError(
                f"`context_group`: the span of rank {rank} begins at position {int(row_first[row])} of row {row}, inside "
                f"a segment of {segment_length} tokens. Cut where a segment or a document begins in all rows, as "
                "`shard_sequence` does."
            )
        starts.append(Timeline(seen, tuple(row_last.tolist()), (0,) * batch_size, (True,) * batch_size))
        keeps.append((row_first > row_last) & ~restarts[rank].bool())
        seen, row_last = seen + int(columns[rank, 0]), torch.where(going_on, row_last + columns[rank], last[rank])
    return starts[dist.get_rank(group)], Relay(group, torch.stack(keeps).to(device))


def _opens_segment(previous: torch.Tensor, position: torch.Tensor, segment_length: int) -> torch.Tensor:
    """Whether a token begins a document, or follows one that filled its segment."""
    return (position <= previous) | ((previous + 1) % segment_length == 0)


def process_group(context_group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    """The group of a mesh with one dimension, or the group itself.

    Raises:
        ValueError: it is something else, or has no place for this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "`context_group` needs `torch.distributed`, which is not initialized. Start the processes with `torchrun` "
            "and call `torch.distributed.init_process_group()` first."
        )
    if isinstance(context_group, DeviceMesh):
        if context_group.ndim != 1:
            raise ValueError(
                f"`context_group` is a mesh of {context_group.ndim} dimensions, {context_group.mesh_dim_names}. Pass the "
                "one along which the sequence is cut, for example `mesh['context']`."
            )
        context_group = context_group.get_group()
    if not isinstance(context_group, dist.ProcessGroup) or dist.get_rank(context_group) < 0:
        raise ValueError(
            f"`context_group` is {context_group!r}, which is no group that this process belongs to. Pass a "
            "`torch.distributed.ProcessGroup` or one dimension of a `DeviceMesh`."
        )
    return context_group


def refuse_padding(mask: torch.Tensor | None) -> None:
    """Raise a ValueError if there is any: rows would have their boundaries in different columns."""
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            "`attention_mask` has padding, which does not go with `context_group`. Leave it out, and pad on the right: "
            "what comes after a text does not change it, and a label of -100 does not count."
        )


def shard_sequence(
    batch: Mapping[str, Any], context_group: dist.ProcessGroup | DeviceMesh, segment_length: int
) -> dict[str, Any]:
    """This rank's span of a batch that all ranks of the group have whole.

    The spans are as long as each other as the segments allow. Every target counts once, also where two spans meet, and the
    losses of the ranks add up to the loss of the whole batch, as their gradients do.

    Args:
        batch: arguments of `InfiniLlamaForCausalLM.forward`: `input_ids` (B, T), and as wanted `labels` or
            `shift_labels`, `position_ids`, `num_items_in_batch` (by default the number of targets here). Tensors
            (B, T, ...) are cut.
        context_group: the ranks, in the order of their spans.
        segment_length: N of the model, `model.config.segment_length`.

    Returns:
        Arguments for this rank's call, `context_group` among them.

    Raises:
        ValueError: there is padding, or the rows begin fewer segments together than there are ranks.

    Example:

    ```python
    >>> span = shard_sequence({"input_ids": ids, "labels": ids}, group, model.config.segment_length)
    >>> model(**span).loss.backward()
    >>> for parameter in model.parameters():
    ...     torch.distributed.all_reduce(parameter.grad, group=group)
    ```
    """
    group = process_group(context_group)
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    batch = dict(batch)
    inputs = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    batch_size, num_columns = inputs.shape[:2]
    mask, labels = batch.pop("attention_mask", None), batch.pop("labels", None)
    refuse_padding(mask)
    if labels is not None and batch.get("shift_labels") is None:
        batch["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if batch.get("shift_labels") is not None and batch.get("num_items_in_batch") is None:
        batch["num_items_in_batch"] = (batch["shift_labels"] != -100).sum()
    if batch.get("position_ids") is None:
        batch["position_ids"] = torch.arange(num_columns, device=inputs.device)[None]
    positions = batch["position_ids"] = batch["position_ids"].expand(batch_size, -1)

    cuts = _opens_segment(positions[:, :-1], positions[:, 1:], segment_length).all(0).nonzero().flatten() + 1
    if len(cuts) < num_ranks - 1:
        raise ValueError(
            f"`input_ids`: the rows of {num_columns} tokens begin {len(cuts) + 1} segments of {segment_length} together, "
            f"too few for {num_ranks} ranks. Use longer sequences, fewer ranks, or one row per batch."
        )
    edges = [0]
    for index in range(1, num_ranks):
        # The nearest to an even share that leaves one for each rank to come.
        allowed = cuts[index - 1 : len(cuts) - (num_ranks - 1 - index)]
        allowed = allowed[allowed > edges[-1]]
        edges.append(int(allowed[(allowed - num_columns * index / num_ranks).abs().argmin()]))
    edges.append(num_columns)
    columns = slice(edges[rank], edges[rank + 1])
    span = {
        name: x[:, columns].contiguous() if torch.is_tensor(x) and x.shape[:2] == (batch_size, num_columns) else x
        for name, x in batch.items()
    }
    return span | {"context_group": context_group}
