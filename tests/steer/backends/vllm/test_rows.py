"""A step's rows against the formula, token by token: any schedule of chunks, batches, preemptions and slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.backends.vllm.library import Library
from steer.backends.vllm.lowering import Lowered, Row, gate
from steer.backends.vllm.request import Request, effective
from steer.backends.vllm.rows import Rows, Span
from steer.backends.vllm.tables import WIDTH, Tables, change
from steer.errors import SteerError
from steer.phases import PHASES, State, states_of
from steer.steering import Steering
from tests.steer.backends.vllm.made import HIDDEN, MARKS, declared, steerings, stored

CPU = torch.device("cpu")


@dataclass
class Case:
    """One request of a simulated engine."""

    name: str
    tokens: list[int]
    prompt: int
    marks_from: int
    steering: Steering | None
    args: dict[str, object]
    computed: int = 0
    entered: bool = False
    found: dict[int, dict[tuple[str, int], np.ndarray]] = field(default_factory=dict)


def in_phase(phase: str, state: State) -> bool:
    """DESIGN §2, written down again."""
    if phase == "all":
        return True
    if phase == "generated":
        return state in (State.OPENING, State.THINKING, State.ANSWER)
    return state.name.lower() == phase


def expected(steering: Steering | None, states: list[State], position: int, h: np.ndarray, site: str, layer: int):
    """What is added at one place, in float64, intervention after intervention."""
    value = h.astype(np.float64)
    acting = [] if steering is None else [each for each in steering.interventions if each.site == site]
    for each in acting:
        if layer not in each.active_layers or not in_phase(each.phase, states[position]):
            continue
        vector = each.direction[layer].double().numpy()
        if type(each).__name__ == "Add":
            value = value + each.coefficient * vector
        else:
            unit = vector / np.linalg.norm(vector)
            value = value - each.weight * unit * (unit @ value)
    return value - h


def looked_up(tables: Tables, site: str, layer: int, values: torch.Tensor) -> np.ndarray:
    project, add = tables.at.get((site, "project", layer)), tables.at.get((site, "add", layer))
    count = len(values)
    if project is None and add is None:
        return np.zeros((count, HIDDEN))
    return change(values, project, add, tables.code[:count], tables.slot[:count]).numpy()


def simulate(cases: list[Case], folder: Path, slots: int, draw_step) -> int:
    """Run until every token of every request is computed; return the steps."""
    engine = declared(folder, slots)
    tables = Tables(engine, engine.places, 64, CPU)
    rows = Rows(Library(engine), tables, requests=slots)
    places = sorted({(site, layer) for site, _, layer in engine.places})
    generator, steps, worst = np.random.default_rng(0), 0, 0.0
    while any(case.computed < len(case.tokens) for case in cases):
        spans, ids, owners = draw_step(cases, rows)
        steps += 1
        if not spans:
            continue
        tokens = torch.tensor(ids)
        rows.step(spans, tokens)
        values = torch.from_numpy(generator.normal(size=(len(ids), HIDDEN)).astype(np.float32))
        got = {place: looked_up(tables, *place, values) for place in places}
        for row, (case, position) in enumerate(owners):
            states = states_of(case.tokens, case.prompt, MARKS, case.marks_from)
            for site, layer in places:
                want = expected(case.steering, states, position, values[row].numpy(), site, layer)
                worst = max(worst, float(np.abs(got[site, layer][row] - want).max()))
                if case.steering is None:
                    assert not got[site, layer][row].any(), (case.name, position, site, layer)
        for case, _ in owners:
            case.computed = case.computed + 1
    assert worst < 1e-5
    return steps


def request(name: str, base: str, c: float, phase: str | None, prompt: int, start: int) -> tuple[Steering | None, dict]:
    acting = effective(steerings()[name], c, phase)
    if acting is None:
        return None, {}
    told = Request(acting.fingerprint, base, name, c, phase, prompt, start, in_prompt=True, positional=True)
    return acting, {"steering": told.to_dict()}


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_schedule_changes_every_token_as_the_formula_says(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    bases = stored(folder)
    slots = data.draw(st.integers(2, 4), label="slots")
    cases = []
    for number in range(data.draw(st.integers(1, 6), label="requests")):
        tokens = data.draw(st.lists(st.integers(2, 10), min_size=1, max_size=14))
        prompt = data.draw(st.integers(1, len(tokens)))
        start = data.draw(st.integers(0, prompt))
        name = data.draw(st.sampled_from([None, *bases]))
        steering, args = (None, {})
        if name is not None:
            phase = data.draw(st.sampled_from([None, *PHASES])) if name != "mixed" else None
            steering, args = request(name, bases[name], data.draw(st.sampled_from([1.0, -2.0, 0.5, 0.0])), phase, prompt, start)  # fmt: skip
        cases.append(Case(f"r{number}", tokens, prompt, start, steering, args))

    def draw_step(cases, rows):
        spans, ids, owners = [], [], []
        waiting = [case for case in cases if case.computed < len(case.tokens)]
        for case in data.draw(st.permutations(waiting))[:slots]:
            if case.entered and data.draw(st.booleans()) and data.draw(st.booleans()):  # Preempted, maybe from a cache.
                rows.remove(case.name)
                case.entered, case.computed = False, data.draw(st.integers(0, case.computed))
            if not case.entered:
                known = list(case.tokens[: max(case.prompt, case.computed)])
                rows.add(case.name, case.args, lambda known=known: known)
                case.entered = True
            count = data.draw(st.integers(1, len(case.tokens) - case.computed))
            spans.append(Span(case.name, len(ids), count, case.computed))
            ids += case.tokens[case.computed : case.computed + count]
            owners += [(case, case.computed + offset) for offset in range(count)]
        for case in cases:  # Those that did not run keep their rows only while they are among the running.
            if case.entered and all(case is not owner for owner, _ in owners):
                rows.remove(case.name)
                case.entered = False
        return spans, ids, owners

    simulate(cases, folder, slots, draw_step)


def test_ten_thousand_steerings_through_64_slots_never_meet(tmp_path):
    """Each token has a strength of its own, plain ones lie between them; 64 in a step, slots taken over and over."""
    stored(tmp_path / "store")
    engine = declared(tmp_path / "store", slots=64)
    tables = Tables(engine, engine.places, 80, CPU)
    vector, place = torch.linspace(-1, 1, HIDDEN), ("resid_post", "add", 2)
    generator = np.random.default_rng(1)
    for start in range(0, 10_000, 50):
        strengths = [float(number + 1) for number in range(start, start + 50)]
        again = [float(generator.integers(1, start)) for _ in range(14)] if start else []  # Some come back.
        wanted = {
            str(c): Lowered({place: Row(gate("all"), vector=c * vector)}, False, True, False) for c in strengths + again
        }
        slots = tables.slots_of(wanted)
        assert len(set(slots.values())) == len(wanted) and 0 not in slots.values()
        rows = generator.permutation([0.0] * 14 + strengths + again)
        tables.tell(torch.tensor([slots[str(c)] * WIDTH + State.OPENING if c else 0 for c in rows.tolist()]))
        got = looked_up(tables, "resid_post", 2, torch.zeros(len(rows), HIDDEN))
        assert np.array_equal(got, rows[:, None].astype(np.float32) * vector.numpy())


def test_a_step_without_steering_clears_what_the_last_one_left(tmp_path):
    base = stored(tmp_path / "store")["all"]
    engine = declared(tmp_path / "store")
    tables = Tables(engine, engine.places, 8, CPU)
    rows = Rows(Library(engine), tables, requests=4)
    _, args = request("all", base, 1.0, None, 4, 0)
    rows.add("a", args, lambda: [5, 5, 5, 5])
    rows.step([Span("a", 0, 4, 0)], None)
    assert tables.slot[:4].tolist() == [1, 1, 1, 1] and not tables.slot[4:].any()
    rows.remove("a")
    rows.step([Span("b", 0, 6, 0)], None)
    assert not tables.code.any() and not tables.slot.any()


def test_what_cannot_be_followed_is_refused(tmp_path):
    bases = stored(tmp_path / "store")
    engine = declared(tmp_path / "store")
    rows = Rows(Library(engine), Tables(engine, engine.places, 8, CPU), requests=4)
    _, args = request("thinking", bases["thinking"], 1.0, None, 2, 0)
    rows.add("a", args, lambda: [5, 5])
    with pytest.raises(SteerError, match="needs the step's tokens"):
        rows.step([Span("a", 0, 2, 0)], None)
    with pytest.raises(SteerError, match="goes on at token 5, and the host knows 2"):
        rows.step([Span("a", 0, 1, 5)], torch.tensor([5]))
    with pytest.raises(SteerError, match="a step has 9 tokens".replace("a", ".", 1)):
        rows.step([Span("a", 0, 9, 0)], torch.zeros(9, dtype=torch.long))
    with pytest.raises(SteerError, match="what the front process made of it"):
        rows.add("b", {"steering": "all"}, lambda: [5])
    with pytest.raises(SteerError, match="at most the 4 slots"):
        lowered = rows.library.lowered(Request.from_dict(args["steering"]))
        rows.tables.slots_of({str(number): lowered for number in range(5)})


def test_preempted_requests_keep_their_rows_while_others_take_their_places(tmp_path):
    """Under priorities a request waits preempted while others come: more are followed than may run at once."""
    base = stored(tmp_path / "store")["thinking"]
    engine = declared(tmp_path / "store", slots=2)
    tables = Tables(engine, engine.places, 8, CPU)
    rows = Rows(Library(engine), tables, requests=2)
    tokens = [5, 3, 5, 4, 5]
    for name in "abcde":
        _, args = request("thinking", base, 1.0, None, 1, 0)
        rows.add(name, args, lambda: tokens)
        rows.step([Span(name, 0, 3, 0)], torch.tensor(tokens[:3]))
    want = [state % WIDTH for state in states_of(tokens, 1, MARKS)]
    rows.step([Span("a", 0, 2, 3), Span("d", 2, 2, 3)], torch.tensor(tokens[3:] * 2))
    assert (tables.code[:4] % WIDTH).tolist() == want[3:] * 2
    for name in "abcde":
        rows.remove(name)
    rows.add("f", args, lambda: tokens)
    rows.step([Span("f", 0, 5, 0)], torch.tensor(tokens))
    assert (tables.code[:5] % WIDTH).tolist() == want
