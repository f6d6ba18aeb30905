"""Several processes under torchrun: one folder, the bytes of one process, and one failure that stops all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import probes
from probes.collect.recorders import Recorder
from probes.collect.team import Team, joined, launched, leads
from probes.experts import expert_scores, recorder_for
from steer.errors import SteerError
from tests.probes import made
from tests.probes.test_collect import content

ROOT = Path(__file__).parents[2]
CODE = """
    import os, signal, sys, torch
    torch.set_num_threads(1)
    import probes
    from tests.probes import made
    from tests.probes.test_distributed import recorders

    rank, out = int(os.environ["RANK"]), sys.argv[1]
    model, traces = made.model("qwen3_moe"), made.traces(150, longest=12)

    def say(line):
        os.write(1, (line + "\\n").encode())  # At once: both processes write into one pipe.

    def progress(state):
        if rank == 0:
            say(f"done {state.shards} {state.traces}")
        {fault}

    summary = probes.collect(model, traces, out, recorders=recorders(), resume="resume" in sys.argv, progress=progress)
    say(f"rank {rank} {len(summary)}")
"""


def recorders() -> list[Recorder]:
    """Means of the stream and of heads, and counts of experts."""
    return [probes.SpanMeans(("resid_mid",)), probes.HeadMeans(), recorder_for({"<think>": 1, "</think>": -1})]


def alone(folder: Path) -> probes.Summary:
    """Collect the same in this process."""
    return probes.collect(made.model("qwen3_moe"), made.traces(150, longest=12), folder, recorders=recorders())


def together(folder: Path, fault: str = "", *arguments: str, code: str = CODE) -> subprocess.CompletedProcess[str]:
    """Collect in two processes, where `fault` is called after every shard of either."""
    program = folder.parent / "program.py"
    program.write_text(textwrap.dedent(code).replace("{fault}", fault))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(program), str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_a_process_by_itself_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert (launched(), leads()) == (False, True)
    with joined(True) as team:
        assert (team.rank, team.size, list(team.take(3))) == (0, 1, [0, 1, 2])
        assert [team.total("n", 2), team.total("n", 3), team.total("n", 0)] == [2, 5, 5]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (launched(), leads()) == (True, False)
    with joined(False) as team:
        assert team.store is None, "in memory there is nothing to share"


def raising(error: Exception) -> None:
    raise error


class _Store(dict[str, bytes]):
    """What torchrun's store does, in one process."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def add(self, key: str, more: int) -> int:
        self[key] = str(int(self.get(key, b"0")) + more).encode()
        return int(self[key])

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()


def test_shards_are_taken_once_and_a_failure_reaches_everybody() -> None:
    store = _Store()
    one, two = (Team(rank, 2, store) for rank in (0, 1))  # type: ignore[arg-type]
    first, second = one.take(5), two.take(5)
    assert [next(first), next(second), next(second), next(first)] == [0, 1, 2, 3]
    assert [one.total("n", 1), two.total("n", 1)] == [1, 2]
    refused = SteerError("the folder exists already")
    with pytest.raises(SteerError, match="exists already"):
        one.first(lambda: raising(refused))
    two.fail(SteerError, SteerError("trace 'x' is bad"), None)
    one.fail(SteerError, SteerError("later"), None)
    for wait in (lambda: next(first), lambda: one.last(lambda: None, lambda: None), two.check):
        with pytest.raises(SteerError, match=r"(?i)process 1 of 2 stopped: Trace 'x' is bad|trace 'x' is bad"):
            wait()


@pytest.mark.faults
def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    done = together(tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert {"rank 0 300", "rank 1 300", "done 5 300"} <= set(done.stdout.splitlines()), done.stdout
    one, two = alone(tmp_path / "one"), probes.Summary.load(tmp_path / "two")
    assert content(tmp_path / "two") == content(tmp_path / "one")
    markers = {"<think>": 1, "</think>": -1}
    assert expert_scores(two, markers, resamples=20) == expert_scores(one, markers, resamples=20)


@pytest.mark.faults
def test_two_killed_processes_resume_to_the_same_bytes(tmp_path: Path) -> None:
    killed = together(tmp_path / "two", "if state.shards >= 2: os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode != 0
    assert str(signal.SIGKILL.value) in killed.stderr
    assert not (tmp_path / "two" / "summary.yaml").exists()
    assert 1 <= len(list((tmp_path / "two").glob("shard-*"))) < 5
    (tmp_path / "two" / ".shard-00004.safetensors.1.partial").write_text("what a kill in the midst of writing leaves")
    assert together(tmp_path / "two", "", "resume").returncode == 0
    alone(tmp_path / "one")
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.faults
def test_a_failure_of_one_process_stops_the_other_with_its_message(tmp_path: Path) -> None:
    """Process 1 alone has a broken weight; process 0 is slow, and would have to make the rest."""
    code = CODE.replace(
        "def progress",
        'if rank == 1:\n        model.places.layers[2].attention_output.weight.data[0, 0] = float("nan")\n\n    def progress',
    )
    failed = together(tmp_path / "two", "import time; time.sleep(3)", code=code)
    assert failed.returncode != 0
    assert "is NaN or infinite in layer 2" in failed.stderr
    assert not (tmp_path / "two" / "summary.yaml").exists()
    assert "rank 0" not in failed.stdout
