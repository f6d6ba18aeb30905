"""Tables on the device: what every slot holds at every declared place, and which slot and state every token has.

All of it is allocated once, before anything is compiled or captured, and only ever written in place. Slot 0 is zero for
ever, its experts' factors one: a token without steering gets `+ 0` and `x 1`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer.backends.vllm.config import Declared
from steer.backends.vllm.lowering import STATES, Lowered, Place
from steer.errors import SteerError
from steer.expert_interventions import LARGEST

WIDTH = len(STATES)
Table = dict[str, Tensor]


class Tables:
    """The rows of all slots.

    Args:
        declared: places and slots.
        places: those of them whose layers this process has.
        tokens: rows of the largest step, padding included.
        device: of the model.

    Attributes:
        code: (tokens,), slot x 4 + state of every token of the step.
        slot: (tokens,), the slot alone.
        at: place -> its tensors: `gate` (slots x 4,), `vector` (slots, hidden) or what `steer.backends.vllm.routers` asks for.
    """

    def __init__(self, declared: Declared, places: Iterable[Place], tokens: int, device: torch.device) -> None:
        self.declared, self.device, self.tokens = declared, device, tokens
        rows = declared.slots + 1
        self.code: Int[Tensor, " token"] = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.slot: Int[Tensor, " token"] = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.at: dict[Place, Table] = {place: self._table(place[1], rows) for place in sorted(places)}
        self._held: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(declared.slots, 0, -1))

    def _table(self, kind: str, rows: int) -> Table:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        gate = {"gate": zeros(rows * WIDTH)}
        if kind in ("add", "project"):
            return gate | {"vector": zeros(rows, self.declared.hidden)}
        if kind == "scale":
            factors = zeros(rows, self.declared.experts).fill_(1.0)
            return gate | {"factors": factors, "renormalise": zeros(rows, dtype=torch.bool)}
        named = {name: zeros(rows, self.declared.experts, dtype=torch.bool) for name in ("inward", "outward")}
        return gate | {"added": zeros(rows, self.declared.experts)} | named

    @property
    def bytes(self) -> int:
        """Memory of all tables."""
        tensors = [self.code, self.slot, *(tensor for table in self.at.values() for tensor in table.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def slots_of(self, wanted: dict[str, Lowered]) -> dict[str, int]:
        """Return a slot for everything that a step needs, filling those that are new.

        What the step does not need may be pushed out, least lately used first; a later step fills it again.

        Raises:
            SteerError: more are wanted than there are slots.
        """
        if len(wanted) > self.declared.slots:
            raise SteerError(
                f"a step needs {len(wanted)} different steerings", f"at most the {self.declared.slots} slots declared"
            )
        for fingerprint in wanted:
            if fingerprint in self._held:
                self._held.move_to_end(fingerprint)
        for fingerprint, lowered in wanted.items():
            if fingerprint in self._held:
                continue
            if not self._free:
                oldest = next(held for held in self._held if held not in wanted)
                self._free.append(self._held.pop(oldest))
            slot = self._held[fingerprint] = self._free.pop()
            self._fill(slot, lowered)
        return {fingerprint: self._held[fingerprint] for fingerprint in wanted}

    def _fill(self, slot: int, lowered: Lowered) -> None:
        for place, table in self.at.items():
            row = lowered.rows.get(place)
            gates = table["gate"][slot * WIDTH : (slot + 1) * WIDTH]
            if row is None:
                gates.zero_()
                continue
            gates.copy_(moved(torch.tensor(row.gate, dtype=torch.float32), self.device))
            for name in table.keys() - {"gate", "renormalise"}:
                table[name][slot].copy_(moved(getattr(row, name), self.device))
            if "renormalise" in table:
                table["renormalise"][slot].fill_(row.renormalise)

    def tell(self, code: Int[Tensor, " token"]) -> None:
        """Say slot and state of the step's first tokens; the rest becomes unsteered."""
        length = code.shape[0]
        self.code[:length].copy_(code)
        self.code[length:].zero_()
        torch.div(self.code, WIDTH, rounding_mode="floor", out=self.slot)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it, on the current stream: the step before may still read the old rows.

    The pinned memory is new each time; PyTorch gives it to nobody else before the copy is done.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def looked_up(table: Table, code: Int[Tensor, " token"], slot: Int[Tensor, " token"]) -> tuple[Tensor, Tensor]:
    """Return each token's vector (token, hidden) and gate (token, 1)."""
    return table["vector"].index_select(0, slot), table["gate"].index_select(0, code).unsqueeze(-1)


def change(
    value: Float[Tensor, "*batch token hidden"],
    project: Table | None,
    add: Table | None,
    code: Int[Tensor, " token"],
    slot: Int[Tensor, " token"],
) -> Float[Tensor, "... hidden"]:
    """Return what the places of one site add to a value, in float32: −g v̂ v̂ᵀh, then g v."""
    total: Tensor | None = None
    if project is not None:
        unit, weight = looked_up(project, code, slot)
        size = weight * (value.float() * unit).sum(-1, keepdim=True)
        total = -size.clamp(-LARGEST, LARGEST) * unit  # As `lowering` bounds what is added: no stream becomes infinite.
    if add is not None:
        vector, weight = looked_up(add, code, slot)
        added = weight * vector
        total = added if total is None else total + added
    assert total is not None, "a site without places has no change"
    return total
