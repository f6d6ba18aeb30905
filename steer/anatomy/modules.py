"""Where an anatomy's parts are in a loaded model: module objects, found by the record's paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from accelerate.utils import align_module_device
from torch import Tensor, nn

from steer.anatomy.resolve import Anatomy
from steer.errors import SteerError


@dataclass(frozen=True)
class LayerPlaces:
    """The modules of one layer.

    Attributes:
        layer: the whole layer; its input is `resid_pre`, its output `resid_post`.
        attention_output: its input is `z`, its output `attn_raw`.
        attention_added: its output, times the multiplier, is `attn_out`: the attention block or the norm behind it.
        before_mlp: its input is `resid_mid`.
        mlp: the MLP block, or the block of experts.
        mlp_output: its output is `mlp_raw`; None where the layer has experts.
        mlp_added: its output, times the multiplier, is `mlp_out`: the MLP block or the norm behind it.
        router: returns `router_logits` and `router`; None where the layer has no experts.
    """

    layer: nn.Module
    attention_output: nn.Module
    attention_added: nn.Module
    before_mlp: nn.Module
    mlp: nn.Module
    mlp_output: nn.Module | None
    mlp_added: nn.Module
    router: nn.Module | None


@dataclass(frozen=True)
class Places:
    """The modules of a model; `backbone` is called once per forward pass, `head` makes logits of its output."""

    backbone: nn.Module
    embedding: nn.Module
    head: nn.Module
    layers: tuple[LayerPlaces, ...]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a loaded model's tensors by name; of a projection (out, in), also where its weight is packed."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():
        out, into = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if isinstance(out, int) and isinstance(into, int) and f"{name}.weight" in shapes:
            shapes[f"{name}.weight"] = (out, into)
    return shapes


def places(model: nn.Module, anatomy: Anatomy) -> Places:
    """Find every part that the record names.

    Raises:
        SteerError: a path of the record leads nowhere; the message shows what is there.
    """
    parts, inner = anatomy.record.model, anatomy.record.layer
    layers = list(_find(model, parts.layers, "the model").children())
    if len(layers) != anatomy.layers:
        raise SteerError(
            f"{parts.layers} holds {len(layers)} layers",
            f"{anatomy.layers} by the configuration",
            "Correct `model: layers` in the record",
        )
    found = []
    for number, layer in enumerate(layers):
        where = f"layer {number}"
        attention, mlp = anatomy.attention_contribution, anatomy.mlp_contribution
        linear = anatomy.record.linear_layer if number in anatomy.linear_layers else None
        outer = linear or inner
        experts = anatomy.record.experts if number in anatomy.expert_layers else None
        found.append(
            LayerPlaces(
                layer=layer,
                attention_output=_find(layer, outer.attention_output, where),
                attention_added=_find(layer, attention.norm or outer.attention, where),
                before_mlp=_find(layer, inner.before_mlp, where),
                mlp=_find(layer, inner.mlp, where),
                mlp_output=_find(layer, inner.mlp_output, where) if number in anatomy.dense_mlp_layers else None,
                mlp_added=_find(layer, mlp.norm or inner.mlp, where),
                router=None if experts is None else _find(layer, experts.router, where),
            )
        )
    return Places(
        _find(model, parts.backbone, "the model"),
        _find(model, parts.embedding, "the model"),
        _find(model, parts.head, "the model"),
        tuple(found),
    )


def _find(root: nn.Module, path: str, where: str) -> nn.Module:
    module = root
    for name in path.split("."):
        children = dict(module.named_children())
        if name not in children:
            raise SteerError(
                f"{where} has no module {path!r} ({name!r} is not among {', '.join(children) or 'no children'})",
                f"what the record names; {where} is: {module_tree(root)}",
                "Correct the path in a copy of the record and give it with anatomy=FILE",
            )
        module = children[name]
    return module


def module_tree(module: nn.Module, limit: int = 40) -> str:
    """Describe the modules inside one module on one line: path and class."""
    lines = [f"{name} ({type(child).__name__})" for name, child in module.named_modules() if name]
    return ", ".join(lines[:limit]) + (f" and {len(lines) - limit} more" if len(lines) > limit else "")


@contextmanager
def plain_weight(module: nn.Module, what: str) -> Iterator[Tensor]:
    """Hold a projection's weight (out, in) in memory while the context is open, also where accelerate offloads it.

    Args:
        module: the projection.
        what: its name, for the message.

    Raises:
        SteerError: the weight is quantised or sharded, so it is no plain matrix.
    """
    with in_memory(module):
        weight = getattr(module, "weight", None)
        shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or tuple(weight.shape) != shape:
            raise SteerError(
                f"the weight of {what} is a {type(weight).__name__} in a {type(module).__name__}: quantised or sharded",
                "a plain matrix in bf16, fp16 or fp32",
                "Load the model unquantised, or use a site whose form needs no weights, such as attn_raw",
            )
        yield weight.detach()


def in_memory(module: nn.Module) -> AbstractContextManager[None]:
    """Hold a module's own tensors in memory while the context is open, also where accelerate offloads them."""
    offloaded = any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False))
    held: AbstractContextManager[None] = align_module_device(module, "cpu") if offloaded else nullcontext()
    return held
