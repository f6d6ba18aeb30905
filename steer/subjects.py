"""Subjects: one line of text for anything that can be run or verified.

    [vllm:]MODEL[+FILE[@COEFFICIENT]]...

    organism:chain
    organism:chain+short.yaml@-0.5
    models/qwen3+thinkedit.safetensors+short.yaml

The type of each FILE (steering, patch, adapter) says the form. Paths may contain `+` and `@`: from the left, the
longest piece that exists on disk is taken as one path, and what follows the last `@` is a coefficient unless a file of
the whole name exists. Where nothing of the kind exists, `+` and `@` separate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steer.errors import SteerError

if TYPE_CHECKING:
    import torch

    from steer.anatomy.resolve import Anatomy
    from steer.backends.vllm.llm import SteeredLLM
    from steer.model import SteerableModel
    from steer.patches import Patch
    from steer.steering import Steering

FORM = "[vllm:]MODEL[+FILE[@COEFFICIENT]]..."
Backend = Literal["hf", "vllm"]


@dataclass(frozen=True)
class Subject:
    """What a line of text names.

    Attributes:
        backend: `hf` or `vllm`.
        model: hub id, folder, `file.gguf` or `organism:NAME`.
        changes: (file, coefficient) in the order in which they act.
    """

    backend: Backend
    model: str
    changes: tuple[tuple[Path, float], ...] = ()

    def __str__(self) -> str:
        changes = "".join(f"+{path}" + (f"@{c!r}" if c != 1 else "") for path, c in self.changes)
        return f"{'vllm:' if self.backend == 'vllm' else ''}{self.model}{changes}"


def parse(text: str) -> Subject:
    """Read a subject; the disk is only asked which paths exist.

    Raises:
        SteerError: a part is empty, or a coefficient is no finite number.
    """
    backend: Backend = "vllm" if text.startswith("vllm:") else "hf"
    pieces = text.removeprefix("vllm:").split("+")
    if not all(piece.strip() for piece in pieces) and not (text.strip() and Path(text).exists()):
        raise SteerError(f"the subject {text!r} has an empty part", FORM, "Name the model, then each file after a +")
    model, rest = _longest(pieces, coefficient=False)
    changes = []
    while rest:
        name, rest = _longest(rest, coefficient=True)
        changes.append(_with_coefficient(name, text))
    return Subject(backend, model, tuple(changes))


def _longest(pieces: list[str], coefficient: bool) -> tuple[str, list[str]]:
    """Join as many pieces as still name something on disk, a coefficient behind it apart; one where none does."""
    for count in range(len(pieces), 1, -1):
        name = "+".join(pieces[:count])
        before, _, number = name.rpartition("@")
        if Path(name).exists() or (coefficient and before and _is_number(number) and Path(before).exists()):
            return name, pieces[count:]
    return pieces[0], pieces[1:]


def _with_coefficient(name: str, text: str) -> tuple[Path, float]:
    path, at, number = name.rpartition("@")
    if not at or Path(name).exists() or "/" in number or "\\" in number:
        return Path(name), 1.0
    if not path or not _is_number(number) or not math.isfinite(float(number)):
        raise SteerError(
            f"the coefficient {number!r} in {text!r} is no finite number",
            FORM,
            "Write it as @-0.5 behind the file's name",
        )
    return Path(path), float(number)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def load_change(path: Path, model: str | None = None, anatomy: str | Path | None = None) -> Steering | Patch:
    """Read a steering, a patch or an adapter, whichever it is; an adapter becomes a patch.

    Args:
        path: a steering (.yaml), a patch (.safetensors) or the folder of an adapter.
        model: hub id, folder, `file.gguf` or `organism:NAME`; its headers give an adapter's matrices their names.
        anatomy: a record of the user's own, for `model`.

    Raises:
        SteerError: no such file, or one that is no change to a model that this version can run.
    """
    from steer.artifacts import kind_of
    from steer.patches import Patch
    from steer.steering import Steering

    kind = kind_of(path)
    if kind == "steering":
        return Steering.load(path)
    if kind == "patch":
        return Patch.load(path)
    if kind == "adapter":
        from steer import adapters

        return adapters.read(path, None if model is None else _anatomy(model, anatomy))
    remedies = {
        "direction": "Make a steering of it: Steering((Add(direction, site='attn_out', coefficient=0.05),)).save('name.yaml')",
        "scores": "Make a patch of it: steer patch thinkedit",
        "expert_scores": "Make a patch of it: steer patch experts",
    }
    raise SteerError(
        f"{path} is of kind {kind!r}, which does nothing by itself",
        "a steering (.yaml), a patch (.safetensors) or an adapter (a folder)",
        remedies.get(kind, "Make a steering or a patch of it"),
    )


def _anatomy(model: str, record: str | Path | None) -> Anatomy:
    """The anatomy of a model that is not loaded."""
    from steer.anatomy.headers import read_headers
    from steer.anatomy.record import read_record
    from steer.anatomy.resolve import resolve
    from steer.sources import locate

    headers = read_headers(locate(model).folder)
    return resolve(headers.config, headers.shapes, None if record is None else read_record(record))


def open_subject(
    text: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    device_map: str | dict[str, str | int] | None = None,
    anatomy: str | Path | None = None,
    self_check: bool = True,
) -> SteerableModel:
    """Load the model of a subject and lay its changes on it, in their order.

    Args:
        text: the subject.
        dtype: of the weights in memory, as `steer.load`.
        device: such as "cpu" or "cuda".
        device_map: of accelerate, instead of `device`.
        anatomy: a record of the user's own.
        self_check: whether to prove the anatomy by one short forward.

    Returns:
        A view of the model inside which `generate`, `run` and `capture` see the changes.

    Raises:
        SteerError: the text, the model or a file cannot be read, or a change does not fit the model.
    """
    subject = parse(text)
    if subject.backend == "vllm":
        raise SteerError(
            f"{text!r} asks for vLLM, and this needs a model whose every activation can be reached",
            "a subject without vllm:",
            f"Use {str(subject).removeprefix('vllm:')!r}, which runs in transformers",
        )
    changes = [(load_change(path, subject.model, anatomy), coefficient) for path, coefficient in subject.changes]
    from steer.model import load

    model = load(
        subject.model, dtype=dtype, device=device, device_map=device_map, anatomy=anatomy, self_check=self_check
    )
    for change, coefficient in changes:
        model = model.with_(change, coefficient=coefficient)
    return model


def open_engine(text: str, *, anatomy: str | Path | None = None, **options: Any) -> SteeredLLM:
    """Start vLLM with the model of a subject, and return a view under which every prompt runs with its changes.

    Projections of heads, patches and adapters lie in weights: together they become one adapter of low rank.

    Args:
        text: the subject, with vllm: before it or without.
        anatomy: a record of the user's own.
        options: of `SteeredLLM`, among them those of `vllm.LLM`.

    Raises:
        SteerError: vLLM is not installed; the text, the model or a file cannot be read; a change has no form in vLLM, or
            none together with the others.
    """
    from steer.backends.vllm.llm import SteeredLLM
    from steer.backends.vllm.start import require
    from steer.patches import Patch

    require()
    subject = parse(text)
    steerings: list[tuple[Steering, float]] = []
    patches: list[Patch] = []
    for path, coefficient in subject.changes:
        change = load_change(path, subject.model, anatomy)
        patch, steering = (change, None) if isinstance(change, Patch) else _parted(change, subject.model)
        patches += [] if patch is None else [patch.scaled(coefficient)]
        steerings += [] if steering is None else [(steering, coefficient)]
    adapters = {"weights": Patch.compose(*patches)} if patches else {}
    given = {str(number): steering for number, (steering, _) in enumerate(steerings)}
    view = SteeredLLM(subject.model, steerings=given, adapters=adapters, anatomy=anatomy, **options).with_(*adapters)
    for steering, coefficient in steerings:
        view = view.with_(steering, coefficient=coefficient)
    return view


def _parted(steering: Steering, model: str) -> tuple[Patch | None, Steering | None]:
    """What of a steering vLLM runs as weights, and what at the places where it was declared."""
    from dataclasses import replace

    from steer.form_table import in_weights
    from steer.patches import Patch
    from steer.sources import locate

    heads = tuple(each for each in steering.interventions if in_weights(each))
    rest = tuple(each for each in steering.interventions if not in_weights(each))
    patch = Patch.from_steering(replace(steering, interventions=heads), locate(model).folder) if heads else None
    return patch, replace(steering, interventions=rest) if rest else None
