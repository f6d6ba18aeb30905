"""Files of prompts: one per line, as plain text or (`.jsonl`) as objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steer.errors import SteerError
from steer.identity import known_keys
from steer.prompts import Content, Prompt

KEYS = ("id", "prompt", "messages", "group", "gold")


def as_message(text: str, tokenizer: Any, raw: bool = False, system: str | None = None) -> Content:
    """A text as a user's message where the model has a chat template, else as it is.

    Args:
        text: what the user says.
        tokenizer: of the model.
        raw: keep it as it is.
        system: a system prompt before it.

    Raises:
        SteerError: a system prompt for raw text.
    """
    if raw or tokenizer.chat_template is None:
        if system is not None:
            raise SteerError(
                "a system prompt was given, but the prompt is raw text", "a model with a chat template, and no --raw"
            )
        return text
    return [*([] if system is None else [{"role": "system", "content": system}]), {"role": "user", "content": text}]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts; empty lines are skipped and ids are line numbers unless given.

    Args:
        path: `.jsonl`: a text per line, or an object with `prompt` (text) or `messages`, and if wanted `id`, `group`,
            `gold`. Any other name: plain text, a prompt per line.

    Raises:
        SteerError: no such file, no prompt in it, or a line that cannot be read; the message has its number.
    """
    path = Path(path)
    if not path.is_file():
        raise SteerError(f"there is no file {path}", "a text or .jsonl file of prompts")
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise SteerError(f"the file {path} is not UTF-8 text", "a text or .jsonl file of prompts") from error
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    structured = path.suffix == ".jsonl"
    prompts = [
        _object(line, number, path) if structured else Prompt(f"{number:05d}", line.rstrip("\r"))
        for number, line in rows
    ]
    if not prompts:
        raise SteerError(f"the file {path} has no prompts", "at least one line")
    return prompts


def _object(line: str, number: int, path: Path) -> Prompt:
    where = f"line {number} of {path}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SteerError(f"{where} is not JSON ({error})", 'a text in quotes, or {"prompt": ...}') from error
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise SteerError(f"{where} holds a {type(row).__name__}", 'a text in quotes, or {"prompt": ...}')
    known_keys(row, KEYS, where)
    given = [key for key in ("prompt", "messages") if row.get(key)]
    if len(given) != 1:
        raise SteerError(f"{where} has {' and '.join(given) or 'no prompt'}", "either prompt or messages")
    content = row[given[0]]
    if given[0] == "messages" and not (isinstance(content, list) and all(isinstance(part, dict) for part in content)):
        raise SteerError(
            f"the messages of {where} are {str(content)[:60]!r}", "a list of objects with role and content"
        )
    if given[0] == "prompt" and not isinstance(content, str):
        raise SteerError(f"the prompt of {where} is {str(content)[:60]!r}", "text")
    group, gold = (None if row.get(key) is None else str(row[key]) for key in ("group", "gold"))
    return Prompt(str(row.get("id", f"{number:05d}")), content, group, gold)
