"""The demo's report reads well in a browser: nothing missing, nothing fetched, nothing cut, also at phone width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import steer
from experiments.demo import Plan, demo
from tests.browser.window import ask, photograph

pytestmark = pytest.mark.browser

WIDTHS = (390, 820, 1280)
OVERFLOW = """(window, document) => {
  const scrolls = (node) => node && node !== document.body &&
    (["auto", "scroll"].includes(window.getComputedStyle(node).overflowX) || scrolls(node.parentElement));
  const wide = [...document.body.querySelectorAll("*")].filter((node) =>
    node.getBoundingClientRect().right > window.innerWidth + 1 && !scrolls(node) && !node.closest("svg svg, defs"));
  return {page: document.documentElement.scrollWidth, window: window.innerWidth,
          wide: wide.map((node) => node.tagName + "." + node.className).slice(0, 5)};
}"""
DRAWINGS = """(window, document) => [...document.querySelectorAll("svg, img, canvas")].map((node) => {
  const box = node.getBoundingClientRect();
  const label = node.getAttribute("aria-label") || node.getAttribute("alt") || (node.querySelector("title") || {}).textContent;
  return {width: box.width, height: box.height, label: label || ""};
})"""
LETTERS = """(window, document) => {
  const sizes = [];
  for (const node of document.querySelectorAll("p, li, td, th, figcaption, svg text")) {
    if (!node.textContent.trim() || !node.getClientRects().length) continue;
    const svg = node.closest("svg");
    const scale = svg && svg.viewBox.baseVal.width ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    sizes.push([parseFloat(window.getComputedStyle(node).fontSize) * scale, node.textContent.trim().slice(0, 40)]);
  }
  return sizes;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A small demo's report: fewer questions, everything else as in the demo."""
    card = steer.load("organism:chain").card
    plan = replace(Plan.of(card), questions=60, fit_questions=150)
    return demo(tmp_path_factory.mktemp("demo") / "demo", seed=0, plan=plan).report


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_reaches_over_the_edge(report, width, tmp_path):
    found = ask(report, width, OVERFLOW, tmp_path)
    assert found["window"] == width
    assert found["page"] <= width, found["wide"]
    assert found["wide"] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_drawing_has_a_size_and_a_name(report, width, tmp_path):
    drawings = ask(report, width, DRAWINGS, tmp_path)
    assert len(drawings) >= 4
    for drawing in drawings:
        assert drawing["width"] > 150 and drawing["height"] > 40, drawing
        assert len(drawing["label"]) > 10, drawing


@pytest.mark.parametrize("width", [390, 1280])
def test_letters_can_be_read(report, width, tmp_path):
    sizes = ask(report, width, LETTERS, tmp_path)
    assert len(sizes) > 50
    small = [text for size, text in sizes if size < 9]
    assert not small, small[:5]


def test_nothing_is_fetched(report, tmp_path):
    names = ask(
        report, 1280, "(window) => window.performance.getEntriesByType('resource').map((one) => one.name)", tmp_path
    )
    assert names == []


def test_the_parts_that_were_promised_are_there(report, tmp_path):
    text = ask(report, 1280, "(window, document) => document.body.innerText", tmp_path).lower()
    for part in ("coefficient", "accuracy", "thinkedit", "random", "head", "layer", "floor", "checkpoint"):
        assert part in text, part


def test_thinking_is_marked_in_the_examples(report, tmp_path):
    count = "(window, document) => [...document.querySelectorAll('.thought')].filter((n) => n.textContent.trim()).length"
    assert ask(report, 1280, count, tmp_path) >= 2


def test_a_photograph_is_not_blank(report, tmp_path):
    pixels = np.asarray(Image.open(photograph(report, 1280, 1600, tmp_path)).convert("RGB"))
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    assert pixels.shape == (1600, 1280, 3) and len(colours) > 50
    assert (pixels.min(axis=2) < 128).mean() > 0.01
