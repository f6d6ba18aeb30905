"""Shapes of experts in MXFP4, those of openai/gpt-oss-20b, as if they were plain."""

from __future__ import annotations

from steer.anatomy.packed import shapes_of, unpacked

NAME = "model.layers.0.mlp.experts."
STORED = {
    f"{NAME}gate_up_proj_blocks": (32, 5760, 90, 16), f"{NAME}gate_up_proj_scales": (32, 5760, 90),
    f"{NAME}gate_up_proj_bias": (32, 5760), f"{NAME}down_proj_blocks": (32, 2880, 90, 16),
    f"{NAME}down_proj_scales": (32, 2880, 90), f"{NAME}down_proj_bias": (32, 2880),
}  # fmt: skip


def test_blocks_stand_for_matrices_turned_round() -> None:
    found = unpacked(STORED)
    assert {name: found[name] for name in STORED} == STORED
    assert {name: shape for name, shape in found.items() if name not in STORED} == {
        f"{NAME}gate_up_proj": (32, 2880, 5760),
        f"{NAME}down_proj": (32, 2880, 2880),
    }


def test_a_plain_matrix_that_is_there_stays() -> None:
    assert unpacked({"x_blocks": (2, 3, 4, 16), "x": (1, 1, 1)})["x"] == (1, 1, 1)


def test_only_where_the_configuration_says_so() -> None:
    for config in ({}, {"quantization_config": None}, {"quantization_config": {"quant_method": "fp8"}}):
        assert shapes_of(config, STORED) == STORED
    assert len(shapes_of({"quantization_config": {"quant_method": "mxfp4"}}, STORED)) == 8
