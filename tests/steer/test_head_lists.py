"""Lists of heads as they are printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.head_lists import overlap, parse_heads, read_heads, text_of

# The first ten of ThinkEdit's list for R1-Distill-Qwen-1.5B (arXiv 2503.22048, its code).
PUBLISHED = "(21, 2), (17, 7), (16, 9), (21, 3), (25, 3), (17, 11), (15, 6), (21, 1), (19, 9), (15, 11)"


def test_published_lists_are_read_in_their_order(tmp_path):
    found = parse_heads(f"[{PUBLISHED}]")
    assert found[:3] == ((21, 2), (17, 7), (16, 9)) and len(found) == 10
    assert text_of(found) == f"[{PUBLISHED}]"
    (tmp_path / "heads.txt").write_text(f"[{PUBLISHED}]\n")
    assert read_heads(str(tmp_path / "heads.txt")) == found == read_heads(PUBLISHED)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 127)), min_size=1, unique=True))
def test_every_way_of_writing_is_the_same_list(heads):
    ways = (text_of(heads), str([list(head) for head in heads]), " ".join(f"{layer}:{head}" for layer, head in heads))
    assert {parse_heads(way) for way in ways} == {tuple(heads)}


@pytest.mark.parametrize("text", ["", "[]", "21", "(21, -2)", "(2, 3) and (4, 5)", "(2.5, 1)", "none.txt"])
def test_other_texts_are_refused(text):
    with pytest.raises(SteerError, match=r"neither a list|cannot be read"):
        read_heads(text)


def test_a_head_stands_once():
    with pytest.raises(SteerError, match=r"\(1, 2\) twice"):
        parse_heads("1:2 3:4 1:2")


def test_experts_are_called_so():
    assert read_heads("[(3, 0), (2, 5)]", "expert") == ((3, 0), (2, 5))
    with pytest.raises(SteerError, match="names the expert"):
        parse_heads("1:2 1:2", "expert")
    for text in ("three", "(3, 0) and more"):
        with pytest.raises(SteerError, match="list of experts"):
            read_heads(text, "expert")


def test_overlap_is_the_share_of_the_shorter_list():
    assert overlap([(0, 1), (2, 3)], [(2, 3), (4, 5), (6, 7)]) == 0.5
    with pytest.raises(SteerError, match="empty"):
        overlap([], [(1, 2)])


def test_what_is_no_text_is_refused_as_a_list(tmp_path):
    (tmp_path / "heads.bin").write_bytes(b"\xff\xfe\x80")
    for text in (str(tmp_path / "heads.bin"), "no such list " * 100):
        with pytest.raises(SteerError):
            read_heads(text)
