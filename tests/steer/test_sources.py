"""Every way in which the hub can say no becomes one paragraph with a remedy."""

from __future__ import annotations

from typing import ClassVar

import huggingface_hub
import pytest
from huggingface_hub import errors

from steer import SteerError
from steer.sources import BUILTIN, Source, locate, organisms


class Response:
    """As much of an HTTP answer as the errors look at."""

    status_code = 404
    headers: ClassVar[dict[str, str]] = {}
    request = None
    url = "https://hub.invalid"
    text = ""

    def json(self):
        return {}


CASES = [
    (errors.RepositoryNotFoundError, {"response": Response()}, "", "private"),
    (errors.GatedRepoError, {"response": Response()}, "", "gated"),
    (errors.HFValidationError, {}, "", "no valid hub id"),
    (errors.LocalEntryNotFoundError, {}, "", "could not be reached"),
    (errors.LocalEntryNotFoundError, {}, "1", "HF_HUB_OFFLINE is set"),
    (errors.OfflineModeIsEnabled, {}, "1", "HF_HUB_OFFLINE is set"),
    (errors.HfHubHTTPError, {"response": Response()}, "0", "could not be reached"),
    (ConnectionError, {}, "0", "could not be reached"),
]


@pytest.mark.parametrize(("kind", "options", "offline", "words"), CASES)
def test_the_hub_says_no(monkeypatch, kind, options, offline, words):
    def refuse(name, **_):
        raise kind("no", **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(SteerError, match=words) as caught:
        locate("someone/something")
    assert "someone/something" in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_is_not_called_a_missing_model(monkeypatch):
    def full(name, **_):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        locate("someone/something")


def test_a_folder_that_looks_like_a_hub_id_is_taken_as_a_folder(tmp_path, monkeypatch):
    (tmp_path / "someone" / "something").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("someone/something").folder.name == "something"
    assert locate("~").folder.is_dir()


def test_organisms_have_a_card_and_nothing_else_has(tmp_path):
    for name in organisms():
        source = locate(f"organism:{name}")
        assert source.folder == BUILTIN / name and source.card is not None and source.card["name"] == name
    (tmp_path / "card.yaml").write_text("name: mine")
    assert Source("mine", tmp_path).card is None and Source("mine", tmp_path / "nowhere", organism=True).card is None
