"""What an engine is started with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer.backends.vllm.start import Machine, options
from steer.marks import Marks
from tests import tiny


@pytest.mark.parametrize(
    ("config", "given", "wanted"),
    [
        ({"dtype": "float32"}, {}, "float32"),
        ({"torch_dtype": "float32"}, {}, "float32"),
        ({"text_config": {"dtype": "float32"}}, {}, "float32"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16"}, {}, None),
        ({}, {}, None),
    ],
)
def test_weights_of_float32_stay_so(
    tmp_path: Path, config: dict[str, Any], given: dict[str, Any], wanted: str | None
) -> None:
    """vLLM makes half precision of them where nobody says anything, and `steer.load` does not."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = options(tmp_path, Machine("0.32.0", "cuda"), given, False, Marks(), tiny.tokenizer())
    assert found.get("dtype") == wanted
