"""Where every token goes: its segment, its slot in the segment, its rotary position.

Each row of a batch has a timeline of its own, which padding does not advance. A `Timeline` says where the rows of a cache
stand. A `Layout` says where the tokens of the next block go; it is made once per block and read by every layer.
Everything here is integers on the CPU; what the layers need as tensors is moved to their device once.

There are two kinds of layout:

* *within*: every row stays inside one segment (decoding, short prompts). The tokens are appended to the open segment.
* *across*: the rows cover several segments, which the layers see side by side, as rows of their own. If all rows are
  aligned, that is a reshape, otherwise a gather.

Legend: B batch, T columns of the block, S segments, N segment length, W slots of the widest segment.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

__all__ = ["Layout", "Timeline", "block_widths", "plan"]


class Timeline(NamedTuple):
    """Where the rows of a batch stand.

    Attributes:
        seen: columns fed so far, padding included.
        positions: per row, the position of its last token, -1 before the first.
        filled: per row, tokens in its open segment.
        has_memory: per row, whether it has completed a segment of its document.
    """

    seen: int
    positions: tuple[int, ...]
    filled: tuple[int, ...]
    has_memory: tuple[bool, ...]

    @classmethod
    def start(cls, batch_size: int) -> "Timeline":
        """That of rows which have seen nothing yet."""
        return cls(0, (-1,) * batch_size, (0,) * batch_size, (False,) * batch_size)

    def select(self, rows: Sequence[int]) -> "Timeline":
        """The timeline of a batch made of these rows."""
        return Timeline(self.seen, *(tuple(of_rows[row] for row in rows) for of_rows in self[1:]))

    def is_aligned(self, segment_length: int) -> bool:
        """Whether all rows stand at the same slot, with no position left out of their open segments."""
        filled = self.filled[0]
        return all(f == filled for f in self.filled) and all(
            (position + 1) % segment_length == filled for position in self.positions
        )


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one block go.

    Attributes:
        segment_length, memory_update: what the layers work with, from the config.
        before, after: the timeline at the start and at the end of the block.
        rotary_positions: (B or 1, T), positions modulo N.
        reads: whether any token may have a memory to read.
        all_read: whether every token has a memory to read, for a layout within.
        num_segments: S for a layout across segments, 0 for one within.
        query_slots: (B, T) or (BS, W), the slot of each query in its segment, where a mask must be made of it. None:
            queries fill the slots from `query_offset` on, the same in every row.
        key_width: slots that the queries look at.
        valid: (B, T) bool. None: no padding.
        row_index, column_index, slot_index: (n,), for a layout within: where each of the n real tokens of an unaligned
            batch goes. None: all of them go to the slots from `query_offset` on.
        token_index: (B * S * W,), for a layout across: which of the B * (T + 1) tokens is in which slot, each row
            followed by an empty one. None: the layout is a reshape.
        key_index: likewise for keys, out of B * (F + T + 1): F cached ones, the tokens, an empty one.
        output_index: (B * T,), the way back: which of B * S * W + 1 slots holds which token (the last one is empty).
        open_index: (B * L,), which keys stay in the cache as the open segment, numbered like `key_index`.
        restarts, completes: (B, S) bool, or (B,) for a layout within. See `memory_infini.scan`.
        relay: brings the memory to start with from other ranks, to a layout across. See `parallel_infini`.
    """

    segment_length: int
    memory_update: str
    before: Timeline
    after: Timeline
    rotary_positions: torch.Tensor
    reads: bool
    all_read: bool = False
    num_segments: int = 0
    query_offset: int = 0
    query_slots: torch.Tensor | None = None
    key_width: int = 0
    valid: torch.Tensor | None = None
    row_index: torch.Tensor | None = None
    column_index: torch.Tensor | None = None
    slot_index: torch.Tensor | None = None
    token_index: torch.Tensor | None = None
    key_index: torch.Tensor | None = None
    output_index: torch.Tensor | None = None
    open_index: torch.Tensor | None = None
    restarts: torch.Tensor | None = None
    completes: torch.Tensor | None = None
    relay: Callable[..., torch.Tensor] | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Layout":
        """The same layout with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor) and x.device != device}
        return replace(self, **{name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()})

    def to_segments(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens to segments: (B, T, ...) to (B * S, W, ...), zero in empty slots; as it is for a layout within."""
        if self.num_segments == 0:
            return x
        if self.token_index is None:
            return x.reshape(x.shape[0] * self.num_segments, -1, *x.shape[2:])
        return gather_tokens(x, self.token_index, x.shape[0] * self.num_segments)

    def to_tokens(self, x: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Back again: (B * S, W, ...) to (B, T, ...), zero for padding; as it is for a layout within."""
        if self.num_segments == 0:
            return x
        if self.output_index is None:
            return x.reshape(batch_size, -1, *x.shape[2:])
        slots = torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])])
        return slots.index_select(0, self.output_index).unflatten(0, (batch_size, -1))


def gather_tokens(x: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Pick from (B, T, ...) with an index into B * (T + 1), where each row's last one is zero: (num_rows, n, ...)."""
    x = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], dim=1)
    return x.flatten(0, 1).index_select(0, index).unflatten(0, (num_rows, -1))


