"""Changes of weights per request: adapters of low rank through vLLM's own multi-LoRA, chosen by name like a steering.

A patch of heads (ThinkEdit) is one exactly; it is written as an adapter for the very folder that vLLM reads. What is no
product of low rank, such as scaled experts, is refused with the way that it has: a patched checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steer.adapters import CONFIG
from steer.errors import SteerError
from steer.identity import ModelIdentity, check_same, digest
from steer.patches import Patch
from steer.steering import Steering
from steer.weights import file_hash

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
TOGETHER = 8
"""Adapters of one batch; more of them take turns."""
Weights = Patch | Steering | str | Path


@dataclass(frozen=True)
class Adapter:
    """An adapter that an engine may be asked for.

    Attributes:
        name: how it is asked for.
        folder: as PEFT writes it.
        rank: the highest of its targets.
        number: how vLLM tells it from others.
        fingerprint: of the patch, or of the folder's files.
    """

    name: str
    folder: Path
    rank: int
    number: int
    fingerprint: str

    def request(self) -> Any:
        """Return vLLM's `LoRARequest`."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.name, self.number, str(self.folder))


def prepared(
    given: Mapping[str, Weights], folder: Path, identity: ModelIdentity, scratch: Path, own: bool
) -> dict[str, Adapter]:
    """Return adapters ready to be asked for, writing those that are patches.

    Args:
        given: name -> a patch, a steering with a patch form, or the folder of an adapter.
        folder: that vLLM reads.
        identity: of the model.
        scratch: where adapters are written.
        own: whether `folder` is the model's own, not a copy with wider heads.

    Raises:
        SteerError: a change that is no product of low rank, another model's, or a folder that is no adapter.
    """
    found = {}
    for number, (name, change) in enumerate(given.items(), start=1):
        if isinstance(change, str | Path):
            place = Path(change)
            if not own:
                raise SteerError(
                    f"the adapter {place} was made for heads of another width than vLLM runs this model with",
                    "a patch, which is written for the copy with wider heads",
                    "Give the patch itself, or run on a GPU",
                )
            fingerprint = digest([file_hash(path).encode() for path in sorted(place.glob("adapter_*"))])
        else:
            place = scratch / f"adapter-{number}"
            fingerprint = _written(change, folder, identity, place, own)
        found[name] = Adapter(name, place, rank_of(place), number, fingerprint)
    return found


def _written(change: Patch | Steering, folder: Path, identity: ModelIdentity, place: Path, own: bool) -> str:
    """Write a patch as an adapter and return its fingerprint."""
    patch = change if isinstance(change, Patch) else Patch.from_steering(change, folder)
    check_same(patch.model, identity, "the patch")
    # A copy with wider heads has other bytes and another shape, and is the same model.
    fitting = patch if own else replace(patch, model=None, expects={})
    fitting.export_lora(folder, place)
    return patch.fingerprint


def rank_of(folder: Path) -> int:
    """Return the highest rank of an adapter, by its configuration.

    Raises:
        SteerError: there is none, or it says no rank.
    """
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        return max(int(config["r"]), *map(int, config.get("rank_pattern", {}).values()), 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteerError(f"{folder / CONFIG} says no rank ({error})", "an adapter as PEFT writes it") from None


def options(adapters: Iterable[Adapter], processors: bool, experts: int) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that make room for adapters.

    On processors vLLM 0.32 looks a request without an adapter up as the last place (index -1), and gives it what lies
    there. So all adapters have a place of their own, and the last one stays empty.

    Args:
        adapters: what may be asked for.
        processors: whether there is no accelerator.
        experts: how many a layer of the model has.

    Raises:
        SteerError: a rank above what vLLM has room for; on processors, a model with experts.
    """
    held = list(adapters)
    if not held:
        return {}
    if processors and experts:
        raise SteerError(
            "with adapters vLLM runs experts by a Triton kernel only, which processors do not have",
            "a model without experts, or a GPU",
            "Apply the patch to the checkpoint (`steer apply`) and serve that",
        )
    highest = max(adapter.rank for adapter in held)
    room = [rank for rank in RANKS if rank >= highest]
    if not room:
        raise SteerError(f"an adapter has rank {highest}", f"at most {RANKS[-1]}, which vLLM has room for")
    together = len(held) + 1 if processors else min(len(held), TOGETHER)
    kept = max(len(held), together)
    return {"enable_lora": True, "max_lora_rank": room[0], "max_loras": together, "max_cpu_loras": kept}


def only(adapters: Iterable[Adapter]) -> dict[str, Any]:
    """Return the argument of `vllm.LLM` that leaves modules alone which no adapter changes; none where one does not say."""
    names: set[str] = set()
    for adapter in adapters:
        config = json.loads((adapter.folder / CONFIG).read_bytes())
        modules = config.get("target_modules")
        if not isinstance(modules, list) or config.get("target_parameters"):
            return {}
        names |= {str(module).rsplit(".", 1)[-1] for module in modules}
    return {"lora_target_modules": sorted(names)} if names else {}
