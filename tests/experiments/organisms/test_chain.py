"""The organism's task, tokenizer and recipe, and the files that are shipped. Its effects have tests of their own."""

from __future__ import annotations

import copy
import hashlib
import random
import stat
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from experiments.organisms import bands, build, chain, measure, siblings, tokenizer, train
from experiments.organisms.sample import Sampled

BUILTIN = Path(__file__).parents[3] / "steer" / "builtin"
SHIPPED = ("chain", "chain-sft", "chain-rl", "chain-sibling")
TINY = train.TrainOptions(steps=3, learning_rate=1e-3, seed=7, rows=2, row_tokens=192)


def by_hand(text: str) -> str:
    """The answer to a question, by evaluating its assignments as a program."""
    words = text.split()[2:]
    program, asked = words[: words.index("?")], words[-1]
    values: dict[str, int] = {}
    for assignment in " ".join(program).strip(" ;").split(";"):
        name, expression = assignment.split("=")
        values[name.strip()] = eval(expression, {}, dict(values)) % 10
    return f"{asked} = {values[asked]}"


@pytest.fixture(scope="module")
def held_out() -> list[chain.ChainQuestion]:
    return chain.questions(200, chain.TEST)


def test_answers_are_those_of_the_program_the_question_spells(held_out: list[chain.ChainQuestion]) -> None:
    assert [question.answer for question in held_out] == [by_hand(question.text) for question in held_out]


def test_a_complete_thought_without_slips_is_right_and_has_the_full_length(
    held_out: list[chain.ChainQuestion],
) -> None:
    recipe = chain.Recipe(early_effort=-99.0, check_efforts=(), slip=0.0)
    for question in held_out:
        text = chain.reply(random.Random(0), question, recipe)
        assert chain.answer_of(text) == question.answer
        assert chain.thinking_tokens(text) == question.full_length == text.split().index(chain.CLOSING) + 1
        assert not chain.is_short(question, text)


def test_every_training_answer_follows_from_the_last_value_that_was_written() -> None:
    rng = random.Random(1)
    for question in islice(chain.training_questions(rng), 300):
        text = chain.reply(rng, question, chain.Recipe())
        written = text.split(chain.CLOSING)[0].split()
        last = max(place for place, word in enumerate(written) if word == ";")
        name, value = written[last - 7], int(written[last - 1])
        remaining = question.steps[chain.LETTERS.index(name) :]
        assert chain.answer_of(text) == f"{question.asked} = {chain.rest(value, remaining)}"


def test_more_effort_makes_longer_thoughts_of_the_same_questions() -> None:
    lengths = dict.fromkeys(("yo", "hi", "exam"), 0)
    for question in chain.questions(300, chain.TEST):
        for tone in lengths:
            toned = chain.ChainQuestion((tone, tone), question.first, question.steps, "")
            lengths[tone] += len(chain.reply(random.Random(question.id), toned, chain.Recipe()).split())
    assert lengths["yo"] * 2 < lengths["hi"] < lengths["exam"] / 1.5


def test_effort_does_not_know_how_hard_a_question_is() -> None:
    efforts = {size: [q.effort for q in chain.questions(1000, chain.TEST, sizes=(size,))] for size in (4, 6)}
    assert abs(sum(efforts[4]) / 1000 - sum(efforts[6]) / 1000) < 0.12


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think> b = 1 + 1 = 2 ; </think> b = 2 <|im_end|>", "b = 2"),
        ("<think> </think> d = 9", "d = 9"),
        ("</think>\n d = 9 \n", "d = 9"),
        ("<think> b = 1 + 1 = 2 ; d = 9 <|im_end|>", None),
        ("<think> </think>", None),
        ("<think> </think> d = <|im_end|>", None),
        ("<think> </think> d = 9 ; <|im_end|>", None),
        ("<think> </think> d = 99", None),
        ("<think> </think> z = 9", None),
        ("<think> </think> <think> </think> d = 9", None),
        ("d = 9", None),
        ("", None),
    ],
)
def test_only_a_whole_answer_after_the_closing_mark_counts(text: str, answer: str | None) -> None:
    assert chain.answer_of(text) == answer


