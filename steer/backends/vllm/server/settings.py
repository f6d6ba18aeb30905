"""What an operator decides about a server, as a YAML file that is read again when it changes.

    enabled: true                      # false: no request is steered, and every reply says so
    default:                           # for requests that name no steering; left out: they are not steered
      steering: shorter
      coefficient: 1.0                 # 1 if left out
      phase: thinking                  # left out: the phases that the file says
    coefficients: [-2.0, 2.0]          # least and most that a request may ask for; left out: any number
    limits: {shorter: [0.0, 1.0]}      # the same for some steerings, in place of `coefficients`
    keys:                              # left out: no key is asked for, unless VLLM_API_KEY is set
      - env: TEAM_A_KEY                # the variable of the environment that holds the key, never the key itself
        allow: [shorter, none]         # names that may be asked for; left out: all
    endpoints: [/v1/embeddings]        # further endpoints that are handed to vLLM as they are, never steered
    body_bytes: 1048576                # largest body of a request
    file_bytes: 268435456              # largest steering, its vectors included

Every key may be left out. `none` is no steering: a request asks for it to be free of the default.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, ValidationError

from steer import yaml_text
from steer.errors import SteerError
from steer.phases import check_phase

NONE = "none"
VLLM_KEY = "VLLM_API_KEY"


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("a finite number is needed")
    return number


def _known_phase(phase: str) -> str:
    try:
        check_phase(phase, None)
    except SteerError as error:
        raise ValueError(str(error)) from None
    return phase


def _ordered(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("the least comes first")
    return limits


Number = Annotated[float, Field(strict=True), AfterValidator(_finite)]
Limits = Annotated[tuple[Number, Number], AfterValidator(_ordered)]
Phase = Annotated[str, AfterValidator(_known_phase)]
Bytes = Annotated[int, Field(strict=True, gt=0)]
Text = Annotated[str, Field(strict=True, min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Default(_Strict):
    """What a request gets that names no steering.

    Attributes:
        steering: its name.
        coefficient: c; no limit applies to it.
        phase: in place of the interventions' own; None: their own.
    """

    steering: Text
    coefficient: Number = 1.0
    phase: Phase | None = None


class Key(_Strict):
    """Who may ask.

    Attributes:
        env: the variable of the environment that holds the key.
        allow: names that may be asked for, `none` among them; None: all.
    """

    env: Annotated[str, Field(strict=True, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    allow: tuple[Text, ...] | None = None

    def may(self, name: str) -> bool:
        """Whether the key may ask for a steering."""
        return self.allow is None or name in self.allow


class Settings(_Strict):
    """What an operator decides; see the module."""

    enabled: StrictBool = True
    default: Default | None = None
    coefficients: Limits | None = None
    limits: Mapping[Text, Limits] = Field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    endpoints: tuple[Annotated[str, Field(strict=True, pattern=r"^/")], ...] = ()
    body_bytes: Bytes = 1 << 20
    file_bytes: Bytes = 256 << 20

    def within(self, name: str) -> tuple[float, float] | None:
        """Return the least and the most coefficient that a request may ask for, or None for any."""
        return self.limits.get(name, self.coefficients)

    def secrets(self, environment: Mapping[str, str] | None = None) -> tuple[tuple[str, Key], ...]:
        """Return the keys themselves with what each may do; empty where none is needed.

        Without `keys`, vLLM's own VLLM_API_KEY is asked for where it is set, and may do everything.

        Raises:
            SteerError: a variable is not set or empty, two hold the same key, or VLLM_API_KEY is set beside `keys`,
                where vLLM would refuse every other key.
        """
        environment = os.environ if environment is None else environment
        keys = self.keys or ((Key(env=VLLM_KEY),) if environment.get(VLLM_KEY) else ())
        if self.keys and environment.get(VLLM_KEY):
            raise SteerError(
                f"{VLLM_KEY} is set beside the keys of the settings, so vLLM itself would refuse them",
                "one place where keys are checked",
                f"Give that key in a variable of another name, list the variable under keys, and unset {VLLM_KEY}",
            )
        missing = [key.env for key in keys if not environment.get(key.env)]
        if missing:
            raise SteerError(
                f"the settings ask for the key in {missing[0]}, and that variable is not set",
                "a variable of the environment that holds the key",
                f"Set {missing[0]} before the server is started",
            )
        if len({environment[key.env] for key in keys}) < len(keys):
            raise SteerError("two variables under keys hold the same key", "a key of its own for each")
        return tuple((environment[key.env], key) for key in keys)


def read(path: Path) -> Settings:
    """Read a settings file.

    Raises:
        SteerError: no such file, no YAML, an unknown key, or a value of the wrong kind.
    """
    return parse(yaml_text.load(path), f"the settings {path}")


def parse(document: Mapping[Any, Any], where: str) -> Settings:
    """Check settings.

    Raises:
        SteerError: an unknown key, or a value of the wrong kind.
    """
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        raise SteerError(
            f"{where}: {key} {'is no setting' if unknown else 'is ' + yaml_text.short(first['input'])}",
            f"one of {', '.join(Settings.model_fields)}" if unknown else first["msg"],
            "Correct it; docs/serving.md explains every key",
        ) from None
