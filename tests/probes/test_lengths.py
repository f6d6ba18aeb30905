"""Short and long: thresholds, percentiles, groups, what is left out, and errors that help."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.collect.plan import NO_SPAN
from probes.collect.rows import Row
from probes.collect.run import collect
from probes.directions import length_direction
from probes.lengths import Choice, LengthRule, choose
from steer.errors import SteerError
from tests.probes import made


def rows(*lengths: int, groups: str = "", **told: object) -> list[Row]:
    return [
        made.row(index, length, group=groups[index] if groups else None, **told) for index, length in enumerate(lengths)
    ]


def chosen(given: list[Row], rule: LengthRule) -> Choice:
    return choose(given, [True] * len(given), rule)


def test_thresholds_are_strict() -> None:
    choice = chosen(rows(99, 100, 101, 999, 1000, 1001), LengthRule())
    assert (choice.short, choice.long) == ((0,), (5,))
    assert choice.counts == {
        "short": 1,
        "long": 1,
        "between": 4,
        "unclosed": 0,
        "without_span": 0,
        "without_group": 0,
        "one_kind_groups": 0,
    }
    assert choice.edges == {"all": (100.0, 1000.0)}


def test_unclosed_thoughts_are_left_out_unless_asked_for() -> None:
    some = [*rows(5, 2000), made.row(2, 3000, closed=False), made.row(3, 1, closed=None, finish_reason="length")]
    assert (chosen(some, LengthRule()).long, chosen(some, LengthRule()).counts["unclosed"]) == ((1,), 2)
    every = chosen(some, LengthRule(include_unclosed=True))
    assert (every.short, every.long, every.counts["unclosed"]) == ((0, 3), (1, 2), 0)


def test_replies_without_marks_count_by_their_length() -> None:
    some = [made.row(0, 5, closed=None, finish_reason="stop"), made.row(1, 2000, closed=None, finish_reason="stop")]
    assert (chosen(some, LengthRule()).short, chosen(some, LengthRule()).long) == ((0,), (1,))


def test_rows_without_the_span_are_left_out() -> None:
    some = rows(5, 6, 2000, 2001)
    choice = choose(some, [False, True, True, False], LengthRule())
    assert (choice.short, choice.long, choice.counts["without_span"]) == ((1,), (2,), 2)


def test_percentiles_take_the_nearest_share_of_whole_lengths() -> None:
    """Ten traces; the shortest 20 % of distinct lengths are two, and ties are never split."""
    assert chosen(rows(*range(10, 20)), LengthRule(percentiles=(20, 80))).short == (0, 1)
    assert chosen(rows(*range(10, 20)), LengthRule(percentiles=(20, 80))).long == (8, 9)
    tied = chosen(rows(10, 10, 10, 13, 14, 15, 16, 17, 18, 19), LengthRule(percentiles=(20, 80)))
    assert tied.short == (0, 1, 2), "three are nearer to two than none"
    mostly = chosen(rows(9, 10, 10, 10, 10, 10, 10, 10, 10, 11), LengthRule(percentiles=(20, 80)))
    assert (mostly.short, mostly.long) == ((0,), (9,)), "one is nearer to two than nine"


@given(st.lists(st.integers(1, 60), min_size=2, max_size=60), st.floats(1, 49), st.floats(51, 99))
def test_percentiles_never_overlap_and_never_split_a_length(lengths: list[int], low: float, high: float) -> None:
    given = rows(*lengths)
    if len(set(lengths)) == 1:
        with pytest.raises(SteerError, match="differ in length"):
            chosen(given, LengthRule(percentiles=(low, high)))
        return
    choice = chosen(given, LengthRule(percentiles=(low, high)))
    assert choice.short
    assert choice.long
    short, long = ({lengths[index] for index in part} for part in (choice.short, choice.long))
    assert max(short) < min(long)
    assert sum(length in short for length in lengths) == len(choice.short)
    assert sum(length in long for length in lengths) == len(choice.long)
    assert choice.edges["all"] == (max(short), min(long))


def test_groups_are_cut_each_by_its_own_percentiles() -> None:
    lengths = [*range(10, 20), *range(110, 120)]
    choice = chosen(rows(*lengths, groups="a" * 10 + "b" * 10), LengthRule(percentiles=(20, 80), by_group=True))
    assert [(stratum.label, stratum.short, stratum.long) for stratum in choice.strata] == [
        ("a", (0, 1), (8, 9)),
        ("b", (10, 11), (18, 19)),
    ]
    assert choice.edges == {"a": (11, 18), "b": (111, 118)}
    assert chosen(rows(*lengths), LengthRule(percentiles=(20, 80))).long == (16, 17, 18, 19), (
        "ungrouped, size passes for effort"
    )


def test_groups_of_one_kind_and_rows_without_group_are_counted() -> None:
    some = [*rows(5, 2000, 6, 7, groups="aabb"), made.row(9, 5)]
    choice = chosen(some, LengthRule(by_group=True))
    assert [stratum.label for stratum in choice.strata] == ["a"]
    assert (choice.counts["one_kind_groups"], choice.counts["without_group"], choice.counts["short"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        ((200, 300, 40), "1 are short and 0 long"),
        ((2000, 3000), "0 are short and 2 long"),
        ((200, 300), "0 are short and 0 long"),
    ],
)
def test_the_error_counts_both_and_suggests_percentiles_with_their_values(lengths: tuple[int, ...], found: str) -> None:
    with pytest.raises(SteerError, match=found) as error:
        chosen(rows(*lengths), LengthRule())
    assert "--percentiles 20 80" in error.value.remedy
    assert f"{min(lengths)} to {max(lengths)} tokens" in error.value.remedy
    assert f"at most {min(lengths)} and at least {max(lengths)} tokens" in error.value.remedy


def test_the_error_tells_when_only_the_groups_are_in_the_way() -> None:
    with pytest.raises(SteerError, match="within one group") as error:
        chosen(rows(5, 2000, groups="ab"), LengthRule(by_group=True))
    assert "--by-group" in error.value.remedy


def test_the_error_names_what_was_left_out() -> None:
    with pytest.raises(SteerError, match="2 unclosed") as error:
        chosen(rows(5, 2000, closed=False), LengthRule())
    assert "--include-unclosed" in error.value.remedy


def unthinking(index: int, length: int = 40, **told: object) -> Row:
    """A reply without a thought, whose length is that of the whole reply."""
    return made.row(index, length, **{"thinking_tokens": None, "closed": None, "finish_reason": "stop", **told})


def error_of(given: list[Row], present: list[bool], **options: object) -> SteerError:
    with pytest.raises(SteerError) as error:
        choose(given, present, LengthRule(), **options)  # type: ignore[arg-type]
    return error.value


def test_the_error_counts_replies_without_a_thought_and_names_the_cause_where_they_are_most() -> None:
    few = [*rows(200, 300, 400), made.row(3, 500, closed=False), unthinking(4), unthinking(5, finish_reason="length")]
    error = error_of(few, [True] * 4 + [False] * 2)
    assert "Of 6 traces 0 are short and 0 long" in str(error)
    assert "left out: 2 unclosed, 1 without the span; " in str(error), "a reply cut before it could think never closed"
    assert "without a thought: 2; with a thought that never closes: 1)" in str(error)
    assert "raw text" not in error.remedy
    most = [*rows(200, 300), *(unthinking(index) for index in range(2, 5))]
    error = error_of(most, [True] * 2 + [False] * 3)
    assert "without a thought: 3" in str(error)
    assert "never closes" not in str(error)
    for words in ("raw text", "messages", "no thinking marks", "before_answer", "--percentiles 20 80"):
        assert words in error.remedy


def test_replies_read_up_to_their_answer_need_no_thought() -> None:
    error = error_of([unthinking(0, 200), unthinking(1, 300)], [True, True])
    assert "without a thought: 2" in str(error)
    assert "raw text" not in error.remedy
    assert "--percentiles" in error.remedy


def test_the_error_counts_what_collecting_left_out() -> None:
    error = error_of(rows(200, 300), [True] * 2, dropped={NO_SPAN: 3, "without tokens": 1})
    assert f"left out on collecting: 3 {NO_SPAN}, 1 without tokens" in str(error)
    assert error.remedy.startswith("Thoughts here"), "three of six are not most"
    assert "raw text" in error_of(rows(200, 300), [True] * 2, dropped={NO_SPAN: 3}).remedy
    assert "collecting" not in str(error_of(rows(200, 300), [True] * 2, dropped={}))


def test_a_summary_tells_what_collecting_left_out() -> None:
    """Through the whole way: traces without a thought are dropped by the pass, and the direction's error knows them."""
    plain = [replace(trace, thinking_span=None, thinking_tokens=None, closed=None) for trace in made.traces(9)]
    unmarked = [replace(trace, id=f"p{trace.id}", answer_tokens=None) for trace in plain]
    some = [trace for trace in made.traces(4) if trace.closed]
    summary = collect(made.model(), [*some, *unmarked], spans=("thinking",))
    with pytest.raises(SteerError, match=f"{len(unmarked)} {NO_SPAN}") as error:
        length_direction(summary, span="thinking", below=1, above=1000)
    assert "before_answer" in error.value.remedy


@pytest.mark.parametrize(
    "options",
    [
        {"percentiles": (80, 20)},
        {"percentiles": (-1, 50)},
        {"percentiles": (20, 20)},
        {"below": 0},
        {"below": 500, "above": 100},
    ],
)
def test_impossible_rules_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(SteerError):
        LengthRule(**options)  # type: ignore[arg-type]


def test_rules_survive_a_round_trip_and_unknown_keys_do_not() -> None:
    for rule in (
        LengthRule(),
        LengthRule(5, 9),
        LengthRule(percentiles=(10, 90), by_group=True, include_unclosed=True),
    ):
        assert LengthRule.from_dict(rule.to_dict()) == rule
    with pytest.raises(SteerError, match="unknown key"):
        LengthRule.from_dict({"shorter": 3})
