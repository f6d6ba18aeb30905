"""A bundled organism with wider heads computes what it computed, up to float32's rounding and the norm's epsilon."""

from __future__ import annotations

import pytest
import torch

import steer
from steer.backends.vllm.widened import head_width, widen
from steer.errors import SteerError
from steer.sources import locate


@pytest.mark.parametrize("name", ["chain", "chain-moe"])
def test_wider_heads_compute_the_same(name, tmp_path):
    folder = widen(locate(f"organism:{name}").folder, tmp_path / "wide")
    plain, wide = (steer.load(each, dtype=torch.float32) for each in (f"organism:{name}", str(folder)))
    ids = torch.randint(3, plain.anatomy.vocab, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    one, other = plain.run([ids])[0], wide.run([ids])[0]
    assert (head_width(plain.path), head_width(folder)) == (16, 32)
    assert float((one - other).abs().max()) < 2e-4 < float(one.abs().max()) / 1000


def test_another_family_is_refused(tiny_folder, tmp_path):
    with pytest.raises(SteerError, match="eads of a qwen2 model"):
        widen(tiny_folder("qwen2"), tmp_path / "wide")
    assert not (tmp_path / "wide").exists()
