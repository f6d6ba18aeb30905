"""Every verb on the real model, one after the other, as a user types them; run once, looked at by several tests."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import app


@dataclass(frozen=True)
class Step:
    """What one verb returned."""

    status: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """Its JSON object."""
        found: dict[str, Any] = json.loads(self.stdout)
        return found


def steer(*arguments: object) -> Step:
    """Run one verb inside this process, so that nothing is imported twice."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = app.run([str(argument) for argument in arguments])
    return Step(status, out.getvalue(), err.getvalue())


def walk(model: Path, questions: Path, folder: Path) -> dict[str, Step]:
    """Run the verbs of the README's order on `model`; small numbers, so that two cores do it in minutes."""
    run, summary, edited = folder / "run", folder / "summary", folder / "edited"
    direction, scores, patch = (folder / f"{name}.safetensors" for name in ("direction", "heads", "patch"))
    task = f"gsm8k:{questions}"
    verbs = {
        "inspect": ("inspect", model, "--self-check"),
        "generate": ("generate", model, "What is 12 + 30?", "--max-new-tokens", 24, "--temperature", 0),
        "evaluate": ("evaluate", model, "--task", task, "--limit", 12, "--max-new-tokens", 160, "--out", run, "--temperature", 0.6),
        "collect": ("collect", model, "--traces", run, "--out", summary, "--spans", "before_answer"),
        "thresholds": ("probe", "length", model, "--from", summary, "--span", "before_answer", "--out", direction, "--below", 2),
        "length": (
            "probe", "length", model, "--from", summary, "--span", "before_answer", "--percentiles", 30, 70,
            "--include-unclosed", "--out", direction, "--plot", folder / "direction.png",
        ),
        "heads": ("probe", "heads", model, "--from", summary, "--direction", direction, "--out", scores, "--plot", folder / "heads.png"),
        "patch": ("patch", "thinkedit", model, "--direction", direction, "--scores", scores, "--share", 0.04, "--out", patch),
        "dry": ("apply", model, patch, "--out", edited, "--dry-run"),
        "apply": ("apply", model, patch, "--out", edited),
        "verify": ("verify", f"{model}+{patch}", edited),
        "differs": ("verify", model, edited, "--weights"),
        "after": ("evaluate", edited, "--task", task, "--limit", 4, "--max-new-tokens", 48, "--out", folder / "after", "--temperature", 0.6),
        "revert": ("revert", edited, "--out", folder / "reverted"),
        "restored": ("verify", model, folder / "reverted", "--weights"),
    }  # fmt: skip
    return {name: steer(*arguments, "--json") for name, arguments in verbs.items()}
