"""Train and measure the organism and its siblings: `python -m experiments.organisms.build --out DIR [--seed N]`.

A quarter of an hour or more on one idle core. DIR gets one folder a model, each an ordinary Hugging Face folder with a `card.yaml`.
A model that is already there is kept and measured again. Exit code 1 if the result is outside the bands.

`--mixtures` makes the two mixtures of experts instead, from the shipped `organism:chain`: as long again.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
import transformers
import yaml
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from experiments.organisms import bands, chain, experts, measure, routing, sample, siblings, tokenizer
from experiments.organisms.measure import Measured, MeasureOptions
from experiments.organisms.routing import ScalingOptions
from experiments.organisms.train import TrainOptions, new_model, train

log = logging.getLogger(__name__)
SPECIMEN_SEED: Final = 1
"""The training seed of the shipped specimen."""
PARENTS: Final = {"chain-sft": "chain", "chain-rl": "chain-sft", "chain-sibling": "chain"}
MIXTURES: Final = {"chain-moe": experts.mixture, "chain-moe-plain": experts.plain_mixture}
"""What makes the two mixtures of experts, which come from `chain`."""
SHIPPED: Final = Path(__file__).parents[2] / "steer" / "builtin" / "chain"


def stages(seed: int) -> tuple[TrainOptions, TrainOptions]:
    """The two stages of the organism: learning the task, then, briefly, the probe and random shifts.

    The first stage closes early a little more often, so that the second has short thoughts to unlearn.
    """
    return (
        TrainOptions(
            steps=1100,
            learning_rate=3e-3,
            warmup=100,
            seed=seed,
            recipe=chain.Recipe(early_slope=6.0, early_effort=-0.6),
        ),
        TrainOptions(steps=250, learning_rate=1e-3, seed=100 + seed, shift=0.3, probe=0.05),
    )


def trainings(seed: int) -> dict[str, list[TrainOptions]]:
    """Every training of a build, by model, for the cards."""
    return {
        "chain": list(stages(seed)),
        "chain-sft": [siblings.supervised(seed)],
        "chain-rl": [siblings.own_replies(seed)],
        "chain-sibling": [siblings.other_supervised(seed)],
        **{name: [options(seed).training] for name, options in MIXTURES.items()},
    }


def specimen(seed: int) -> Qwen3ForCausalLM:
    """A newly trained organism."""
    model = new_model(seed)
    for options in stages(seed):
        train(model, options)
    return model


def save(model: sample.Organism, folder: Path) -> None:
    """Write weights, configuration and tokenizer, readable by everybody."""
    model.save_pretrained(folder)
    tokenizer.save(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def make(out: Path, seed: int) -> dict[str, Qwen3ForCausalLM]:
    """The organism and its siblings, by name, trained where the folder does not have them yet."""
    if not (out / "chain" / "model.safetensors").exists():
        save(specimen(seed), out / "chain")
    if not all((out / name / "model.safetensors").exists() for name in PARENTS):
        for name, model in siblings.make(sample.load(out / "chain"), seed).items():
            save(model, out / name)
    return {name: sample.load(out / name) for name in ("chain", *PARENTS)}


def make_mixtures(out: Path, seed: int) -> dict[str, Qwen3MoeForCausalLM]:
    """The two mixtures, by name, trained where the folder does not have them yet."""
    for name, options in MIXTURES.items():
        if not (out / name / "model.safetensors").exists():
            save(experts.made(sample.load(SHIPPED), options(seed)), out / name)
    return {name: sample.load_mixture(out / name) for name in MIXTURES}


def provenance(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """What made a model's file: command, seeds, options, versions, hash."""
    mixtures = " --mixtures" if name in MIXTURES else ""
    return {
        "name": name,
        "task": "chain",
        "parent": "chain" if name in MIXTURES else PARENTS.get(name),
        "command": f"python -m experiments.organisms.build --out DIR{mixtures} --seed {seed}",
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "dtype": "bfloat16" if name in MIXTURES else "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "trainings": [asdict(options) for options in trainings(seed)[name]],
        "marks": {"opening": chain.OPENING, "closing": chain.CLOSING},
        "temperature": sample.TEMPERATURE,
        "max_new_tokens": sample.MAX_NEW_TOKENS,
        "seeds": {"training": seed, "train": chain.TRAIN, "fit": chain.FIT, "test": chain.TEST},
    }


