from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from steer.backends.vllm.server import settings as module
from steer.backends.vllm.server.settings import Settings, parse, read
from tests.steer.made import refused

FULL = {
    "enabled": False,
    "default": {"steering": "calm", "coefficient": 0.5, "phase": "thinking"},
    "coefficients": [-2, 2.0],
    "limits": {"calm": [0.0, 1.0]},
    "keys": [{"env": "A_KEY", "allow": ["calm", "none"]}, {"env": "B_KEY"}],
    "endpoints": ["/v1/embeddings"],
    "body_bytes": 10,
    "file_bytes": 20,
}


def test_every_key_is_read_and_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(FULL))
    full = read(path)
    assert full.model_dump(mode="json") == {
        **FULL, "keys": [{"env": "A_KEY", "allow": ["calm", "none"]}, {"env": "B_KEY", "allow": None}],
    }  # fmt: skip
    assert full.within("calm") == (0, 1) and full.within("other") == (-2, 2)
    assert set(FULL) == set(Settings.model_fields)
    path.write_text("{}")
    assert read(path) == Settings() and Settings().within("calm") is None


def test_the_module_explains_every_key() -> None:
    text = str(module.__doc__).split("Every key")[0]
    shown = yaml.safe_load("\n".join(line for line in text.splitlines() if line.startswith("    ")))
    assert set(shown) == set(Settings.model_fields)
    parse(shown, "the example")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"enable": True}, ["enable", "no setting"]),
        ({"enabled": "off"}, ["enabled"]),
        ({"enabled": 0}, ["enabled"]),
        ({"default": "calm"}, ["default"]),
        ({"default": {"coefficient": 1.0}}, ["default.steering"]),
        ({"default": {"steering": "calm", "phase": "dreaming"}}, ["dreaming", "thinking"]),
        ({"coefficients": [1, 0]}, ["coefficients", "least comes first"]),
        ({"coefficients": [0, float("inf")]}, ["coefficients", "finite"]),
        ({"coefficients": ["0", 1]}, ["coefficients"]),
        ({"limits": {"calm": 1}}, ["limits.calm"]),
        ({"keys": [{"key": "s3cret"}]}, ["keys.0"]),
        ({"keys": [{"env": "not a name"}]}, ["keys.0.env"]),
        ({"endpoints": ["v1/embeddings"]}, ["endpoints.0"]),
        ({"body_bytes": 0}, ["body_bytes"]),
        ({"body_bytes": True}, ["body_bytes"]),
    ],
)
def test_what_is_no_setting_is_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    refused(lambda: parse(change, "the settings"), *words)


def test_keys_come_from_the_environment() -> None:
    found = parse({"keys": FULL["keys"]}, "x").secrets({"A_KEY": "one", "B_KEY": "two"})
    assert [(secret, key.env) for secret, key in found] == [("one", "A_KEY"), ("two", "B_KEY")]
    assert found[0][1].may("calm") and not found[0][1].may("other") and found[1][1].may("other")
    assert Settings().secrets({}) == ()
    ((secret, key),) = Settings().secrets({"VLLM_API_KEY": "all"})
    assert secret == "all" and key.may("anything")


def test_a_key_that_is_missing_doubled_or_hidden_from_us_is_refused_and_never_shown() -> None:
    keys = parse({"keys": FULL["keys"]}, "x")
    refused(lambda: keys.secrets({"A_KEY": "one"}), "B_KEY", "not set")
    refused(lambda: keys.secrets({"A_KEY": "one", "B_KEY": ""}), "B_KEY")
    same = refused(lambda: keys.secrets({"A_KEY": "s3cret", "B_KEY": "s3cret"}), "same key")
    both = refused(lambda: keys.secrets({"A_KEY": "s3cret", "B_KEY": "2", "VLLM_API_KEY": "s3cret"}), "VLLM_API_KEY")
    assert "s3cret" not in f"{same}{both}"
