"""What each family calls its parts, as data; resolved from headers or a loaded model, and proven by a self-check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from steer.anatomy.headers import Headers as Headers
    from steer.anatomy.headers import read_headers as read_headers
    from steer.anatomy.modules import Places as Places
    from steer.anatomy.modules import places as places
    from steer.anatomy.record import Record as Record
    from steer.anatomy.record import read_record as read_record
    from steer.anatomy.resolve import Anatomy as Anatomy
    from steer.anatomy.resolve import resolve as resolve
    from steer.anatomy.selfcheck import SelfCheck as SelfCheck
    from steer.anatomy.selfcheck import self_check as self_check

export(
    __name__,
    {
        "Anatomy": "steer.anatomy.resolve",
        "Headers": "steer.anatomy.headers",
        "Places": "steer.anatomy.modules",
        "Record": "steer.anatomy.record",
        "SelfCheck": "steer.anatomy.selfcheck",
        "places": "steer.anatomy.modules",
        "read_headers": "steer.anatomy.headers",
        "read_record": "steer.anatomy.record",
        "resolve": "steer.anatomy.resolve",
        "self_check": "steer.anatomy.selfcheck",
    },
)