def demo(options: MeasureOptions) -> dict[str, Any]:
    """Where the demo steers and edits, for each span; the first is the paper's."""
    chosen: dict[str, Any] = {}
    for key, span in zip(("steering", "steering_matched"), measure.SPANS, strict=True):
        grid = list(options.grid(span))
        chosen[key] = {"span": span, "site": "attn_out", "layers": list(options.layers), "coefficients": grid}
    for key, span in zip(("thinkedit", "thinkedit_matched"), measure.SPANS, strict=True):
        chosen[key] = {"span": span, "heads": options.heads}
    return chosen


def plain(value: Any) -> Any:
    """The same value in what YAML writes: tuples become lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write a model's `card.yaml`."""
    text = yaml.safe_dump(plain(card), sort_keys=False, width=120, default_flow_style=None)
    (folder / "card.yaml").write_text(text)


def headline(natural: Any) -> Measured:
    """The four figures that a reader looks for first."""
    return {
        "accuracy": natural["accuracy"],
        "mean_thinking_tokens": natural["length"],
        "share_short": natural["short"],
        "share_closed": natural["closed"],
    }


def write_cards(out: Path, seed: int, options: MeasureOptions, models: dict[str, Qwen3ForCausalLM]) -> Measured:
    """Measure every model, write its card, and return what was found about the organism."""
    found = measure.measure(models["chain"], options)
    card = {**provenance("chain", out / "chain", seed), **demo(options), "measuring": asdict(options)}
    card |= {"bands": {"natural": bands.BANDS, "each span": bands.SPAN_BANDS}, "outside_bands": bands.outside(found)}
    write_card(out / "chain", {**card, "measured": {**headline(found["natural"]), **found}})
    questions = chain.questions(options.questions, chain.TEST)
    for name in PARENTS:
        replies = sample.run(models[name], questions, options.sampling_seeds)
        figures: Measured = {**headline(measure.natural(replies)), "natural": measure.natural(replies)}
        if name == "chain-sibling":
            figures["arithmetic"] = siblings.arithmetic(models, options.questions, options.sampling_seeds[:2])
        write_card(out / name, {**provenance(name, out / name, seed), "measured": figures})
    return found


def mixture_card(folder: Path, seed: int) -> dict[str, Any]:
    """What a mixture's card says before anything is measured."""
    made = MIXTURES[folder.name](seed)
    return {
        **provenance(folder.name, folder, seed),
        "layers": experts.LAYERS,
        "experts": experts.EXPERTS,
        "chosen": experts.CHOSEN,
        "width": made.width,
        "noise": made.noise,
        "balance": made.balance,
        "planted": asdict(made.planting) if made.planting else None,
    }


def write_mixture_card(folder: Path, seed: int, found: Measured, options: ScalingOptions) -> list[str]:
    """Write a mixture's card with what was measured; return what of it lies outside its bands."""
    planting = MIXTURES[folder.name](seed).planting
    missed = bands.outside_mixture(found, planting)
    card = {**mixture_card(folder, seed), "measuring": asdict(options), "bands": bands.mixture_bands(planting)}
    write_card(folder, {**card, "outside_bands": missed, "measured": {**headline(found["natural"]), **found}})
    return missed


def mixtures(out: Path, seed: int, options: ScalingOptions) -> list[str]:
    """Make and measure both mixtures; return what lies outside their bands."""
    missed: list[str] = []
    for name, model in make_mixtures(out, seed).items():
        missed += write_mixture_card(out / name, seed, routing.measure(model, options), options)
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder that gets one folder a model")
    parser.add_argument("--seed", type=int, default=SPECIMEN_SEED, help="the training seed")
    parser.add_argument("--mixtures", action="store_true", help="make the two mixtures of experts instead")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    if options.mixtures:
        missed = mixtures(options.out, options.seed, ScalingOptions())
    else:
        models = make(options.out, options.seed)
        missed = bands.outside(write_cards(options.out, options.seed, MeasureOptions(), models))
    for line in missed:
        log.warning("outside its band: %s", line)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
