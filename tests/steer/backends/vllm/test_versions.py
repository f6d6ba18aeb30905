"""Versions that somebody has looked at, and the way past them."""

from __future__ import annotations

import pytest

from steer.backends.vllm.versions import OVERRIDE, check_version
from steer.errors import SteerError


@pytest.mark.parametrize("found", ["0.30.0", "0.32.0", "0.32.1+cpu", "0.33.0rc1", "0.33.9.dev4+gabcdef.cu129"])
def test_known_versions(found: str) -> None:
    check_version(found)


@pytest.mark.parametrize("found", ["0.29.9", "0.34.0", "0.3.3", "1.30.0", "0.1.dev1+g123", "dev", ""])
def test_others_are_refused_unless_the_user_says_so(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    with pytest.raises(SteerError, match=f"at least 0.30 and below 0.34.*{OVERRIDE}=1"):
        check_version(found)
    monkeypatch.setenv(OVERRIDE, "yes")
    with pytest.raises(SteerError):
        check_version(found)
    monkeypatch.setenv(OVERRIDE, "1")
    check_version(found)