def block_widths(timeline: Timeline, num_columns: int, segment_length: int, block_length: int) -> list[int]:
    """Cut a call into blocks, so that aligned rows see whole segments, or a part of one.

    Returns:
        The columns of each block; each is at most `block_length` wide, a multiple of `segment_length`.
    """
    if not timeline.is_aligned(segment_length):
        return [min(block_length, num_columns - start) for start in range(0, num_columns, block_length)]
    head = min(-timeline.filled[0] % segment_length, num_columns)
    tail = (num_columns - head) % segment_length
    blocks, rest = divmod(num_columns - head - tail, block_length)
    return [width for width in (head, *[block_length] * blocks, rest, tail) if width]


def plan(
    timeline: Timeline,
    num_columns: int,
    *,
    segment_length: int,
    memory_update: str,
    valid: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    masks_allowed: bool = True,
    relay: Callable[..., torch.Tensor] | None = None,
) -> Layout:
    """Lay out the next `num_columns` tokens of each row.

    Args:
        timeline: where the rows stand.
        num_columns: T.
        segment_length, memory_update: from the config.
        valid: (B, T) bool on the CPU, False for padding. None: no padding.
        positions: (B, T) int64 on the CPU, where the caller gives them; ignored for padding. A position that does not
            come after the one before it starts a new document. None: each row goes on where it stands.
        masks_allowed: whether the attention implementation can mask each query on its own. If not, segments that are
            being continued are computed from their first slot on.
        relay: for the layout, which is then across segments even if there is only one.
    """
    if valid is not None and bool(valid.all()):
        valid = None
    if positions is not None and valid is None:
        going_on = torch.tensor(timeline.positions)[:, None] + 1 + torch.arange(num_columns)
        if torch.equal(positions, going_on):
            positions = None
    common = {"segment_length": segment_length, "memory_update": memory_update, "before": timeline, "relay": relay}
    if valid is None and positions is None and timeline.is_aligned(segment_length):
        filled = timeline.filled[0]
        fits = filled + num_columns < segment_length or (filled > 0 and filled + num_columns == segment_length)
        if fits and relay is None:
            return _plan_aligned_within(timeline, num_columns, common)
        if filled == 0 and num_columns % segment_length == 0:
            return _plan_aligned_across(timeline, num_columns, common)
    return _plan_unaligned(timeline, num_columns, common, valid, positions, masks_allowed)


