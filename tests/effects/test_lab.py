"""The laboratory writes runs under plain names, and never into a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.run import Run
from tests.effects.lab import RUN_NAME, SLUGS, SPANS, Lab

pytestmark = pytest.mark.effects


@pytest.mark.parametrize("folder", [Path(), Path("runs"), Path(__file__).parents[2]])
def test_a_relative_folder_and_the_checkout_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="temporary folder"):
        Lab(folder)


@pytest.mark.parametrize("name", ["steered marker:; 0.5", "marker:", "a/b", "..", "", "Plain"])
def test_a_name_that_is_no_plain_file_name_is_refused(lab: Lab, tmp_path: Path, name: str) -> None:
    other = Lab(tmp_path)
    with pytest.raises(ValueError, match="names a run"):
        other.ask(name, lab.model)
    assert not list(tmp_path.iterdir())


def test_a_run_is_made_once_and_lies_under_its_name(lab: Lab, tmp_path: Path) -> None:
    other = Lab(tmp_path)
    run = other.ask("plain", lab.model, questions=2, samples=1)
    assert other.ask("plain", lab.model, questions=2, samples=1) is run
    assert [folder.name for folder in tmp_path.iterdir() if folder.is_dir()] == ["plain"]
    another_worker = Lab(tmp_path)
    assert another_worker.ask("plain", lab.model, questions=2, samples=1).traces == run.traces
    assert run.traces == Run.load(tmp_path / "plain").traces


def test_every_span_has_a_plain_name_of_its_own() -> None:
    assert len({SLUGS[span] for span in SPANS}) == len(SPANS)
    assert all(RUN_NAME.fullmatch(slug) for slug in SLUGS.values())
