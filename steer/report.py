"""What a steering touched: positions per layer, site and phase, counted on the device and read once, at the end.

Every forward pass of the backbone is one `Tick`. A tick knows the running total of positions of each phase before and
after itself; a place that wrote in ticks 3 to 90 has touched `after[90] - before[3]` positions. So a decoding step
costs one small sum per phase, however many layers are steered, and nothing waits for the device.
"""

from __future__ import annotations

import html
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.errors import SteerError
from steer.phases import State, phase_mask

if TYPE_CHECKING:
    import pandas

Count = Tensor | int
Place = tuple[int, str]


class Tick:
    """One forward pass of the backbone: who is where, and how many positions every phase has.

    Args:
        number: counts forward passes.
        states: `State` per (row, token) of this pass, or None where nobody follows the positions.
        real: how many real tokens the pass has, for use where `states` is None.
        totals: positions of each phase so far; updated in place.
        shape: (batch, token) of this pass.
        kept: (batch, token), not 0 at real tokens, for use where `states` is None; None: there is no padding.
    """

    __slots__ = ("_masks", "after", "before", "kept", "number", "shape", "states")

    def __init__(
        self,
        number: int,
        states: Tensor | None,
        real: Count,
        totals: dict[str, Count],
        shape: tuple[int, int] = (0, 0),
        kept: Tensor | None = None,
    ) -> None:
        self.number = number
        self.states = states
        self.shape = shape
        self.kept = kept
        self._masks: dict[tuple[str, torch.device | None, torch.dtype, int], Tensor] = {}
        self.before = dict(totals)
        for phase, total in totals.items():
            totals[phase] = total + self._count(phase, real)
        self.after = dict(totals)

    def _count(self, phase: str, real: Count) -> Count:
        if self.states is None:
            return real if phase == "all" else 0
        if phase == "all":
            return (self.states != State.PADDING).sum()
        return phase_mask(self.states, phase).sum()

    def counted(self, phase: str, device: torch.device) -> Tensor | None:
        """(batch, token): real tokens of the phase; None: all of them."""
        if self.states is None:
            return None if self.kept is None else self.kept.to(device) != 0
        found = self.states != State.PADDING if phase == "all" else phase_mask(self.states, phase)
        return found.to(device)

    def mask(self, phase: str, like: Tensor) -> Tensor:
        """Where the phase holds, on the device of `like` and in as many dimensions; made once per pass."""
        key = (phase, like.device, torch.bool, like.dim())
        if key not in self._masks:
            assert self.states is not None, "Taps refuses phases before any layer runs"
            mask = phase_mask(self.states, phase).to(like.device)
            self._masks[key] = mask.reshape(*mask.shape, *(1,) * (like.dim() - mask.dim()))
        return self._masks[key]

    def weights(self, phase: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """`mask` as numbers 0 and 1."""
        key = (phase, like.device, dtype, like.dim())
        if key not in self._masks:
            self._masks[key] = self.mask(phase, like).to(dtype)
        return self._masks[key]


class Counter:
    """Positions of one phase that were written at one place."""

    __slots__ = ("last", "phase", "runs")

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.last: Tick | None = None
        self.runs: list[list[Tick]] = []

    def touch(self, tick: Tick) -> None:
        """Note that the place wrote in this pass."""
        last = self.last
        if tick is last:
            return
        if last is not None and tick.number == last.number + 1:
            self.runs[-1][1] = tick
        else:
            self.runs.append([tick, tick])
        self.last = tick

    def total(self) -> int:
        """The positions; waits for the device."""
        return sum(int(end.after.get(self.phase, 0)) - int(start.before.get(self.phase, 0)) for start, end in self.runs)


class Unmet:
    """Tokens for which what was forced into or out of their choice of experts did not hold.

    Args:
        layer: counts from 0.
        forced: expert -> whether it was forced in.
    """

    __slots__ = ("forced", "layer", "missed")

    def __init__(self, layer: int, forced: dict[int, bool]) -> None:
        self.layer, self.forced = layer, forced
        self.missed: Tensor | int = 0

    def add(self, missed: Tensor) -> None:
        """Add the tokens of one pass, (experts,); nothing waits for the device."""
        self.missed = self.missed + missed.to(self.missed.device) if isinstance(self.missed, Tensor) else missed

    def refuse(self) -> None:
        """Wait for the device, and say so where something did not hold.

        Raises:
            SteerError: for some token it did not.
        """
        if not isinstance(self.missed, Tensor):
            return
        missed = self.missed.tolist()
        for expert, inward in self.forced.items():
            if missed[expert]:
                raise SteerError(
                    f"expert {expert} of layer {self.layer} was forced {'in' if inward else 'out'}, and {missed[expert]} tokens {'did not choose' if inward else 'chose'} it",
                    "what is forced to hold for every token of the phase",
                    "Force less: a token chooses few experts, from few groups of neighbours where the family has groups, and a later BiasRouter may undo an earlier one",
                )


@dataclass(eq=False)
class Report:
    """What happened inside one `with model.steered(...)`.

    Attributes:
        name: the steering's name.
        coefficient: of the request.
        idle: why nothing was going to be written; empty in the ordinary case.
    """

    name: str
    coefficient: float
    idle: str = ""
    _counters: dict[Place, dict[str, Counter]] = field(default_factory=dict, repr=False)
    _unmet: list[Unmet] = field(default_factory=list, repr=False)

    def counter(self, layer: int, site: str, phase: str) -> Counter:
        """The counter of one place and phase."""
        return self._counters.setdefault((layer, site), {}).setdefault(phase, Counter(phase))

    def unmet(self, layer: int, forced: dict[int, bool]) -> Unmet:
        """Where it is noted that forced choices of one layer did not hold."""
        self._unmet.append(Unmet(layer, forced))
        return self._unmet[-1]

    @property
    def touched(self) -> dict[Place, dict[str, int]]:
        """{(layer, site): {phase: positions}}, padding left out; with several rows, the sum over them."""
        return {
            place: {phase: counter.total() for phase, counter in found.items()}
            for place, found in sorted(self._counters.items())
        }

    @property
    def positions(self) -> int:
        """All positions together."""
        return sum(count for found in self.touched.values() for count in found.values())

    @property
    def untouched(self) -> list[tuple[int, str, str]]:
        """(layer, site, phase) that were to be written and never were."""
        return [(*place, phase) for place, found in self.touched.items() for phase, count in found.items() if not count]

    def rows(self) -> list[dict[str, Any]]:
        """One plain row per layer, site and phase."""
        return [
            {"layer": layer, "site": site, "phase": phase, "positions": count}
            for (layer, site), found in self.touched.items()
            for phase, count in found.items()
        ]

    def frame(self) -> pandas.DataFrame:
        """The rows as a table; needs pandas."""
        import pandas

        return pandas.DataFrame(self.rows(), columns=["layer", "site", "phase", "positions"])

    def refuse_unmet(self) -> None:
        """Refuse what was forced and did not hold.

        Raises:
            SteerError: as `Unmet.refuse`.
        """
        for unmet in self._unmet:
            unmet.refuse()

    def warn_if_idle(self) -> None:
        """Say so where a steering that should have written something wrote nothing."""
        if not self.idle and not self.positions:
            phases = sorted({phase for found in self._counters.values() for phase in found})
            warnings.warn(
                f"The steering{f' {self.name!r}' if self.name else ''} touched 0 positions: no forward pass ran inside `with model.steered(...)`, "
                f"or none of its positions was in phase {', '.join(phases)}.",
                stacklevel=6,
            )

    def __str__(self) -> str:
        if self.idle:
            return f"steered 0 positions: {self.idle}"
        lines = [f"  layer {row['layer']} {row['site']} {row['phase']}: {row['positions']}" for row in self.rows()]
        return f"steered {self.positions} positions at {len(lines)} places\n" + "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{row['layer']}<td>{row['site']}<td>{row['phase']}<td>{row['positions']}" for row in self.rows()
        )
        head = html.escape(str(self).splitlines()[0])
        return f"<table><caption>{head}</caption><tr><th>layer<th>site<th>phase<th>positions{cells}</table>"
