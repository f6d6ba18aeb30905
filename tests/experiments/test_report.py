import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from experiments.figure import draw
from experiments.page import marked
from experiments.report import examples, main, render
from experiments.wording import editing, percent
from steer.errors import SteerError

SECTIONS = (
    "headline",
    "direction",
    "steering",
    "effects",
    "heads",
    "edit",
    "lengths",
    "traces",
    "controls",
    "verification",
    "limits",
    "provenance",
)
VOID = {"meta", "link", "br", "img"}


class Reader(HTMLParser):
    """Collects tags, and fails where they do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)


@pytest.fixture(scope="module")
def page(small_demo):
    return small_demo.report.read_text()


@pytest.fixture(scope="module")
def read(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_every_section_is_there_in_order(read):
    ids = [attributes["id"] for _, attributes in read.tags if attributes.get("id")]
    assert ids == list(SECTIONS)


def test_it_needs_nothing_else(page, read):
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert not [tag for tag, _ in read.tags if tag in ("script", "img", "iframe", "object")]
    assert [attributes["href"] for tag, attributes in read.tags if tag == "link"] == ["data:,"]
    assert all(not name.startswith("on") for _, attributes in read.tags for name in attributes)


def test_it_says_what_was_found(page, small_demo):
    text = page.replace("\u00a0", " ")
    before, after = small_demo.baseline.accuracy, small_demo.edit.run.accuracy
    for value in (before, after, small_demo.random_heads[0].run.accuracy):
        assert percent(value).replace("\u00a0", " ") in text
    for sentence in small_demo.sentences():
        assert sentence.replace("\u00a0", " ") in text
    for layer, head in small_demo.edit.heads:
        assert f"layer {layer} head {head}" in text
    assert "What this shows, and what it does not" in text


def test_it_says_when_a_change_cannot_be_told_from_chance(small_demo):
    """Twelve questions prove little; the words must follow the interval."""
    beyond = small_demo.beyond_random_heads()
    said = "cannot be told from chance" in editing(small_demo)
    assert said == (beyond.low <= 0 <= beyond.high)


def test_the_pictures_are_there(read):
    classes = [(tag, attributes.get("class") or "") for tag, attributes in read.tags]
    assert sum(tag == "svg" for tag, _ in classes) == 14
    assert sum(kind == "chosen" for _, kind in classes) == 4
    assert sum(kind.startswith("cell") for _, kind in classes) == 48
    assert (
        sum(kind == "line main" for _, kind in classes) == 6 and sum(kind == "line control" for _, kind in classes) == 5
    )


def test_headings_go_down_in_steps(read):
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_examples_show_the_same_question_in_every_form(small_demo):
    found = examples(small_demo)
    assert found and len({example.question for example in found}) == len(found)
    for example in found:
        assert [heading for heading, *_ in example.replies][:2] == ["unchanged", "ThinkEdit"] and len(
            example.replies
        ) == 4
    assert '<span class="thought"><b>&lt;think&gt;</b>' in found[0].replies[0][1]


def test_replies_are_text_and_never_markup():
    hostile = "<script>alert(1)</script> <think> a < b & c </think> <img src=x>"
    html = str(marked(hostile, "<think>", "</think>"))
    assert "<script>" not in html and "<img" not in html
    assert html.count("<span") == html.count("</span>") == 1 and "a &lt; b &amp; c" in html
    assert str(marked("no thought & all", "<think>", "</think>")) == "no thought &amp; all"
    assert str(marked("<think> cut", "<think>", "</think>")).endswith("</b> cut</span>")


def test_the_same_result_gives_the_same_page(small_demo, page):
    assert render(small_demo) == page


@pytest.mark.parametrize("name", ["picture.png", "picture.svg"])
def test_the_picture_of_the_readme(small_demo, tmp_path, name):
    file = tmp_path / "images" / name
    main([str(small_demo.out / "result.json"), "--figure", str(file)])
    start = file.read_bytes()[:8]
    assert start == b"\x89PNG\r\n\x1a\n" if name.endswith("png") else b"<?xml" in start
    first = file.read_bytes()
    draw(small_demo.out / "result.json", file)
    assert len(file.read_bytes()) == pytest.approx(len(first), rel=0.01)


def test_a_picture_of_nothing_is_refused(tmp_path):
    for content in ("{", json.dumps({"a": 1}), "[]"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(SteerError, match="result"):
            draw(tmp_path / "x.json", tmp_path / "x.png")
    with pytest.raises(SteerError, match="cannot be read"):
        draw(tmp_path / "none.json", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
