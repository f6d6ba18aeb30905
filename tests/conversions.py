"""The only place that asks transformers how it turns a checkpoint's tensors into parameters, so that a new version of it
is met in one file. `get_model_conversion_mapping` is what PEFT builds on; the other two are internals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Where(NamedTuple):
    """Where transformers puts a stored tensor.

    Attributes:
        parameter: its path in the loaded model.
        expert: index on the parameter's first axis; None for all of it.
        part: which of `parts` equal parts of the next axis.
    """

    parameter: str
    expert: int | None
    part: int
    parts: int


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def memory_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Where]:
    """Say where transformers puts every stored tensor; `model` may be without weights."""
    table = get_model_conversion_mapping(model)
    renamings = [each for each in table if isinstance(each, WeightRenaming)]
    converters = [each for each in table if isinstance(each, WeightConverter)]
    state = model.state_dict()
    found = {}
    for name in names:
        path, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        sources = next((each.source_patterns for each in converters if pattern in each.source_patterns), [pattern])
        expert = EXPERT.search(name)
        found[name] = Where(path, None if expert is None else int(expert[1]), sources.index(pattern), len(sources))
    return found


def stored(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that transformers would store for these parameters, by their names in a checkpoint."""
    found: dict[str, Tensor] = revert_weight_conversion(model, state)
    return found
