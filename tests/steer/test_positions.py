"""Positions of a batch: masks of every shape that generation and collecting use, rows that leave and enter."""

from __future__ import annotations

import pytest
import torch

from steer.marks import Marks
from steer.phases import State, states_of
from steer.positions import Positions

MARKS = Marks(((1, 2),), ((3,),))
ROWS = [[9, 9, 1, 2, 8, 3, 8], [9, 1, 2, 8, 8, 3, 8], [9, 8, 8, 8, 8, 8, 8]]
PROMPTS, STARTS = [2, 3, 1], [2, 1, 1]
EXPECTED = [states_of(row, prompt, MARKS, start) for row, prompt, start in zip(ROWS, PROMPTS, STARTS, strict=True)]


def test_without_a_mask_all_is_real():
    positions = Positions(MARKS, PROMPTS, STARTS)
    assert positions.states is None and len(positions) == 3
    positions.observe(torch.tensor(ROWS))
    assert positions.states.tolist() == EXPECTED


def test_left_padded_prefill_then_steps_with_a_growing_mask():
    """As generation does it: the mask covers cached and current columns, the chunk is its end."""
    positions = Positions(MARKS, PROMPTS, STARTS)
    widest = max(PROMPTS)
    ids = torch.tensor([[0] * (widest - p) + row[:p] for row, p in zip(ROWS, PROMPTS, strict=True)])
    mask = torch.tensor([[0] * (widest - p) + [1] * p for p in PROMPTS])
    positions.observe(ids, mask)
    for row, prompt in enumerate(PROMPTS):
        assert positions.states[row].tolist() == [State.PADDING] * (widest - prompt) + EXPECTED[row][:prompt]
    for step in range(4):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        positions.observe(torch.tensor([[row[p + step]] for row, p in zip(ROWS, PROMPTS, strict=True)]), mask)
        assert positions.states[:, 0].tolist() == [
            states[p + step] for states, p in zip(EXPECTED, PROMPTS, strict=True)
        ]


def test_right_padding_and_boolean_masks():
    positions = Positions(MARKS, PROMPTS, STARTS)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5]).bool()
    positions.observe(torch.tensor(ROWS), mask)
    assert positions.states.tolist() == [EXPECTED[0], [*EXPECTED[1][:5], -1, -1], [*EXPECTED[2][:2], *[-1] * 5]]


def test_rows_leave_return_and_join():
    first = Positions(MARKS, PROMPTS, STARTS)
    first.observe(torch.tensor(ROWS)[:, :4])
    first.select(torch.tensor([1, 0]))
    assert first.states is None and len(first) == 2
    late = Positions(MARKS, [2], [0])
    late.observe(torch.tensor([[8, 1]]))
    first.join(late)
    first.observe(torch.tensor([ROWS[1][4:], ROWS[0][4:], [2, 8, 3]]))
    assert first.states.tolist() == [EXPECTED[1][4:], EXPECTED[0][4:], states_of([8, 1, 2, 8, 3], 2, MARKS)[2:]]


def test_a_row_that_ended_reads_padding_and_keeps_its_state():
    positions = Positions(MARKS, [1, 1])
    positions.observe(torch.tensor([[1], [1]]))
    positions.observe(torch.tensor([[2], [2]]), torch.tensor([[1, 1], [1, 0]]))
    assert positions.states.tolist() == [[State.THINKING], [State.PADDING]]
    positions.observe(torch.tensor([[8], [2]]), torch.tensor([[1, 1, 1], [1, 0, 1]]))
    assert positions.states.tolist() == [[State.THINKING], [State.THINKING]]


def test_raw_text_counts_every_mark_of_the_prompt():
    positions = Positions(MARKS, [4])
    positions.observe(torch.tensor([[1, 2, 8, 8]]))
    assert positions.states.tolist() == [[0, 0, 0, State.THINKING]]


def test_what_does_not_fit():
    positions = Positions(MARKS, [1, 1])
    with pytest.raises(ValueError, match="3 rows, but positions are kept of 2"):
        positions.observe(torch.tensor([[1], [1], [1]]))
    with pytest.raises(ValueError, match="attention mask"):
        positions.observe(torch.tensor([[1, 1], [1, 1]]), torch.ones(2, 1))
    with pytest.raises(ValueError, match="attention mask"):
        positions.observe(torch.tensor([[1], [1]]), torch.ones(2, 1, 1, 1))
    with pytest.raises(ValueError, match="different marks"):
        positions.join(Positions(Marks(), [1]))
    with pytest.raises(ValueError, match="prompt lengths"):
        Positions(MARKS, [0])