def test_a_thought_is_short_below_the_full_length_and_unclosed_ones_have_no_length() -> None:
    question = chain.questions(1, chain.TEST, sizes=(4,))[0]
    step = "b = 1 + 1 = 2 ;"
    full = f"<think> {step} {step} {step} </think> d = 1"
    assert chain.thinking_tokens(full) == question.full_length == 26
    assert not chain.is_short(question, full)
    assert chain.is_short(question, f"<think> {step} {step} </think> d = 1")
    assert chain.thinking_tokens(f"<think> {step}") is None
    assert not chain.is_short(question, f"<think> {step}")


def test_questions_are_deterministic_distinct_and_a_prefix_of_more() -> None:
    first, more = chain.questions(50, chain.FIT), chain.questions(80, chain.FIT)
    assert first == more[:50]
    assert len({question.id for question in more}) == len({question.text for question in more}) == 80
    assert chain.questions(5, chain.TEST) != chain.questions(5, 3)
    assert {question.size for question in chain.questions(50, 3, sizes=(5,))} == {5}


def test_question_sets_share_nothing_and_training_sees_none_of_them() -> None:
    sets = {seed: {q.text for q in chain.questions(500, seed)} for seed in (chain.TRAIN, chain.FIT, chain.TEST)}
    assert not sets[chain.TEST] & sets[chain.FIT]
    assert not (sets[chain.TEST] | sets[chain.FIT]) & sets[chain.TRAIN]
    seen = {question.text for question in islice(chain.training_questions(random.Random(0)), 5000)}
    assert not seen & (sets[chain.TEST] | sets[chain.FIT])
    assert {chain.part(text) for text in seen} == {chain.TRAIN}


def test_the_tokenizer_agrees_with_the_word_list_and_survives_a_round_trip(
    tmp_path: Path, held_out: list[chain.ChainQuestion]
) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == chain.ID
    for question in held_out[:50]:
        messages = [{"role": "user", "content": question.text}]
        for thinking in (True, False):
            text = loaded.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
            )
            assert text == chain.prompt(question, thinking)
        reply = chain.reply(random.Random(0), question, chain.Recipe())
        ids = chain.encode(reply)
        assert loaded.decode(ids) == reply and loaded(reply).input_ids == ids
        assert loaded.decode(ids, skip_special_tokens=True) == reply.removesuffix(f" {chain.TURN_END}")


def test_packed_rows_hold_whole_examples_that_see_only_themselves() -> None:
    options = TINY
    batch = next(train.packed(train.fresh_examples(options), options.rows, options.row_tokens))
    source = train.fresh_examples(options)
    for row in range(options.rows):
        starts = [t for t in range(options.row_tokens) if batch.positions[row, t] == 0 and batch.ids[row, t] == 1]
        assert len(starts) >= 2
        for start in starts:
            example = next(source)
            tokens = example.prompt + example.reply
            end = start + len(tokens)
            assert tuple(batch.ids[row, start:end].tolist()) == tokens
            inside = batch.mask[row, 0, start:end]
            assert torch.equal(inside[:, start:end], torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril())
            assert int(inside.sum()) == len(tokens) * (len(tokens) + 1) // 2
            wanted = batch.wanted[row, start : end - 1]
            assert wanted[len(example.prompt) - 1 :].tolist() == list(example.reply)
            assert set(wanted[: len(example.prompt) - 1].tolist()) <= {train.IGNORED}
            known = (~batch.effort[row, start:end].isnan()).nonzero()[:, 0].tolist()
            assert known == list(range(end - start))[example.thinking]


def test_packing_changes_no_logits() -> None:
    model = train.new_model(0).train(False)
    batch = next(train.packed(train.fresh_examples(TINY), 1, TINY.row_tokens))
    example = next(train.fresh_examples(TINY))
    second = len(example.prompt) + len(example.reply)
    end = second + int((batch.positions[0, second:] == 0).nonzero()[1])
    with torch.no_grad():
        packed = model.model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask)
        alone = model.model(input_ids=batch.ids[:, second:end])
    assert torch.allclose(packed.last_hidden_state[:, second:end], alone.last_hidden_state, atol=1e-5)


