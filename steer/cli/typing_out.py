"""Typing a reply to the terminal while it is written, its thinking dimmed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from steer.marks import Marks
from steer.phases import State, advance, begin
from steer.prompts import Rendered
from steer.trace import decode


class Typist:
    """Prints tokens as they come.

    Args:
        tokenizer: decodes them.
        marks: tell the thinking from the rest; both marks are dimmed too.
        rendered: the prompt, which may have opened the thought already.
        ends: tokens that end a reply; not printed.
        console: where to print; plain text where it is no terminal.
    """

    def __init__(self, tokenizer: Any, marks: Marks, rendered: Rendered, ends: Iterable[int], console: Console) -> None:
        self.tokenizer, self.marks, self.ends, self.console = tokenizer, marks, frozenset(ends), console
        self._state = begin(marks, [len(rendered.token_ids)], [rendered.generation_prompt_start])
        self._read(rendered.token_ids)
        self._ids: list[int] = []
        self._shown, self._waiting = 0, 0

    def _read(self, token_ids: Iterable[int]) -> State:
        ids = torch.tensor([list(token_ids)], dtype=torch.long)
        self._state, states = advance(self._state, self.marks, ids, torch.ones_like(ids, dtype=torch.bool))
        return State(int(states[0, -1]))

    def take(self, token: int) -> None:
        """Print one token, or keep it until its characters are whole."""
        before = State(int(self._state.current()[0]))
        after = self._read([token])
        if token in self.ends:
            return
        self._ids.append(token)
        known = decode(self.tokenizer, self._ids[self._shown : self._waiting])
        text = decode(self.tokenizer, self._ids[self._shown :])
        if text.endswith("\ufffd"):  # Part of a character.
            return
        self._shown, self._waiting = self._waiting, len(self._ids)
        style = "dim" if State.THINKING in (before, after) else ""
        self.console.print(Text(text[len(known) :], style=style), end="", soft_wrap=True)
        self.console.file.flush()

    def end(self) -> None:
        """Finish the line."""
        self.console.print()
