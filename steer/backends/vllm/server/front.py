"""What stands between the network and vLLM, without either: settings, the folder, the store and what the engine can do.

`steer serve` tells the API servers what it was started with through one variable of the environment, as JSON; there
may be several of them, each its own process.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from steer import yaml_text
from steer.anatomy.headers import read_headers
from steer.anatomy.packed import shapes_of
from steer.anatomy.resolve import resolve
from steer.backends.vllm.config import Declared
from steer.backends.vllm.lowering import lower
from steer.backends.vllm.request import effective
from steer.backends.vllm.server.asking import (
    Ask,
    Prompt,
    RequestError,
    Served,
    check_model,
    decide,
    rewritten,
    said,
    who,
)
from steer.backends.vllm.server.directory import Directory, Entry
from steer.backends.vllm.server.settings import Key, Settings, parse
from steer.backends.vllm.store import Store
from steer.errors import SteerError
from steer.identity import ModelIdentity, known_keys, shape_id
from steer.phases import check_phase
from steer.steering import Steering
from steer.vocabulary import tokenizer_id_of
from steer.weights import weights_id

VARIABLE = "STEER_SERVER"
TRIED = 4096
"""Strengths and phases of steerings that are known to be good."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """What a server was started with; no secret is in it.

    Attributes:
        name: of the model, as requests call it.
        model: its folder.
        config: `additional_config` of the engine.
        steerings: the folder of steerings; None: there is none.
        settings: the file of settings; None: there is none.
        flags: settings that were given as flags, which count before those of the file.
        adapters: name and fingerprint of the adapters that the engine has.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    steerings: str | None = None
    settings: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """Return JSON on one line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_environment(cls) -> Started:
        """Read what `steer serve` left.

        Raises:
            SteerError: it was not `steer serve` that started this process.
        """
        text = os.environ.get(VARIABLE)
        if not text:
            raise SteerError(
                f"the variable {VARIABLE} is not set, so nobody said which steerings to serve",
                "a server that `steer serve` started",
                "Use steer serve MODEL --steerings DIR -- ARGUMENTS OF VLLM",
            )
        plain = json.loads(text)
        known_keys(plain, [each.name for each in fields(cls)], VARIABLE)
        return cls(**plain)

    def read_settings(self) -> Settings:
        """Read the settings, flags first.

        Raises:
            SteerError: as `steer.backends.vllm.server.settings.read`.
        """
        document = {} if self.settings is None else yaml_text.load(Path(self.settings))
        return parse({**document, **self.flags}, f"the settings {self.settings or 'of the command line'}")


class Front:
    """Decides requests.

    Args:
        started: see there.

    Raises:
        SteerError: the folder, the store, the settings, a key or the model is not as it has to be.
    """

    def __init__(self, started: Started) -> None:
        declared = Declared.from_config(started.config)
        if declared is None:
            raise SteerError("the engine was not told to steer", "additional_config of `steer serve`")
        self.started, self.declared, self.store = started, declared, Store(declared.store)
        self._check_model = _model_check(started.model)
        folder = None if started.steerings is None else Path(started.steerings)
        self.directory = Directory(folder, self._fits, dict(started.adapters))
        self._settings = started.read_settings()
        self._secrets = self._settings.secrets()
        self._stamp, self._problem = self._settings_stamp(), ""
        self._lock = threading.Lock()
        self._tried: OrderedDict[tuple[str, float, str | None], bool] = OrderedDict()

    def settings(self) -> Settings:
        """Return the settings, read again where the file has changed.

        Raises:
            RequestError: 503, the file cannot be read any more: what it forbids now is not known.
        """
        stamp = self._settings_stamp()
        if stamp != self._stamp:
            try:
                settings = self.started.read_settings()
                self._settings, self._secrets, self._problem = settings, settings.secrets(), ""
                log.warning("settings read again: steering is %s", "on" if settings.enabled else "off")
            except (SteerError, OSError) as error:
                self._problem = str(error)
                log.warning("settings cannot be used, so nothing is served: %s", error)
            self._stamp = stamp
        if self._problem:
            raise RequestError(503, "the settings of this server cannot be read", "", "Its log says why")
        return self._settings

    def key(self, authorization: str | None) -> Key | None:
        """Return the key that a request shows; see `asking.who`.

        Raises:
            RequestError: 401, or 503 as `settings`.
        """
        self.settings()
        return who(authorization, self._secrets)

    def admit(self, body: Mapping[str, Any], key: Key | None, prompt: Prompt) -> tuple[Served, dict[str, Any]]:
        """Decide a request, and keep what it is served with in the store.

        Args:
            body: of the request.
            key: who asks.
            prompt: which endpoint it came to.

        Returns:
            What it gets, and the body for vLLM.

        Raises:
            RequestError: as `asking.decide` and `asking.rewritten`; 503, the folder or the store cannot be used.
        """
        ask = said(body)
        try:
            served = decide(ask, self.settings(), key, self.directory)
            steering = None if served.entry is None else served.entry.steering
            with self._lock:
                if steering is not None and self._marked(steering, served) and prompt == "chat":
                    _check_ending(body, served)
                base = "" if steering is None else self.store.put(steering)
        except OSError as error:
            log.warning("the folder of steerings or the store cannot be used: %s", error)
            raise RequestError(503, "the steerings of this server cannot be read", "", "Its log says why") from None
        return served, rewritten(body, served, prompt, base, tuple(self.started.adapters), self.started.name)

    def check_plain(self, body: Mapping[str, Any], path: str) -> None:
        """Refuse a body that asks for steering at an endpoint where nothing is steered.

        Raises:
            RequestError: 400.
        """
        if said(body) != Ask():
            raise RequestError(400, f"{path} is asked to steer", "chat or completions of /v1")
        check_model(body, tuple(self.started.adapters), self.started.name)

    def listing(self, key: Key | None) -> dict[str, Any]:
        """Return what `GET /steerings` says: what is on, what the key may ask for, and what cannot be served.

        Raises:
            RequestError: 503, the settings or the folder cannot be read.
        """
        settings = self.settings()
        rows = []
        for entry in self._entries(settings):
            if key is None or key.may(entry.name):
                rows.append({**entry.describe(), "coefficients": settings.within(entry.name)})
        default = None if settings.default is None else settings.default.model_dump()
        return {"model": self.started.name, "enabled": settings.enabled, "default": default, "steerings": rows}

    def health(self) -> str:
        """Say what steering lacks; empty where nothing. vLLM's own health is asked for apart."""
        try:
            settings = self.settings()
            if settings.enabled and settings.default is not None:
                self.admit({}, None, "raw")
            self.directory.names()
        except RequestError as refusal:
            return str(refusal)
        except OSError:
            return "The folder of steerings cannot be read."
        return "" if self.store.folder.is_dir() else "The store of steerings is gone."

    def _entries(self, settings: Settings) -> tuple[Entry, ...]:
        try:
            return self.directory.entries(settings.file_bytes)
        except OSError:
            raise RequestError(503, "the folder of steerings cannot be read") from None

    def _fits(self, steering: Steering) -> str:
        """Say why the engine cannot run a steering."""
        try:
            self._check_model(steering)
            self.declared.check_places(steering)
            for each in steering.interventions:
                check_phase(each.phase, self.declared.marks)
        except SteerError as error:
            return str(error)
        return ""

    def _marked(self, steering: Steering, served: Served) -> bool:
        """Say whether something acts between marks; refuse what a strength or a phase makes impossible.

        The engine would refuse it too, but in the midst of a stream.

        Raises:
            RequestError: 400.
        """
        tried = (steering.fingerprint, served.coefficient, served.phase)
        if tried not in self._tried:
            try:
                if served.phase is not None:
                    check_phase(served.phase, self.declared.marks)
                acting = effective(steering, served.coefficient, served.phase)
                lowered = None if acting is None else lower(acting, self.declared.experts, self.declared.chosen)
            except SteerError as error:
                raise RequestError(400, error.found, error.expected, error.remedy, served.name) from None
            self._tried[tried] = lowered is not None and lowered.marked
            while len(self._tried) > TRIED:
                self._tried.popitem(last=False)
        return self._tried[tried]

    def _settings_stamp(self) -> tuple[int, ...]:
        if self.started.settings is None:
            return ()
        try:
            state = Path(self.started.settings).stat()
        except FileNotFoundError:
            return (0,)
        return (state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino)


def _check_ending(body: Mapping[str, Any], served: Served) -> None:
    """Refuse a chat that asks for no new turn, where phases between marks would not know from where to count.

    Raises:
        RequestError: 400.
    """
    if body.get("continue_final_message") or body.get("add_generation_prompt") is False:
        raise RequestError(
            400,
            f"{served.name!r} acts between marks, which count from where the reply's turn begins, and the chat begins none",
            "add_generation_prompt as it is, and no continue_final_message",
            "Or use phase all, prompt or generated",
            served.name,
        )


def _model_check(model: str) -> Any:
    """Return a function that refuses steerings made for another model."""
    headers = read_headers(model)
    anatomy = resolve(headers.config, shapes_of(headers.config, headers.shapes))
    folder = Path(model)
    identity = ModelIdentity(
        model, anatomy.family, shape_id(anatomy.numbers()), weights_id(folder, headers.files), tokenizer_id_of(folder)
    )
    return lambda steering: steering.check(anatomy, identity)
