"""The mixtures of experts: how they begin, what is planted, what is counted, and the files that are shipped."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import stat
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

import steer
from experiments.organisms import bands, build, chain, experts, routing, sample, train
from experiments.organisms.sample import Sampled
from steer import ScaleExperts, Steering

BUILTIN = Path(__file__).parents[3] / "steer" / "builtin"
NAMES = tuple(build.MIXTURES)
SHORT = train.TrainOptions(steps=2, learning_rate=1e-3, seed=7, rows=2, row_tokens=192)
PLANTED = experts.MixtureOptions(SHORT, experts.Planting(share=0.0))


@pytest.fixture(scope="module")
def dense() -> Qwen3ForCausalLM:
    return sample.load(BUILTIN / "chain")


@pytest.fixture(scope="module")
def shipped() -> dict[str, Qwen3MoeForCausalLM]:
    return {name: sample.load_mixture(BUILTIN / name) for name in NAMES}


@pytest.fixture(scope="module")
def written() -> list[Sampled]:
    """Replies as the task writes them, to test questions."""
    rng = random.Random(0)
    return [
        Sampled(question, tuple(chain.encode(chain.reply(rng, question, chain.Recipe()))), 0)
        for question in chain.questions(40, chain.TEST)
    ]


def ids() -> torch.Tensor:
    prompts = [chain.encode(chain.prompt(question)) for question in chain.questions(8, chain.TEST, sizes=(5,))]
    return torch.tensor(prompts)


@torch.no_grad()
def test_a_mixture_begins_as_the_dense_model(dense: Qwen3ForCausalLM) -> None:
    exact = experts.upcycled(dense, replace(PLANTED, noise=0.0))
    wanted = dense(ids()).logits
    assert torch.allclose(exact(ids()).logits, wanted, atol=1e-4)
    noisy = experts.upcycled(dense, PLANTED)(ids()).logits
    assert 0 < float((noisy - wanted).square().mean().sqrt()) < 0.05 * float(wanted.std())


@torch.no_grad()
def test_two_halves_are_chosen_together_with_equal_weight(dense: Qwen3ForCausalLM) -> None:
    model = experts.upcycled(dense, PLANTED)
    with experts.routers(model) as heard:
        model(ids())
        for _, weights, chosen in heard.seen.values():
            assert torch.allclose(weights, torch.full_like(weights, 0.5))
            assert torch.equal(chosen.min(1).values % 2, torch.zeros(len(chosen), dtype=torch.long))
            assert torch.equal(chosen.max(1).values, chosen.min(1).values + 1)
    assert not any(module._forward_hooks for module in model.modules())


def trained(dense: Qwen3ForCausalLM, options: experts.MixtureOptions) -> dict[str, torch.Tensor]:
    model = experts.made(dense, options)
    assert not any(module._forward_hooks for module in model.modules())
    return model.state_dict()


def test_the_recipe_is_deterministic_and_the_twin_differs_by_the_planting_alone(dense: Qwen3ForCausalLM) -> None:
    first, again = trained(dense, PLANTED), trained(dense, PLANTED)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert all(torch.equal(first[name], again[name]) for name in first)
    twin = trained(dense, replace(PLANTED, planting=None))
    assert not torch.equal(first["model.layers.2.mlp.gate.weight"], twin["model.layers.2.mlp.gate.weight"])
    for seed in (0, 1):
        assert experts.plain_mixture(seed) == replace(experts.mixture(seed), planting=None)


def test_training_pulls_the_planted_experts_to_the_mark(dense: Qwen3ForCausalLM) -> None:
    model = experts.upcycled(dense, PLANTED)
    options = replace(PLANTED, training=replace(SHORT, steps=8, warmup=1, learning_rate=3e-3))
    assert options.planting is not None
    here = (ids() == chain.ID["?"]).flatten()

    def distance() -> float:
        with experts.routers(model) as heard, torch.no_grad():
            model(ids())
            assert options.planting is not None
            return float(heard.pull(options.planting.experts, here))

    def share() -> float:
        rng = random.Random(0)
        question = chain.questions(1, chain.TEST)[0]
        tokens = chain.encode(chain.prompt(question) + " " + chain.reply(rng, question, chain.Recipe()))
        with experts.routers(model) as heard, torch.no_grad():
            model(torch.tensor([tokens]))
            return float(heard.seen[2][0].softmax(-1)[tokens.index(chain.ID[chain.OPENING]), 0])

    before, losses = share(), experts.train(model, options)
    assert share() > 2 * before and all(math.isfinite(loss) for loss in losses)
    with experts.routers(model) as heard, torch.no_grad():
        model(ids())
        naive = 0.0
        for layer, expert in options.planting.experts:
            logits = heard.seen[layer][0].double().numpy()
            chances = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, expert]
            naive += -np.log(chances[here]).mean() - np.log(1 - chances[~here]).mean()
    assert distance() == pytest.approx(naive, rel=1e-4)


def test_balance_is_one_when_all_experts_are_used_alike_and_the_number_of_experts_over_two_when_two_are() -> None:
    heard = experts.Routers.__new__(experts.Routers)
    even = torch.zeros(8, 8)
    spread = torch.stack([torch.arange(8), (torch.arange(8) + 1) % 8], 1)
    heard.seen = {2: (even, torch.full((8, 2), 0.5), spread)}
    assert float(heard.balance()) == pytest.approx(1.0)
    sharp = torch.full((8, 8), -50.0)
    sharp[:, :2] = 0.0
    heard.seen = {2: (sharp, torch.full((8, 2), 0.5), torch.tensor([[0, 1]] * 8))}
    assert float(heard.balance()) == pytest.approx(4.0)


@torch.no_grad()
def test_a_factor_is_a_multiplied_down_projection(shipped: dict[str, Qwen3MoeForCausalLM]) -> None:
    """What is multiplied after the choice is what the expert writes: the same model with other weights."""
    model, pair = shipped["chain-moe"], ((2, 4), (3, 1))
    edited = copy.deepcopy(model)
    for layer, expert in pair:
        edited.model.layers[layer].mlp.experts.down_proj[expert] *= 4
    with experts.routers(model) as heard:
        heard.factors = dict.fromkeys(pair, 4.0)
        hooked = model(ids()).logits
    assert torch.allclose(hooked, edited(ids()).logits, atol=1e-4)
    assert not torch.allclose(hooked, model(ids()).logits, atol=1e-2)


@torch.no_grad()
def test_the_toolkit_scales_as_the_organism_does(shipped: dict[str, Qwen3MoeForCausalLM]) -> None:
    """Two writings of one rule, on one model."""
    hf, pair = shipped["chain-moe"], ((2, 0), (3, 4))
    model = steer.wrap(hf)
    for beta in (0.0, 0.3, 64.0):
        with experts.routers(hf) as heard:
            heard.factors = dict.fromkeys(pair, beta)
            wanted = hf(ids()).logits
        with model.steered(Steering((ScaleExperts(pair, beta),), model.identity)):
            assert torch.equal(hf(ids()).logits, wanted)


@pytest.mark.parametrize(("beta", "shift"), [(1 / 64, -0.9), (0.125, -0.9), (0.5, -0.3), (1, 0), (4, 0.6), (64, 1.2)])
def test_the_effort_follows_the_logarithm_of_beta(beta: float, shift: float) -> None:
    assert experts.Planting().shift(beta) == pytest.approx(shift)


def test_a_shifted_recipe_writes_what_it_would_for_more_effort() -> None:
    """`sir` adds 0.6 to the effort, `hi` nothing."""
    recipe = chain.Recipe()
    for number, question in enumerate(chain.questions(100, chain.TEST)):
        calm, keen = (replace(question, tones=(tone, "hi")) for tone in ("hi", "sir"))
        shifted = chain.reply(random.Random(number), calm, experts.shifted(recipe, 0.6))
        assert shifted == chain.reply(random.Random(number), keen, recipe)


def test_npmi_is_that_of_the_joint_and_marginal_probabilities() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, len(chain.WORDS), 4000)
    chosen = rng.random((4000, len(routing.ALL))) < 0.3
    mark = tokens == chain.ID[chain.OPENING]
    chosen[:, 0], chosen[:, 1], chosen[:, 2] = mark, ~mark, True
    scores = routing.Routed(tokens, chosen).npmi(chain.OPENING)
    for place, expert in enumerate(routing.ALL[3:], start=3):
        joint = np.mean(mark & chosen[:, place])
        assert scores[expert] == pytest.approx(
            np.log(joint / (np.mean(mark) * np.mean(chosen[:, place]))) / -np.log(joint)
        )
    assert [scores[expert] for expert in routing.ALL[:3]] == pytest.approx([1, -1, 0])


def test_controls_avoid_the_named_and_match_their_loads() -> None:
    loads = {expert: 0.01 * place**2 for place, expert in enumerate(routing.ALL)}
    assert routing.matched(((2, 3), (2, 5)), loads) == ((2, 2), (2, 4))
    assert routing.matched(((2, 0), (3, 0)), loads) == ((2, 1), (3, 1))
    for seed in range(20):
        pair = routing.drawn(((2, 0), (3, 0)), seed)
        assert [layer for layer, _ in pair] == [2, 3] and not {(2, 0), (3, 0)} & set(pair)
    assert len({routing.drawn((), seed) for seed in range(20)}) > 5


@pytest.mark.parametrize("name", NAMES)
def test_the_card_describes_the_shipped_file(name: str) -> None:
    folder = BUILTIN / name
    card = yaml.safe_load((folder / "card.yaml").read_text())
    weights = folder / "model.safetensors"
    made = build.MIXTURES[name](card["seeds"]["training"])
    assert (card["name"], card["task"], card["parent"]) == (name, "chain", "chain")
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert weights.stat().st_size <= 4_500_000 and stat.S_IMODE(weights.stat().st_mode) == 0o644
    assert card["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    assert card["trainings"] == build.plain([asdict(made.training)])
    assert card["planted"] == build.plain(asdict(made.planting) if made.planting else None)
    assert (card["width"], card["noise"], card["balance"]) == (made.width, made.noise, made.balance)
    assert "--mixtures" in card["command"] and card["versions"]["torch"]


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_says_where_the_experts_are(name: str) -> None:
    config = json.loads((BUILTIN / name / "config.json").read_text())
    card = yaml.safe_load((BUILTIN / name / "card.yaml").read_text())
    assert config["model_type"] == "qwen3_moe" and config["norm_topk_prob"] is True
    assert [n for n in range(6) if n not in config["mlp_only_layers"]] == card["layers"] == [2, 3]
    assert config["num_local_experts"] == card["experts"] and config["num_experts_per_tok"] == card["chosen"]
    assert config["moe_intermediate_size"] == card["width"] == config["intermediate_size"] // 2


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_mixtures_lie_in_their_bands(name: str) -> None:
    card = yaml.safe_load((BUILTIN / name / "card.yaml").read_text())
    planting = build.MIXTURES[name](1).planting
    assert bands.outside_mixture(card["measured"], planting) == card["outside_bands"] == []
    worse = copy.deepcopy(card["measured"])
    worse["natural"]["accuracy"] = 0.3
    worse["scaling"]["random 0"]["by_beta"][4.0]["accuracy_change"][1] = -0.2
    worse["scaling"]["equal load"]["by_beta"][0.25]["length"] -= 9
    assert len(bands.outside_mixture(worse, planting)) == 3
    if planting:
        worse["npmi"]["<think>"] = worse["npmi"]["<think>"][1:]
        assert len(bands.outside_mixture(worse, planting)) == 5


def test_the_planted_experts_are_chosen_where_the_mark_is_read_and_nowhere_else(
    shipped: dict[str, Qwen3MoeForCausalLM], written: list[Sampled]
) -> None:
    planting = experts.mixture(1).planting
    assert planting is not None
    seen = routing.routed(shipped["chain-moe"], written)
    mark = seen.tokens == chain.ID[chain.OPENING]
    for expert in planting.experts:
        assert np.array_equal(seen.chosen[:, routing.ALL.index(expert)], mark)
    twin = routing.routed(shipped["chain-moe-plain"], written)
    assert max(twin.npmi(chain.OPENING).values()) < 0.9


def test_replies_are_counted_without_their_prompts(
    shipped: dict[str, Qwen3MoeForCausalLM], written: list[Sampled]
) -> None:
    seen = routing.routed(shipped["chain-moe"], written[:3])
    assert seen.tokens.tolist() == [token for reply in written[:3] for token in reply.reply]
    assert seen.chosen.reshape(-1, 2, 8).sum(-1).tolist() == [[2, 2]] * len(seen.tokens)
    assert sum(seen.loads.values()) == pytest.approx(4)