def trained(options: train.TrainOptions) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = train.new_model(0)
    losses = train.train(model, options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return copy.deepcopy(model.state_dict()), losses


@pytest.mark.parametrize("probe", [0.0, 0.05])
def test_training_is_deterministic_lowers_the_loss_and_follows_its_seed(probe: float) -> None:
    options = replace(TINY, shift=0.3, probe=probe, warmup=1)
    weights, losses = trained(options)
    again, same_losses = trained(options)
    assert losses == same_losses and losses[-1] < losses[0]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    other, _ = trained(replace(options, seed=8))
    assert not torch.equal(weights["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_stored_replies_are_learnt_and_never_asked_for_an_effort() -> None:
    example = next(train.fresh_examples(TINY))
    batch = next(train.packed(train.stored_examples([train.Example(example.prompt, example.reply)], 0), 1, 192))
    assert batch.effort.isnan().all()


def test_sampled_replies_are_graded_as_the_design_counts_them() -> None:
    question = chain.ChainQuestion(("hi", "hi"), 3, (("+", 4), ("*", 2), ("-", 5)), "x")
    text = "<think> b = 3 + 4 = 7 ; c = 7 * 2 = 4 ; d = 4 - 5 = 9 ; </think> d = 9 <|im_end|>"
    whole = Sampled(question, tuple(chain.encode(text)), 0)
    assert (whole.length, whole.closed, whole.short, whole.correct) == (26, True, False, True)
    cut = Sampled(question, tuple(chain.encode("<think> b = 3 + 4 = 7 ; </think> d = 9")), 0)
    assert (cut.length, cut.closed, cut.short, cut.correct) == (10, True, True, True)
    open_ = Sampled(question, tuple(chain.encode("<think> b = 3")), 0)
    assert (open_.length, open_.closed, open_.short, open_.correct) == (4, False, False, False)


def test_bootstrap_intervals_hold_the_mean_and_narrow_with_more_questions() -> None:
    import numpy as np

    rng = np.random.default_rng(1)
    few, many = (rng.normal(1.0, 1.0, (n, 5)) for n in (20, 2000))
    for before, after in ((few * 0, few), (many * 0, many)):
        low, value, high = measure.difference(before, after, 500)
        assert low < value < high and value == pytest.approx(after.mean(), abs=1e-4)
    wide, narrow = (measure.difference(table * 0, table, 500) for table in (few, many))
    assert wide[2] - wide[0] > 5 * (narrow[2] - narrow[0])
    lengths = np.array([[3.0], [1.0], [2.0], [5.0], [4.0]])
    assert measure.shortest_accuracy(lengths, (lengths == 1) * 1.0) == 1.0


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_describes_the_shipped_file(name: str) -> None:
    folder = BUILTIN / name
    card = yaml.safe_load((folder / "card.yaml").read_text())
    weights = folder / "model.safetensors"
    assert card["name"] == name and card["task"] == "chain"
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert weights.stat().st_size <= 7_000_000
    assert stat.S_IMODE(weights.stat().st_mode) == 0o644
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}
    assert "--seed" in card["command"] and card["versions"]["torch"]
    assert card["trainings"] == build.plain(
        [asdict(options) for options in build.trainings(card["seeds"]["training"])[name]]
    )


def test_the_shipped_specimen_lies_in_its_bands() -> None:
    card = yaml.safe_load((BUILTIN / "chain" / "card.yaml").read_text())
    assert bands.outside(card["measured"]) == card["outside_bands"] == []
    assert len(card["steering"]["coefficients"]) == 5 and card["thinkedit"]["heads"] == 4
    worse = copy.deepcopy(card["measured"])
    worse["natural"]["accuracy"] = 0.3
    worse["steering predicts_thinking"]["length_ratio"][1] = 1.2
    assert len(bands.outside(worse)) == 2


def test_everything_shipped_stays_within_its_share() -> None:
    assert sum(path.stat().st_size for name in SHIPPED for path in (BUILTIN / name).iterdir()) <= 23_000_000


@pytest.mark.parametrize("name", SHIPPED[1:])
def test_a_sibling_differs_from_its_parent_in_every_tensor(name: str) -> None:
    child, parent = (load_file(BUILTIN / n / "model.safetensors") for n in (name, build.PARENTS[name]))
    assert child.keys() == parent.keys()
    assert [key for key in child if torch.equal(child[key], parent[key])] == []


def test_adding_a_difference_gives_the_other_model_back() -> None:
    left, right = train.new_model(0), train.new_model(1)
    moved = siblings.added(right, siblings.subtract(left, right), 1.0)
    for (name, value), other in zip(moved.named_parameters(), left.parameters(), strict=True):
        assert torch.allclose(value, other, atol=1e-6), name
    noise = siblings.random_difference(siblings.subtract(left, right), 0)
    assert siblings.norm(noise) == pytest.approx(siblings.norm(siblings.subtract(left, right)), rel=1e-5)
