"""The front process and the engine core: what a request asks for is resolved once, and checked twice.

The front resolves `extra_args` (see `steer.backends.vllm.request`) where a caller can still be told what is wrong; the
engine core reads the same steering again before it lets the request in, so that a worker never meets one that it cannot
run. Both refuse; neither lets a request run unsteered that asked for steering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from steer.backends.vllm import capture, prefix
from steer.backends.vllm.config import Declared
from steer.backends.vllm.library import Library
from steer.backends.vllm.lowering import Lowered, lower
from steer.backends.vllm.request import KEY, Asked, Request, asked, marks_from
from steer.backends.vllm.supported import check_config
from steer.errors import SteerError


class RefusedError(ValueError, SteerError):
    """A `SteerError` as vLLM's servers understand it: status 400 with this text."""

    def __init__(self, error: SteerError) -> None:
        SteerError.__init__(self, error.found, error.expected, error.remedy)


class Front:
    """What resolves requests in the process that makes them; `declared` is None in an engine that is not to steer."""

    def __init__(self, declared: Declared | None, speculative: bool) -> None:
        self.declared, self.speculative = declared, speculative
        self.library = None if declared is None else Library(declared)

    @classmethod
    def of(cls, vllm_config: Any) -> Front:
        """Read an engine's configuration."""
        return cls(Declared.from_config(vllm_config.additional_config), vllm_config.speculative_config is not None)

    def resolve(self, request: Any) -> None:
        """Replace what an `EngineCoreRequest` asks for by what the engine is to run.

        Raises:
            RefusedError: a `ValueError` with what is wrong.
        """
        params = request.sampling_params
        extra = {} if params is None else params.extra_args or {}
        try:
            wanted, read = asked(extra), self._read(request, extra)
            if wanted is None:
                return
            if self.declared is None or self.library is None:
                raise SteerError(
                    f"the request asks for steering {wanted.name!r}, and this engine was not started for steering",
                    "an engine with additional_config['steering']",
                    "Use `steer serve` or SteeredLLM",
                )
            if request.resumable:
                raise SteerError("a steered request has a prompt that goes on growing", "one that is complete", "Phases are told from the prompt's length")  # fmt: skip
            resolved = self._resolved(wanted, request.prompt_token_ids, request.prompt_embeds is not None)
            if resolved is not None and read is not None:
                resolved = replace(resolved, prompt_length=read.prompt_length)
        except SteerError as error:
            raise RefusedError(error) from error
        params.extra_args = {key: value for key, value in extra.items() if key not in _KEYS}
        if resolved is not None:
            params.extra_args[KEY] = resolved.to_dict()

    def _read(self, request: Any, extra: Mapping[str, Any]) -> capture.Wanted | None:
        places = () if self.declared is None else self.declared.capture
        skips = None if request.sampling_params is None else request.sampling_params.skip_reading_prefix_cache
        return capture.wanted_by(extra, places, len(request.prompt_token_ids or ()), skips)

    def _resolved(self, wanted: Asked, token_ids: Any, embedded: bool) -> Request | None:
        assert self.declared is not None and self.library is not None, "asked before"
        if embedded or not token_ids:
            raise SteerError("a steered request has a prompt of embeddings", "a prompt of tokens", "Phases are told from tokens")  # fmt: skip
        steering = self.library.acting(wanted.base, wanted.coefficient, wanted.phase)
        if steering is None:
            return None
        lowered = lower(steering, self.declared.experts, self.declared.chosen)
        start = self._marks_from(wanted, token_ids, lowered)
        return Request(
            fingerprint=steering.fingerprint,
            base=wanted.base,
            name=wanted.name,
            coefficient=wanted.coefficient,
            phase=wanted.phase,
            prompt_length=len(token_ids),
            marks_from=start,
            in_prompt=lowered.first_is_prompt,
            positional=lowered.positional,
        )

    def _marks_from(self, wanted: Asked, token_ids: Any, lowered: Lowered) -> int:
        assert self.declared is not None, "asked before"
        if not lowered.marked:
            return 0
        if not self.declared.marks.exist:
            raise SteerError(
                f"steering {wanted.name!r} acts between marks around the thinking, and this model's tokenizer has none",
                "phase prompt, generated or all",
            )
        if self.speculative:
            raise SteerError(
                f"steering {wanted.name!r} acts between marks, and this engine drafts tokens that may be rejected",
                "phase prompt, generated or all under speculative decoding",
                "Start the engine without speculative decoding",
            )
        return marks_from(wanted.prompt, token_ids, self.declared.marks, self.declared.endings)


_KEYS = (KEY, f"{KEY}_base", f"{KEY}_coefficient", f"{KEY}_phase", f"{KEY}_prompt")


class Core:
    """What checks requests in the engine core, and keeps the prefix cache apart."""

    def __init__(self, library: Library) -> None:
        self.library = library

    @classmethod
    def of(cls, vllm_config: Any) -> Core | None:
        """Return one for an engine that is to steer.

        Raises:
            SteerError: the engine's configuration has something that steering does not support.
        """
        declared = Declared.from_config(vllm_config.additional_config)
        if declared is None:
            return None
        check_config(vllm_config, declared)
        library = Library(declared)
        prefix.install()
        return cls(library)

    def admit(self, request: Any) -> None:
        """Refuse a request that a worker could not run; vLLM then fails this request alone.

        Raises:
            SteerError: what is wrong.
        """
        extra = None if request.sampling_params is None else request.sampling_params.extra_args
        if isinstance(extra, Mapping) and KEY in extra:
            self.library.lowered(Request.from_dict(extra[KEY]))
        if isinstance(extra, Mapping) and capture.KEY in extra:
            capture.Wanted.from_dict(extra[capture.KEY])