def _plan_aligned_within(timeline: Timeline, num_columns: int, common: dict) -> Layout:
    filled, segment_length = timeline.filled[0], common["segment_length"]
    completes = filled + num_columns == segment_length
    batch_size = len(timeline.filled)
    return Layout(
        **common,
        after=Timeline(
            seen=timeline.seen + num_columns,
            positions=tuple(position + num_columns for position in timeline.positions),
            filled=(0 if completes else filled + num_columns,) * batch_size,
            has_memory=(True,) * batch_size if completes else timeline.has_memory,
        ),
        rotary_positions=torch.arange(filled, filled + num_columns)[None],
        reads=any(timeline.has_memory),
        all_read=all(timeline.has_memory),
        query_offset=filled,
        key_width=filled + num_columns,
        completes=torch.ones(batch_size, dtype=torch.bool) if completes else None,
    )


def _plan_aligned_across(timeline: Timeline, num_columns: int, common: dict) -> Layout:
    segment_length = common["segment_length"]
    num_segments = num_columns // segment_length
    return Layout(
        **common,
        after=Timeline(
            seen=timeline.seen + num_columns,
            positions=tuple(position + num_columns for position in timeline.positions),
            filled=timeline.filled,
            has_memory=(True,) * len(timeline.filled),
        ),
        rotary_positions=torch.arange(segment_length).repeat(num_segments)[None],
        reads=any(timeline.has_memory) or num_segments > 1,
        num_segments=num_segments,
        key_width=segment_length,
    )


