"""Shards are a function of the ids; a journal keeps whole shards of one set of options."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.shards import SHARD, Journal, Shard, cut
from tests.steer.made import refused


def names(folder):
    return sorted(each.name for each in folder.iterdir())


KEY = {"seed": 1, "model": "m", "sampling": {"temperature": 0.5}}


def test_the_promised_size():
    assert SHARD == 64
    assert [len(shard.ids) for shard in cut(f"{i:03d}" for i in range(130))] == [64, 64, 2]
    assert cut([]) == []


@given(st.lists(st.text(max_size=5), unique=True, max_size=40), st.integers(1, 7), st.randoms())
def test_a_cut_is_sorted_whole_and_blind_to_order(ids, size, random):
    shards = cut(ids, size)
    assert [item for shard in shards for item in shard.ids] == sorted(ids)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert all(len(shard.ids) == size for shard in shards[:-1])
    shuffled = list(ids)
    random.shuffle(shuffled)
    assert cut(shuffled, size) == shards


def test_one_item_more_leaves_the_shards_before_it_alone():
    ids = [f"{i:03d}" for i in range(100)]
    assert cut([*ids, "999"])[0] == cut(ids)[0]


def test_what_cannot_be_cut():
    refused(lambda: cut(["a", "b", "a"]), "'a' occurs twice")
    with pytest.raises(ValueError, match="0 items"):
        cut(["a"], 0)


def test_names_follow_the_ids():
    assert Shard(3, ("a", "b")).name == Shard(3, ("a", "b")).name
    assert Shard(3, ("a", "b")).name != Shard(3, ("a", "c")).name
    assert Shard(3, ("a",)).name.startswith("00003-")


def test_a_journal_keeps_and_returns_bytes(tmp_path):
    first, second = cut("abcd", 2)
    journal = Journal(tmp_path / "deep" / "journal", KEY)
    assert not journal.has(first)
    journal.write(first, b"\x00\xff", {"seconds": 1.5})
    assert journal.has(first) and not journal.has(second) and journal.read(first) == b"\x00\xff"
    again = Journal(tmp_path / "deep" / "journal", dict(reversed(KEY.items())))  # Order of keys means nothing.
    assert again.has(first) and again.read(first) == b"\x00\xff"


def test_other_items_are_other_shards(tmp_path):
    journal = Journal(tmp_path, KEY)
    journal.write(cut("ab")[0], b"x")
    assert not journal.has(cut("ac")[0])


def test_other_options_are_refused_by_name(tmp_path):
    Journal(tmp_path, KEY)
    refused(lambda: Journal(tmp_path, {**KEY, "seed": 2}), "seed was 1, is 2", "Resume with those")
    refused(lambda: Journal(tmp_path, {**KEY, "policy": "budget:3"}), "policy was None, is 'budget:3'")
    (tmp_path / "key.json").write_text("{")
    refused(lambda: Journal(tmp_path, KEY), "not readable")


def test_notes_never_touch_results(tmp_path):
    shard = cut("ab")[0]
    for seconds in (1.0, 2.0):
        journal = Journal(tmp_path, KEY)
        journal.write(shard, b"same", {"seconds": seconds})
        assert journal.read(shard) == b"same"
    notes = json.loads((tmp_path / f"{shard.name}.notes.json").read_text())
    assert notes == {"seconds": 2.0}


def test_a_failed_write_leaves_no_shard(tmp_path, monkeypatch):
    shard = cut("ab")[0]
    journal = Journal(tmp_path, KEY)
    before = names(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.write(shard, b"half")
    assert not journal.has(shard) and names(tmp_path) == before
