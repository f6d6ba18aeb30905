"""Compiled models: torch.compile fixes what runs, so hooks that are added later would be ignored without a word."""

from __future__ import annotations

from torch import nn

from steer.errors import SteerError


def compiled(model: nn.Module) -> bool:
    """Whether this very module was compiled."""
    return getattr(model, "_compiled_call", None) is not None or getattr(model, "_compiled_call_impl", None) is not None


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model that torch.compile has seen: it would silently ignore hooks that are added later.

    Raises:
        SteerError: the model, or a part of it, is compiled.
    """
    for name, module in model.named_modules():
        if compiled(module) or hasattr(module, "_orig_mod"):
            raise SteerError(
                f"{'the module ' + name if name else 'the model'} is compiled, and compiled code ignores hooks that are added after compilation",
                "an uncompiled model",
                "Load it again without torch.compile; with Hugging Face's generate pass disable_compile=True",
            )
