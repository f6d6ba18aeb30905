"""Write what this environment holds into `constraints/cpu.txt`: names and public versions, no places."""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

PINS = Path(__file__).with_name("cpu.txt")
LEFT_OUT = {"pip", "setuptools", "wheel", "reasoning-steer"}
HEAD = """\
# Exact versions of everything in the environment that `make setup` makes and that the tests ran on (Python 3.11, CPU).
# Renew: install what changed into .venv, then `make pins`.
"""


def main() -> None:
    """Write the file, sorted by name, without local versions such as `+cpu`."""
    found = {dist.metadata["Name"]: dist.version.split("+")[0] for dist in distributions()}
    lines = [f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower) if name.lower() not in LEFT_OUT]
    PINS.write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
