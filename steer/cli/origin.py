"""Are `probes`, `edits` and `experiments` ours? They are common folder names, and another one may come first."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from steer.errors import SteerError

OURS = ("probes", "edits", "experiments")


def check_origin() -> None:
    """Check that our packages are the ones that Python would import; imports none of them.

    Raises:
        SteerError: another folder shadows one of ours, named in the message, or one is missing.
    """
    home = Path(__file__).resolve().parents[2]
    for name in OURS:
        spec = find_spec(name)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        if home / name in places[:1]:
            continue
        found = places[0] if places else (Path(spec.origin).resolve() if spec and spec.origin else None)
        if found is None:
            raise SteerError(
                f"the package {name!r} that belongs to steer is missing",
                f"it in {home}",
                "Install again: `pip install --force-reinstall reasoning-steer`, or `make setup` in a clone",
            )
        raise SteerError(
            f"{found} shadows the package {name!r} that belongs to steer",
            f"{home / name}",
            "Rename that folder, start steer elsewhere, or take the folder above it out of PYTHONPATH",
        )
