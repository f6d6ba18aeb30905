"""PEFT as the oracle: what it makes of our adapters, and what we make of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import steer
from edits.lora import export_lora, extract_lora
from edits.lora.disk import checkpoint
from steer import adapters
from steer.operations import AddLowRank, Matrix, ProjectColumns
from steer.patches import Patch
from steer.subjects import open_subject
from tests.edits.material import patch

peft = pytest.importorskip("peft", reason="peft is not installed; `make setup` installs it")
pytestmark = pytest.mark.oracle
Folder = Callable[..., Path]
IDS = [5, 9, 14, 22, 30, 7, 11, 40]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PEFT says that a rank pattern of a target parameter did not match, although it applies it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*did not match any targeted module.*")
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for parameter in model.parameters():  # A map of the file is aligned otherwise, which alone moves logits by 2e-7.
        parameter.data = parameter.data.clone()
    return model.eval()


def under_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    return peft.PeftModel.from_pretrained(loaded(base, dtype), adapter).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(torch.tensor([IDS])).logits[0].float()
    return found


def ours(base: Path, edit: Patch) -> Tensor:
    """Logits of the model under the patch, in memory."""
    return steer.load(base, device="cpu", self_check=False).with_(edit).run([IDS])[0]


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference of logits, in units of the largest logit (about ten; tied models reach thirty)."""
    return float((a - b).abs().max() / b.abs().max())


def differing(first: nn.Module, second: nn.Module, before: nn.Module) -> tuple[int, float]:
    """How many weights of two edited models differ, and by how many units in the last place of what was added up."""
    count, worst, theirs, base = 0, 0.0, dict(second.named_parameters()), dict(before.named_parameters())
    for name, own in first.named_parameters():
        other, old = theirs[name].detach(), base[name].detach().double()
        gap = (own.detach().double() - other.double()).abs()
        count += int((own.detach() != other).sum())
        wide = (old.abs() + other.double().abs()).clamp(min=1e-30)
        worst = max(worst, float((gap / (torch.finfo(own.dtype).eps * 2 ** wide.log2().floor())).max()))
    return count, worst


def applied(edit: Patch, base: Path, out: Path) -> Path:
    """Write the edited checkpoint."""
    edit.plan(base).apply(out)
    return out


# A patch of attention heads.


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2", "phi3", "granite", "gemma3_text", "olmo2", "smollm3"])
def test_a_thinkedit_patch_runs_in_peft_as_in_memory(tiny_folder: Folder, tmp_path: Path, family: str) -> None:
    base, edit = tiny_folder(family), patch()
    export_lora(edit, base, tmp_path / "a")
    wanted, model = ours(base, edit), under_peft(base, tmp_path / "a")
    assert far(logits(model), wanted) < 1e-6
    assert far(logits(model.merge_and_unload()), wanted) < 1e-6
    assert far(logits(loaded(base)), wanted) > 1e-2


def test_merged_in_bfloat16_every_byte_is_that_of_the_applied_checkpoint(tiny_folder: Folder, tmp_path: Path) -> None:
    base, edit = tiny_folder("qwen3", dtype=torch.bfloat16), patch()
    export_lora(edit, base, tmp_path / "a")
    done = applied(edit, base, tmp_path / "edited")
    merged = under_peft(base, tmp_path / "a", torch.bfloat16).merge_and_unload()
    plain = loaded(base, torch.bfloat16)
    assert differing(merged, loaded(done, torch.bfloat16), plain) == (0, 0.0)
    assert differing(merged, plain, plain)[0] > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float64_factors_merged_in_float64_give_every_byte(
    tiny_folder: Folder, tmp_path: Path, dtype: torch.dtype
) -> None:
    base, edit = tiny_folder("qwen3", dtype=dtype), patch()
    export_lora(edit, base, tmp_path / "a", dtype="float64")
    done = applied(edit, base, tmp_path / "edited")
    merged = under_peft(base, tmp_path / "a", torch.float64).merge_and_unload().to(dtype)
    assert differing(merged, loaded(done, dtype), loaded(base, dtype)) == (0, 0.0)


def test_merged_in_float32_peft_rounds_once_more(tiny_folder: Folder, tmp_path: Path) -> None:
    """A, B, their product and the sum are rounded there, here the sum alone: five halves of a unit in the last place."""
    base, edit = tiny_folder("qwen3"), patch()
    export_lora(edit, base, tmp_path / "a")
    done = applied(edit, base, tmp_path / "edited")
    merged = under_peft(base, tmp_path / "a").merge_and_unload()
    count, worst = differing(merged, loaded(done), loaded(base))
    assert worst <= 2.5
    assert 0 < count < 0.15 * 3 * 16 * 48


