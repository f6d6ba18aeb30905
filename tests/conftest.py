"""Fixtures and lanes that every test may use.

Unmarked tests are the `unit` lane; the others carry a marker (`effects`, `oracle`, `real`, `faults`, `browser`,
`vllm`).
`pytest --lane unit,oracle` runs some lanes. A lane that cannot run says why, and the end of the run counts it.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("STEER_CACHE", None)  # So that nobody's own cache answers for the program.

import jaxtyping

import tests.typecheck  # noqa: F401  (the hook does not import it)

jaxtyping.install_import_hook(["steer", "probes", "edits", "experiments"], "tests.typecheck.check")

from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
import torch
from hypothesis import settings

from tests import tiny as models

torch.set_num_threads(1)
settings.register_profile(
    "steer", deadline=None, derandomize=True
)  # The machine may be busy; a failure must come back.
settings.load_profile("steer")

LANES = ("unit", "effects", "oracle", "real", "faults", "browser", "vllm")
ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def tiny() -> Callable[..., models.Tiny]:
    """`tiny(family, dtype=..., **overrides) -> (model, tokenizer)`: a new random model each call."""
    return models.build


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder(family, dtype=..., max_shard_size=..., **overrides)`: such a model saved; shared, so never write there."""
    made: dict[str, Path] = {}

    def save(family: str, *, max_shard_size: str = "5GB", **options: object) -> Path:
        key = repr((family, max_shard_size, sorted(options.items(), key=str)))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            model, tokenizer = models.build(family, **options)
            model.save_pretrained(made[key], max_shard_size=max_shard_size)
            tokenizer.save_pretrained(made[key])
        return made[key]

    return save


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`shared_folder(name)`: a folder of this session that all workers of pytest-xdist see; lock what you write there."""
    base = tmp_path_factory.getbasetemp()

    def of(name: str) -> Path:
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        folder.mkdir(exist_ok=True)
        return folder

    return of


@pytest.fixture
def unchecked_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn the check of annotations off, for tests that hand over what the signature forbids."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def browser() -> str | None:
    """Return the path of an installed browser that can run without a screen."""
    return next(filter(None, map(which, BROWSERS)), None)


def obstacle(lane: str) -> str | None:
    """Say why `lane` cannot run here, or None."""
    if lane == "oracle" and find_spec("transformer_lens") is None:
        return "transformer-lens is not installed; `make setup` installs it"
    if lane == "browser" and browser() is None:
        return "no browser is installed; as root `make setup` installs chromium, else install chromium by hand"
    if lane == "vllm" and not (ROOT / ".venv-vllm" / ".steer-stamp").is_file():
        return "there is no .venv-vllm with vLLM; `make vllm` makes it where the packages can be had"
    return None


def lane_of(item: pytest.Item) -> str:
    """Return the lane of a test: its marker, else `unit`."""
    return next((lane for lane in LANES[1:] if item.get_closest_marker(lane)), "unit")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--lane`."""
    parser.addoption("--lane", help=f"comma-separated lanes to run, of {', '.join(LANES)}; all of them without it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the lanes asked for and skip those that cannot run, with the reason."""
    wanted = (config.getoption("--lane") or ",".join(LANES)).split(",")
    if unknown := set(wanted) - set(LANES):
        raise pytest.UsageError(f"there is no lane {', '.join(sorted(unknown))}; expected some of {', '.join(LANES)}")
    chosen = [item for item in items if lane_of(item) in wanted]
    config.hook.pytest_deselected(items=[item for item in items if lane_of(item) not in wanted])
    items[:] = chosen
    for item in chosen:
        item.user_properties.append(("lane", lane_of(item)))
        reason = obstacle(lane_of(item))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"lane {lane_of(item)} cannot run: {reason}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count each lane: what ran, what did not, and why."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            lane = dict(getattr(report, "user_properties", ())).get("lane", "unit")
            counts[lane][outcome] += 1
            if outcome == "skipped":
                reasons[lane][_reason(report)] += 1
    terminalreporter.section("lanes")
    for lane in LANES:
        line = ", ".join(f"{number} {outcome}" for outcome, number in counts[lane].items()) or "nothing chosen"
        terminalreporter.write_line(f"{lane:8} {line}")
        for reason, number in reasons[lane].items():
            terminalreporter.write_line(f"{'':8} {number} skipped: {reason}")


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
