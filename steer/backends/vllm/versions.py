"""Which vLLM this plugin knows, and how a user says that another will do."""

from __future__ import annotations

import os
import re

from steer.errors import SteerError

OLDEST, BEYOND = (0, 30), (0, 34)
OVERRIDE = "STEER_VLLM_ANY_VERSION"


def check_version(found: str) -> None:
    """Refuse a vLLM whose insides nobody has looked at.

    Raises:
        SteerError: another version, and the environment variable STEER_VLLM_ANY_VERSION is not 1.
    """
    numbers = re.match(r"(\d+)\.(\d+)", found)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if not OLDEST <= version < BEYOND and os.environ.get(OVERRIDE) != "1":
        raise SteerError(
            f"this is vLLM {found}",
            f"at least {OLDEST[0]}.{OLDEST[1]} and below {BEYOND[0]}.{BEYOND[1]}, where steering is known to act",
            f"Install one of these; {OVERRIDE}=1 tries this one, and the self-check at start still has to pass",
        )