def test_several_directions_other_projections_and_the_embedding(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("qwen3")
    edit = Patch((
        ProjectColumns(1, "attention_output", (0, 3), random(48, seed=1)),
        ProjectColumns(1, "attention_output", (3,), random(48, seed=2), 0.5),
        ProjectColumns(1, "attention_output", (1, 3), random(48, seed=1)),
        ProjectColumns(2, "mlp_output", None, random(48, seed=3)),
        ProjectColumns(-1, "embedding", None, random(48, seed=4)),
    ))  # fmt: skip
    made = export_lora(edit, base, tmp_path / "a")
    assert [row.rank for row in made.rows] == [1, 2, 1]
    wanted, model = ours(base, edit), under_peft(base, tmp_path / "a")
    assert far(logits(model), wanted) < 1e-6
    assert far(logits(model.merge_and_unload()), wanted) < 1e-6


# Experts.


def experts(width: int, hidden: int = 48) -> Patch:
    """Every expert matrix of a layer, two of an expert, and a dense projection beside them."""
    return Patch((
        ProjectColumns(1, "expert_down", None, random(hidden, seed=1), expert=2),
        ProjectColumns(1, "expert_down", None, random(hidden, seed=2), 0.5, 2),
        ProjectColumns(1, "expert_down", None, random(hidden, seed=3), expert=0),
        AddLowRank(Matrix(1, "expert_up", 3), random(2, hidden, seed=4) / 7, random(width, 2, seed=5)),
        AddLowRank(Matrix(1, "expert_gate", 3), random(1, hidden, seed=6) / 7, random(width, 1, seed=7)),
        ProjectColumns(3, "expert_gate", None, random(width, seed=8), expert=1),
        ProjectColumns(1, "attention_output", (1,), random(hidden, seed=9)),
    ))  # fmt: skip


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3", "glm4_moe", "granitemoe"]
)
def test_experts_run_in_peft_as_in_memory(tiny_folder: Folder, tmp_path: Path, family: str) -> None:
    base = tiny_folder(family)
    down = checkpoint(base).matrix(Matrix(1, "expert_down", 0))
    edit = experts(down.shape[1], down.shape[0])
    export_lora(edit, base, tmp_path / "a")
    wanted, model = ours(base, edit), under_peft(base, tmp_path / "a")
    assert far(logits(model), wanted) < 1e-6
    assert far(logits(model.merge_and_unload()), wanted) < 1e-6
    assert far(logits(loaded(base)), wanted) > 1e-2
    read = open_subject(f"{base}+{tmp_path / 'a'}", device="cpu", self_check=False)
    assert far(read.run([IDS])[0], wanted) < 1e-6


def test_dense_layers_of_a_model_with_experts_are_not_taken_for_experts(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("qwen3_moe")
    edit = Patch(
        (ProjectColumns(0, "mlp_output", None, random(48)), ProjectColumns(1, "attention_output", (1,), random(48)))
    )
    export_lora(edit, base, tmp_path / "a")
    assert far(logits(under_peft(base, tmp_path / "a")), ours(base, edit)) < 1e-6


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "qwen3_next", "qwen3_5_text", "glm4", "gemma4_text"])
def test_shared_experts_linear_attention_and_prefixes(tiny_folder: Folder, tmp_path: Path, family: str) -> None:
    base = tiny_folder(family)
    anatomy = checkpoint(base).anatomy
    words = ("attention_output", "mlp_output", "shared_expert_output")
    chosen = [matrix for word in words for matrix in anatomy.matrices(word)]
    operations = [
        ProjectColumns(matrix.layer, matrix.module, None, random(48, seed=index)) for index, matrix in enumerate(chosen)
    ]
    made = export_lora(Patch(tuple(operations)), base, tmp_path / "a")
    assert len(made.rows) == len(chosen) >= 4
    wanted, model = ours(base, Patch(tuple(operations))), under_peft(base, tmp_path / "a")
    assert far(logits(model), wanted) < 3e-6
    assert far(logits(loaded(base)), wanted) > 1e-2
    assert far(ours(base, adapters.read(tmp_path / "a", anatomy)), wanted) < 3e-6


# Adapters that PEFT made.


def trained(base: Path, out: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Tensor, Any]:
    """Save an adapter of PEFT with random A and B; return its logits and the merged model."""
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(loaded(base, dtype), peft.LoraConfig(**(options | settings))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
    model.save_pretrained(out)
    return logits(model), model.merge_and_unload()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "rank_pattern": {"layers.1.self_attn.qkv_proj": 7}}),
        ("qwen3", {"target_modules": ["o_proj", "down_proj"], "alpha_pattern": {"2.mlp.down_proj": 9}, "layers_to_transform": [1, 2]}),
        ("qwen3", {"target_modules": ["embed_tokens", "o_proj"]}),
        ("qwen3", {"target_modules": ["lm_head"]}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
        ("qwen3_moe", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True}),
        ("qwen3_moe", {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj"]}),
        ("gpt_oss", {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
        ("mixtral", {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ],
)  # fmt: skip
def test_an_adapter_of_peft_does_what_it_does_there(
    tiny_folder: Folder, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    base = tiny_folder(family)
    wanted, merged = trained(base, tmp_path / "a", **settings)
    view = open_subject(f"{base}+{tmp_path / 'a'}", device="cpu", self_check=False)
    assert far(view.run([IDS])[0], wanted) < 1e-6
    assert far(logits(loaded(base)), wanted) > 1e-2
    edit, _ = view.changes[0]
    assert isinstance(edit, Patch)
    done = applied(edit, base, tmp_path / "edited")
    theirs = dict(loaded(done).named_parameters())
    assert all(far(own.detach(), theirs[name].detach()) < 1e-6 for name, own in merged.named_parameters())
    assert far(logits(loaded(done)), wanted) < 1e-6


# Extraction.


def test_an_extracted_adapter_takes_the_base_to_the_tuned_model(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("qwen3")
    wanted, merged = trained(base, tmp_path / "a", target_modules=["q_proj", "o_proj", "down_proj"])
    merged.save_pretrained(tmp_path / "tuned")
    made = extract_lora(base, tmp_path / "tuned", 3, tmp_path / "b")
    assert made.error < 1e-6
    assert far(logits(under_peft(base, tmp_path / "b")), wanted) < 1e-6
    less = extract_lora(base, tmp_path / "tuned", 1, tmp_path / "c")
    assert less.error > 0.1
    assert far(logits(under_peft(base, tmp_path / "c")), wanted) > 1e-3
