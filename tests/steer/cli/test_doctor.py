"""`steer doctor` says what is here and whether steering works with it."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version

import pytest

from steer.canary import Canary
from steer.cli import app
from steer.cli.doctor import devices, installed


def test_versions_are_those_of_the_installed_packages():
    assert installed("torch") == version("torch")
    assert installed("no-such-package") is None


def test_the_processor_is_always_a_device():
    first = devices()[0]
    assert first["device"] == "cpu" and platform.machine() in first["what"]


def test_json_holds_everything_and_the_canary_passed(capsys):
    assert app.run(["doctor", "--json"]) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert set(found) == {"python", "platform", "packages", "extras", "devices", "back_ends", "canary"}
    assert found["packages"]["transformers"] == version("transformers")
    assert found["back_ends"]["hook"] is True
    canary = found["canary"]
    assert canary["passed"] and canary["change"] > 0.1 > 1e-4 > canary["error"]
    assert canary["zero_is_plain"] and canary["left_behind"] == 0


def test_people_get_tables_and_a_verdict(capsys):
    assert app.run(["doctor"]) == 0
    streams = capsys.readouterr()
    assert "Steering works" in streams.out and "torch" in streams.out and "organism:chain" in streams.err


def test_quiet_leaves_remarks_out(capsys):
    assert app.run(["doctor", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["doctor"], ["doctor", "--json"]])
def test_a_canary_that_fails_is_status_1(words, capsys, monkeypatch):
    silent = Canary(change=0.0, error=0.0, positions=0, zero_is_plain=True, left_behind=0)
    monkeypatch.setattr("steer.canary.sing", lambda model, seed: silent)
    assert app.run(words) == 1
    shown = capsys.readouterr().out
    assert "DOES NOT WORK" in shown or json.loads(shown)["canary"]["passed"] is False
