"""The model card of an edited checkpoint: the base's README.md as it was, and behind it a section on what was done."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edits.checkpoint.manifest import MANIFEST, Manifest, TensorRecord

if TYPE_CHECKING:
    from edits.checkpoint.plan import Plan

CARD = "README.md"
HALF = 0.5
MOST = 40


def card(plan: Plan, manifest: Manifest) -> bytes:
    """Return the card, in the bytes of the file."""
    base = next((file for file in plan.files if file.name == CARD), None)
    before = base.path.read_bytes() if base is not None else _new(plan).encode()
    gap = b"" if before.endswith(b"\n\n") else b"\n" if before.endswith(b"\n") or not before else b"\n\n"
    return before + gap + recipe(plan, manifest).encode()


def _new(plan: Plan) -> str:
    name = base_name(plan)
    known = f"base_model: {name}\n" if "/" in name else ""  # A folder's name would be read as a model of the hub.
    return f"---\n{known}library_name: transformers\n---\n\n# {name}, edited\n"


def base_name(plan: Plan) -> str:
    """Return what a reader calls the base: its id in a hub cache, else the name of its folder."""
    folder = plan.folder.resolve()
    hub = next((part for part in folder.parts if part.startswith("models--")), None)
    return hub.removeprefix("models--").replace("--", "/") if hub else folder.name


def recipe(plan: Plan, manifest: Manifest) -> str:
    """Return the section on what was done."""
    lines = [
        "## Edited weights",
        "",
        f"This is {base_name(plan)} with a patch applied by `steer apply`. Untouched tensors and files are those of the base.",
        "",
        f"- patch: `{manifest.patch}` (in `steer/`)",
        f"- touched: {manifest.coverage}",
        *([f"- dtype: 16-bit tensors widened to {plan.dtype}"] if plan.dtype else []),
        *([f"- made new: {reason}" for reason in plan.made] if plan.created else []),
        *([f"- config.json: {', '.join(f'{k} = {v!r}' for k, v in plan.config.items())}"] if plan.config else []),
        *(
            [f"- the base was not the one the patch was made for: {len(manifest.forced)} matrices differ"]
            if manifest.forced
            else []
        ),
        f"- surviving change: {survival_text(manifest)}",
        f"- every hash: `{MANIFEST}`",
        "- undo: `steer revert DIR` gives every file back byte for byte, from " + undo_text(manifest),
        "",
        "| tensor | sha256 before | sha256 after | survived |",
        "|---|---|---|---|",
    ]
    edited = manifest.edited
    lines += [
        f"| {each.name} | {_short(each.before)} | {_short(each.after)} | {_share(each.survived)} |"
        for each in edited[:MOST]
    ]
    more = [f"| and {len(edited) - MOST} more | | | |"] if len(edited) > MOST else []
    return "\n".join([*lines, *more, ""])


def undo_text(manifest: Manifest) -> str:
    """Say what taking it back needs."""
    if not any(tensor.boxes for tensor in manifest.tensors):
        return "this folder alone"
    return "the originals kept in `steer/undo`" if manifest.undo == "kept" else "the base, which it needs"


def survival_text(manifest: Manifest) -> str:
    """Say how much of the wanted change is left after the cast, and what to do where it is little."""
    shares = [each.survived for each in manifest.edited if each.survived is not None]
    if not shares:
        return "nothing was to change"
    low = sum((lost(each) or 0.0) > HALF for each in manifest.edited)
    text = f"at least {min(shares):.4f} of what was wanted, after the cast to the stored dtype"
    if low:
        text += (
            f"; on {low} of {len(shares)} tensors more than half of it was lost, being smaller than what the dtype "
            "resolves: write it with --dtype float32 (dtype='float32') to keep it"
        )
    return text


def lost(tensor: TensorRecord) -> float | None:
    """Return ‖stored change - wanted change‖ / ‖wanted change‖; None where nothing was wanted."""
    if tensor.survived is None:
        return None
    return math.sqrt(max(0.0, 1 + tensor.survived**2 - 2 * tensor.survived * (tensor.cosine or 0.0)))


def _short(value: str | None) -> str:
    return "" if value is None else f"`{value.removeprefix('sha256:')[:16]}`"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
