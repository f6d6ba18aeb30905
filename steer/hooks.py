"""Taps: one dispatcher per model that owns every torch hook, so that order never depends on who came first.

Within a forward pass things happen in the order of the sites (`steer.sites`). At one place all writes run first, in
the order in which their contexts were entered and, within one steering, in the order of its tuple; then all readers see
the result. Torch hooks exist only while a context is open, one per place that is used.

Where the hooks sit, with m the multiplier of a `scale` family (1 elsewhere):

| site | read | written |
|---|---|---|
| `resid_pre` | first input of the layer | there |
| `z` | input of the attention output projection, split into heads | there |
| `head_out` | – | added to the projection's output |
| `attn_raw`, `mlp_raw` | output of the projection | there |
| `attn_out`, `mlp_out` | m x output of the block, or output of the norm behind it | there, divided by m |
| `resid_mid` | input of what comes before the MLP | what f adds to resid_pre + attn_out is added to `attn_out` |
| `router_logits` | what the choice was made from | the family's choice is made again, see `steer.router_writes` |
| `router` | ids and weights that the router returns | its weights |
| `resid_post` | output of the layer | there |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.anatomy.modules import LayerPlaces, Places
from steer.anatomy.resolve import Anatomy
from steer.compiled import compiled, refuse_compiled
from steer.errors import SteerError
from steer.interventions import BiasRouter
from steer.programs import HeadProgram, Program, Write
from steer.report import Count, Report, Tick
from steer.router_tap import Routers, RouterTap
from steer.routes import Routes
from steer.routing import Listener
from steer.sites import SITES
from steer.sites import site as site_named

if TYPE_CHECKING:
    from steer.patches import Patch
    from steer.positions import Positions
    from steer.steering import Steering

Value = Callable[[Tensor], Tensor]
ROUTING = tuple(name for name, place in SITES.items() if place.routing)


@runtime_checkable
class Reader(Protocol):
    """What is called with every value that is read, in the pass, on the device.

    `value` has shape (batch, token, hidden), at `z` (batch, token, heads, head width); `states` (batch, token) holds
    `steer.phases.State` per position, or is None where nobody follows the positions.
    """

    def __call__(self, site: str, layer: int, value: Tensor, states: Tensor | None) -> None: ...


Wanted = Mapping[str, Sequence[int] | None]


@dataclass(eq=False)
class _Context:
    """One open context: its writes per place, or a reader with its places, or a listener with its layers."""

    writes: dict[tuple[int, str], list[Write]] = field(default_factory=dict)
    reader: Reader | None = None
    reads: frozenset[tuple[int, str]] = frozenset()
    listener: Listener | None = None
    heard: frozenset[int] = frozenset()


@dataclass
class _Point:
    """All that happens at one site of one layer."""

    program: Program | None
    heads: HeadProgram | None
    readers: tuple[Reader, ...]

    def __bool__(self) -> bool:
        return self.program is not None or self.heads is not None or bool(self.readers)


@contextmanager
def listed(entries: list[tuple[Any, float]], entry: tuple[Any, float]) -> Iterator[None]:
    """Keep `entry` in `entries` while the context is open, told apart by identity."""
    entries.append(entry)
    try:
        yield
    finally:
        del entries[next(index for index, each in enumerate(entries) if each is entry)]


class Taps:
    """Writes and reads of one model.

    Args:
        model: the causal language model; only asked whether it is compiled.
        anatomy: of the model.
        places: its modules.

    Attributes:
        entered: (change, coefficient) of every steering and patch in force, in order of entry.
        viewed: those entries of views that are in force; entered again, they do nothing more.
        routes: what keeps the routed experts of the replies that are being written.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, places: Places) -> None:
        self.model, self.anatomy, self.places = model, anatomy, places
        self.entered: list[tuple[Any, float]] = []
        self.viewed: list[tuple[Any, float]] = []
        self.routes: list[Routes] = []
        self._contexts: list[_Context] = []
        self._positions: list[Positions] = []
        self._handles: list[RemovableHandle] = []
        self._routers = Routers(anatomy, places)
        self._totals: dict[str, Count] = {}
        self._tick = Tick(0, None, 0, {})
        self._residual: dict[int, Tensor] = {}

    # Contexts.

    @contextmanager
    def entering(self, change: Steering | Patch, coefficient: float) -> Iterator[None]:
        """Note that a change is in force while the context is open, so that results can say under what they came about."""
        with listed(self.entered, (change, coefficient)):
            yield

    @contextmanager
    def write(self, steering: Steering, coefficient: float = 1.0) -> Iterator[Report]:
        """Steer while the context is open; the caller has checked that the steering fits the model."""
        report = Report(steering.name, coefficient)
        context = _Context()
        for intervention in steering.interventions:
            if intervention.is_zero(coefficient):
                continue
            for layer in intervention.active_layers:
                self.check_place(intervention.site, layer)
                counter, unmet = report.counter(layer, intervention.site, intervention.phase), None
                if isinstance(intervention, BiasRouter):
                    unmet = report.unmet(layer, intervention.forced(layer))
                context.writes.setdefault((layer, intervention.site), []).append(
                    Write(intervention, coefficient, counter, unmet)
                )
        if not context.writes:
            report.idle = f"every intervention is zero at coefficient {coefficient:g}"
        with self._open(context):
            yield report
        report.refuse_unmet()
        report.warn_if_idle()

    @contextmanager
    def read(self, reader: Reader, wanted: Wanted) -> Iterator[None]:
        """Call `reader` with every value of the wanted sites and layers while the context is open; None: all layers."""
        places = frozenset((layer, site) for site, layers in wanted.items() for layer in self.layers_of(site, layers))
        with self._open(_Context(reader=reader, reads=places)):
            yield

    @contextmanager
    def hear(self, listener: Listener, layers: Sequence[int] | None = None) -> Iterator[None]:
        """Call `listener` with every choice of experts in the layers while the context is open; None: all that have some."""
        having = self.anatomy.expert_layers
        wanted = having if layers is None else layers
        for layer in wanted or (() if having else (0,)):  # A model without any is refused by its first layer.
            self.check_place("router", layer)
        with self._open(_Context(listener=listener, heard=frozenset(wanted))):
            yield

    @contextmanager
    def at(self, positions: Positions) -> Iterator[None]:
        """Follow `positions` in the forward passes inside; where such contexts are nested the innermost counts."""
        self._positions.append(positions)
        try:
            if not self._handles:
                self._listen()
            yield
        finally:
            self._positions.pop()
            if not self._positions and not self._contexts:
                self._reinstall()

    @contextmanager
    def _open(self, context: _Context) -> Iterator[None]:
        self._contexts.append(context)
        try:
            self._reinstall()
            yield
        finally:
            self._contexts = [each for each in self._contexts if each is not context]
            self._reinstall()

    def check_place(self, site: str, layer: int) -> None:
        """Refuse a place that the model does not have.

        Raises:
            SteerError: an unknown site, a layer out of range, `mlp_raw` in a layer with experts, `z` in one without heads,
                or a router in one without experts.
        """
        place = site_named(site)
        self.anatomy.check_layers([layer], site)
        having = self.anatomy.site_layers(site)
        if layer not in having:
            other = "mlp_out" if site == "mlp_raw" else "attn_raw"
            remedy = f"Use {other}, which every layer has"
            if place.routing:
                remedy = "Name a layer that has experts" if having else "Take a mixture of experts"
            raise SteerError(
                f"layer {layer} of this {self.anatomy.family} model {self.anatomy.lacks(site, layer)}, so it has no {site}",
                f"one of the layers {list(having)}" if having else f"a model with {site}",
                remedy,
            )

    def layers_of(self, site: str, layers: Sequence[int] | None) -> tuple[int, ...]:
        """The layers meant at a site that is to be read; None means every layer that has it.

        Raises:
            SteerError: an unknown site or layer, or a site that cannot be read.
        """
        if not site_named(site).readable:
            raise SteerError(
                f"{site} is never a tensor of its own, so it cannot be read",
                "",
                "Use m.hear(listener) or m.capture"
                if site == "router"
                else "Read z, or use head scores for what each head writes",
            )
        if layers is None:
            return self.anatomy.site_layers(site)
        for layer in layers:
            self.check_place(site, layer)
        return tuple(layers)

    # Torch hooks.

    def _reinstall(self) -> None:
        """Bring the torch hooks in line with the open contexts."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._residual.clear()
        if not self._contexts and not self._positions:
            self._totals.clear()
            return
        self._listen()
        phases = {write.phase for context in self._contexts for writes in context.writes.values() for write in writes}
        self._totals = {phase: self._totals.get(phase, 0) for phase in phases}
        used = {place for context in self._contexts for place in (*context.writes, *context.reads)}
        heard = {layer for context in self._contexts for layer in context.heard}
        taps = {
            layer: self._router_tap(layer) for layer in sorted({*heard, *(at for at, site in used if site in ROUTING)})
        }
        for layer, tap in taps.items():  # After all routers are proven, which runs their blocks.
            self._install_router(layer, tap)
        for layer in sorted({layer for layer, _ in used}):
            self._install(layer, {site: self._point(layer, site) for site in SITES if site not in ROUTING})

    def _listen(self) -> None:
        refuse_compiled(self.model)
        self._handles.append(self.places.backbone.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _writes(self, layer: int, site: str) -> list[Write]:
        return [write for context in self._contexts for write in context.writes.get((layer, site), ())]

    def _readers(self, layer: int, site: str) -> tuple[Reader, ...]:
        return tuple(
            context.reader
            for context in self._contexts
            if context.reader is not None and (layer, site) in context.reads
        )

    def _router_tap(self, layer: int) -> RouterTap:
        return self._routers.tap(
            layer,
            self._writes(layer, "router_logits"),
            self._writes(layer, "router"),
            self._readers(layer, "router_logits"),
            [each.listener for each in self._contexts if each.listener is not None and layer in each.heard],
        )

    def _install_router(self, layer: int, tap: RouterTap) -> None:
        router = self.places.layers[layer].router
        assert router is not None, "check_place refuses layers without experts"

        def routed(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return tap(output, self._tick)

        self._handles.append(router.register_forward_hook(routed))

    def _point(self, layer: int, site: str) -> _Point:
        writes, readers = self._writes(layer, site), self._readers(layer, site)
        if site == "head_out":
            projection = self.places.layers[layer].attention_output
            heads = HeadProgram(layer, writes, projection, self.anatomy.head_width_of(layer)) if writes else None
            return _Point(None, heads, readers)
        return _Point(Program(layer, writes) if writes else None, None, readers)

    def _install(self, layer: int, points: dict[str, _Point]) -> None:
        place: LayerPlaces = self.places.layers[layer]
        mid = points["resid_mid"].program
        keeps = mid is not None and not mid.is_constant
        add = self._handles.append

        def through(site: str) -> Value:
            return self._through(layer, site, points[site])

        if points["resid_pre"] or keeps:
            add(
                place.layer.register_forward_pre_hook(
                    on_input(self._layer_input(layer, through("resid_pre"), keeps)), with_kwargs=True
                )
            )
        if points["z"]:
            add(
                place.attention_output.register_forward_pre_hook(
                    on_input(self._per_head(through("z"))), with_kwargs=True
                )
            )
        if points["head_out"] or points["attn_raw"]:
            add(
                place.attention_output.register_forward_hook(
                    self._raw_output(points["head_out"].heads, through("attn_raw"))
                )
            )
        if points["attn_out"] or mid is not None:
            multiplier = self.anatomy.attention_contribution.multiplier
            out = self._contribution(layer, "attn_out", points["attn_out"], multiplier, (layer, mid) if mid else None)
            add(place.attention_added.register_forward_hook(on_output(out)))
        if points["resid_mid"].readers:
            only_readers = _Point(None, None, points["resid_mid"].readers)
            add(
                place.before_mlp.register_forward_pre_hook(
                    on_input(self._through(layer, "resid_mid", only_readers)), with_kwargs=True
                )
            )
        if points["mlp_raw"]:
            assert place.mlp_output is not None, "check_place refuses mlp_raw in a layer with experts"
            add(place.mlp_output.register_forward_hook(on_output(through("mlp_raw"))))
        if points["mlp_out"]:
            out = self._contribution(
                layer, "mlp_out", points["mlp_out"], self.anatomy.mlp_contribution.multiplier, None
            )
            add(place.mlp_added.register_forward_hook(on_output(out)))
        if points["resid_post"]:
            add(place.layer.register_forward_hook(on_output(through("resid_post"))))

    # What the hooks do with a value.

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every forward pass of the backbone: find out who is where."""
        if compiled(self.model):
            refuse_compiled(self.model)
        ids = args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        states: Tensor | None = None
        if self._positions:
            if ids is None:
                raise SteerError(
                    "the model was given embeddings instead of token ids",
                    "token ids, from which phases are told",
                    "Pass input_ids",
                )
            self._positions[-1].observe(ids, mask)
            states = self._positions[-1].states
        elif any(phase != "all" for phase in self._totals):
            raise SteerError(
                f"the steering acts in phase {', '.join(sorted(set(self._totals) - {'all'}))}, and nobody follows the positions of this forward pass",
                "phase 'all' under a foreign forward or generate",
                "Use `m.generate(...)` or `m.run(..., prompt_lengths=...)`, which know where the prompt ends",
            )
        tokens = ids if ids is not None else kwargs["inputs_embeds"][..., 0]
        kept = None if mask is None else mask[:, -tokens.shape[1] :]
        real: Count = tokens.numel() if kept is None else kept.sum()
        self._tick = Tick(self._tick.number + 1, states, real, self._totals, tuple(tokens.shape[:2]), kept)

    def _through(self, layer: int, site: str, point: _Point) -> Value:
        program, readers = point.program, point.readers

        def through(value: Tensor) -> Tensor:
            if program is not None:
                value = program.write(value, self._tick)
            for reader in readers:
                reader(site, layer, value, self._tick.states)
            return value

        return through

    def _per_head(self, through: Value) -> Value:
        split = (self.anatomy.heads, self.anatomy.head_width)

        def per_head(value: Tensor) -> Tensor:
            if value.shape[-1] != split[0] * split[1]:
                raise SteerError(
                    f"the attention output projection takes {value.shape[-1]} numbers a token",
                    f"{split[0]} heads x {split[1]} by the anatomy record {self.anatomy.family!r}",
                    "Correct `attention_output` in a copy of the record and give it with anatomy=FILE",
                )
            return through(value.reshape(*value.shape[:-1], *split)).flatten(-2)

        return per_head

    def _layer_input(self, layer: int, through: Value, keeps: bool) -> Value:
        def layer_input(value: Tensor) -> Tensor:
            value = through(value)
            if keeps:
                self._residual[layer] = value
            return value

        return layer_input

    def _raw_output(
        self, heads: HeadProgram | None, through: Value
    ) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def raw_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if heads is not None:
                output = (output + heads.added(args[0], self._tick).to(output.device)).to(output.dtype)
            return through(output)

        return raw_output

    def _contribution(
        self, layer: int, site: str, point: _Point, multiplier: float, mid: tuple[int, Program] | None
    ) -> Value:
        program, readers = point.program, point.readers

        def contribution(value: Tensor) -> Tensor:
            tick = self._tick
            if program is not None:
                added = program.added(value if multiplier == 1 else value * multiplier, tick)
                value = (value + _divided(added, multiplier)).to(value.dtype)
            if mid is not None:
                value = (value + _divided(self._mid_added(value, multiplier, *mid), multiplier)).to(value.dtype)
            for reader in readers:
                reader(site, layer, value if multiplier == 1 else value * multiplier, tick.states)
            return value

        return contribution

    def _mid_added(self, out: Tensor, multiplier: float, layer: int, program: Program) -> Tensor:
        """What the writes at `resid_mid` add to resid_pre + attn_out."""
        if program.is_constant:
            return program.added(out, self._tick)
        precise = torch.promote_types(out.dtype, torch.float32)
        stream = self._residual.pop(layer).to(out.device, precise) + out.to(precise) * multiplier
        return program.added(stream, self._tick)


def _divided(added: Tensor, multiplier: float) -> Tensor:
    return added if multiplier == 1 else added / multiplier


def on_input(
    value: Value,
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """A pre-hook that puts a module's first input, positional or `hidden_states`, through `value`."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (value(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": value(kwargs["hidden_states"])}

    return hook


def on_output(value: Value) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """A hook that puts a module's output, or the first of a tuple of outputs, through `value`."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (value(output[0]), *output[1:])
        return value(output)

    return hook