def _plan_unaligned(
    timeline: Timeline,
    num_columns: int,
    common: dict,
    valid: torch.Tensor | None,
    positions: torch.Tensor | None,
    masks_allowed: bool,
) -> Layout:
    N, T, B = common["segment_length"], num_columns, len(timeline.filled)
    last = torch.tensor(timeline.positions)[:, None]
    filled = torch.tensor(timeline.filled)[:, None]
    padded, valid = valid, torch.ones(B, T, dtype=torch.bool) if valid is None else valid
    columns = torch.arange(T).expand(B, T)

    order = valid.cumsum(1)  # (B, T), which token of its row this is, from 1
    if positions is None:
        positions = last + order
    # The position of the token before, with padding skipped.
    before = torch.where(valid, columns, -1).cummax(1).values
    before = torch.cat([before.new_full((B, 1), -1), before[:, :-1]], dim=1)
    previous = torch.where(before >= 0, positions.gather(1, before.clamp(min=0)), last)

    restart = valid & (positions <= previous)
    opens = valid & (restart | (positions.div(N, rounding_mode="floor") != previous.div(N, rounding_mode="floor")))
    segment = opens.cumsum(1)  # (B, T), 0 is the open segment of the cache
    tokens_before_segment = torch.where(opens, order - 1, 0).cummax(1).values
    continued = torch.where(segment == 0, filled, 0)
    slot = order - 1 - tokens_before_segment + continued

    row_last = torch.where(valid.any(1, keepdim=True), positions.gather(1, _last_true(valid)), last)
    last_segment = segment[:, -1:]
    new_in_last = (valid & (segment == last_segment)).sum(1, keepdim=True)
    filled_after = new_in_last + torch.where(last_segment == 0, filled, 0)
    is_full = (row_last % N == N - 1) & (filled_after > 0)
    filled_after = torch.where(is_full, 0, filled_after)

    F = int(filled.max())
    # With padding on the right only, and nothing before, slots are columns and plain causal attention is right.
    slots_are_columns = F == 0 and bool((~valid | (slot == columns)).all())
    stays = common["relay"] is None and not bool(restart.any()) and bool((last_segment <= (filled == 0)).all())
    stays = stays and (masks_allowed or T == 1 or slots_are_columns)
    # Where no row continues a segment, segment 0 is nobody's.
    first = 0 if F > 0 or not bool(valid.any()) else 1
    num_segments = int(last_segment.max()) + 1 - first
    # Of the segments since the last restart, or, where there is none, of all, the last one may be open.
    restarts_at, has_restart = torch.where(restart, segment, 0).amax(1, keepdim=True), restart.any(1, keepdim=True)
    first_segment = torch.where(has_restart, restarts_at, (filled == 0).long())
    has_memory = torch.tensor(timeline.has_memory)[:, None] & ~has_restart
    has_memory = has_memory | (last_segment + is_full > first_segment)
    common = common | {
        "after": Timeline(
            seen=timeline.seen + T,
            positions=tuple(row_last.flatten().tolist()),
            filled=tuple(filled_after.flatten().tolist()),
            has_memory=tuple(has_memory.flatten().tolist()),
        ),
        "rotary_positions": torch.where(valid, positions, 0) % N,
        "reads": any(timeline.has_memory) or num_segments > 1,
        "valid": padded,
    }
    if stays:
        rows, cols = valid.nonzero(as_tuple=True)
        return Layout(
            **common,
            all_read=all(timeline.has_memory),
            query_slots=None if slots_are_columns else slot.clamp(min=0),
            key_width=T if slots_are_columns else max(int(slot.max()), 0) + 1,
            row_index=rows,
            column_index=cols,
            slot_index=slot[rows, cols],
            completes=is_full.flatten() if bool(is_full.any()) else None,
        )

    segment = segment - first
    last_segment = last_segment - first
    # Queries that continue a segment sit either in the slots of their keys, where plain causal attention is right, or
    # packed to the left under a mask. The second is for short calls, which would otherwise compute mostly empty slots.
    packed = masks_allowed and T < N and F > 0
    query_slot = slot - continued if packed else slot
    S = num_segments
    key_width = max(int(torch.where(valid, slot, 0).max()) + 1, F)
    W = int(torch.where(valid, query_slot, 0).max()) + 1 if packed else key_width
    rows, cols = valid.nonzero(as_tuple=True)
    segment_row = rows * S + segment[rows, cols]  # which of the B * S rows a token goes to

    token_index = (torch.arange(B) * (T + 1) + T).repeat_interleave(S * W)
    query_place = segment_row * W + query_slot[rows, cols]
    token_index[query_place] = rows * (T + 1) + cols
    output_index = torch.full((B * T,), B * S * W)
    output_index[rows * T + cols] = query_place

    key_stride = F + T + 1
    key_index = (torch.arange(B) * key_stride + F + T).repeat_interleave(S * key_width)
    key_index[segment_row * key_width + slot[rows, cols]] = rows * key_stride + F + cols
    cached_rows, cached_slots = (torch.arange(F) < filled).nonzero(as_tuple=True)
    key_index[cached_rows * S * key_width + cached_slots] = cached_rows * key_stride + cached_slots

    open_width = int(filled_after.max())
    open_index = key_index.view(B, S, key_width)[torch.arange(B), last_segment.flatten(), :open_width].flatten()

    query_slots = None
    if packed:
        offset = torch.zeros(B, S, 1, dtype=torch.int64)
        offset[:, 0] = filled
        query_slots = (offset + torch.arange(W)).view(B * S, W)
    restarts = torch.zeros(B, S, dtype=torch.bool)
    restart_rows, restart_cols = restart.nonzero(as_tuple=True)
    restarts[restart_rows, segment[restart_rows, restart_cols]] = True
    return Layout(
        **common,
        num_segments=S,
        query_slots=query_slots,
        key_width=key_width,
        token_index=token_index,
        key_index=key_index,
        output_index=output_index,
        open_index=open_index,
        restarts=restarts,
        completes=(torch.arange(S) < last_segment) | ((torch.arange(S) == last_segment) & is_full),
    )


def _last_true(valid: torch.Tensor) -> torch.Tensor:
    """The last True column of each row, (B, 1); 0 where there is none."""
    columns = torch.arange(valid.shape[1]).expand_as(valid)
    return torch.where(valid, columns, 0).max(1, keepdim=True).values
