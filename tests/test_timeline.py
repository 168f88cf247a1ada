"""Which way the tokens of a call go: the cheap ways must be taken where they apply. (That all ways give the same is
tested in `test_laws.py`.)"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infini_llama.timeline_infini import Layout, Timeline, block_widths, plan

N = 5


def plan_tokens(timeline: Timeline, num_columns: int, **kwargs) -> Layout:
    return plan(timeline, num_columns, segment_length=N, memory_update="delta", **kwargs)


def after(lengths: list[int]) -> Timeline:
    """The timeline of rows that hold so many tokens, padded on the left."""
    width = max(lengths)
    valid = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return plan_tokens(Timeline.start(len(lengths)), width, valid=valid).after


@given(st.lists(st.integers(0, 23), min_size=1, max_size=3).filter(any), st.integers(1, 60), st.integers(1, 4))
def test_blocks_cover_the_call_and_none_is_wider_than_allowed(lengths, num_columns, block_segments) -> None:
    """Blocks are a partition of the columns, each at most `block_segments` segments wide."""
    widths = block_widths(after(lengths), num_columns, N, block_segments * N)
    assert sum(widths) == num_columns and all(0 < width <= block_segments * N for width in widths)


@given(st.integers(0, 23), st.integers(1, 60), st.integers(1, 4))
def test_aligned_rows_see_whole_segments_or_part_of_one(length, num_columns, block_segments) -> None:
    """Rows of the same length never need a gather, wherever a call begins and ends."""
    timeline = after([length, length]) if length else Timeline.start(2)
    for width in block_widths(timeline, num_columns, N, block_segments * N):
        layout = plan_tokens(timeline, width)
        assert layout.token_index is None and layout.row_index is None
        assert layout.num_segments == (width // N if width % N == 0 and timeline.filled[0] == 0 else 0)
        timeline = layout.after
    assert timeline.positions == (length + num_columns - 1,) * 2 and timeline.seen == length + num_columns


def test_a_decoded_token_is_appended_on_every_timeline() -> None:
    """One new token per row stays within segments, also where one row begins a segment and another one ends it."""
    timeline = after([3, 4, 5, 11])
    layout = plan_tokens(timeline, 1)
    assert layout.num_segments == 0
    assert layout.slot_index.tolist() == [3, 4, 0, 1]
    assert layout.rotary_positions.flatten().tolist() == [3, 4, 0, 1]
    assert layout.completes.tolist() == [False, True, False, False]
    assert layout.after.filled == (4, 0, 1, 2)


def test_padding_on_the_right_of_a_fresh_batch_needs_no_mask() -> None:
    """Plain causal attention never looks at what is right of a token."""
    valid = torch.tensor([[True, True, True], [True, False, False]])
    layout = plan_tokens(Timeline.start(2), 3, valid=valid)
    assert layout.query_slots is None and layout.key_width == 3
    assert layout.after.filled == (3, 1)


def test_short_calls_on_different_timelines_compute_short_queries() -> None:
    """A question that crosses a segment in one row only does not compute the full segments of all rows."""
    timeline = after([3, 4])
    layout = plan_tokens(timeline, 2)
    assert layout.num_segments == 2
    assert layout.query_slots.shape == (4, 2)  # two queries per row and segment, not five
    assert plan_tokens(timeline, 2, masks_allowed=False).query_slots is None


def test_positions_that_only_go_on_are_as_good_as_none() -> None:
    """Collators and `generate` pass positions that say nothing new: the aligned ways stay open."""
    timeline = after([5, 5])
    positions = torch.arange(5, 15).expand(2, -1)
    layout = plan_tokens(timeline, 10, positions=positions, valid=torch.ones(2, 10, dtype=torch.bool))
    assert layout.token_index is None and layout.num_segments == 2


@pytest.mark.parametrize("restart_at", [0, 1, 7])
def test_a_restart_empties_the_memory_of_its_row_alone(restart_at: int) -> None:
    """Position 0 in one row begins a document there; the other row goes on."""
    positions = torch.arange(10, 20).repeat(2, 1)
    positions[1, restart_at:] = torch.arange(10 - restart_at)
    layout = plan_tokens(after([10, 10]), 10, positions=positions)
    assert not layout.restarts[0].any() and layout.restarts[1].sum() == 1


def test_rows_can_be_selected_and_repeated() -> None:
    timeline = after([3, 4, 11])
    assert timeline.select([2, 0, 0]) == Timeline(timeline.seen, (10, 2, 2), (1, 3, 3), (True, False, False))
