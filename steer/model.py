"""`load` and `wrap`: a Hugging Face causal language model with places, phases and changes (DESIGN §2, §6).

A `SteerableModel` leaves the Hugging Face model as it is: everything that reads or writes an activation is a context,
and when it closes no hook, attribute or buffer is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steer import prompts
from steer.anatomy.modules import Places, places, shapes_of
from steer.anatomy.record import Record, read_record
from steer.anatomy.resolve import Anatomy, resolve
from steer.anatomy.selfcheck import self_check as check_model
from steer.capture import Capture
from steer.compiled import refuse_compiled
from steer.errors import SteerError
from steer.hooks import Reader, Taps, Wanted, listed
from steer.identity import UNKNOWN, ModelIdentity, canonical, digest, shape_id, tokenizer_id
from steer.interventions import check_coefficient
from steer.patches import Patch
from steer.phases import Marks, check_phase
from steer.positions import Positions
from steer.report import Report
from steer.routes import Routes
from steer.routing import Listener
from steer.steering import Steering

if TYPE_CHECKING:
    from steer.trace import Trace
    from steer.traces import Traces

Change = Steering | Patch


class SteerableModel:
    """A causal language model that can be read, steered and patched; made by `load`, `wrap` or `with_`.

    Attributes:
        hf: the Hugging Face model.
        tokenizer: its tokenizer, or None.
        anatomy: where its parts are.
        places: its parts, as modules.
        identity: what values made from it are stamped with.
        marks: what opens and closes its thinking.
        path: the folder it was loaded from, or None.
        name: for the reader.
        card: the organism's card, or None.
        changes: (change, coefficient) of this view, in order; empty for a model without `with_`.
    """

    def __init__(
        self,
        hf: Any,
        tokenizer: Any,
        taps: Taps,
        identity: ModelIdentity,
        marks: Marks,
        path: Path | None = None,
        card: dict[str, Any] | None = None,
    ) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.taps = taps
        self.identity = identity
        self.marks = marks
        self.path = path
        self.card = card
        self.changes: tuple[tuple[Change, float], ...] = ()

    def __repr__(self) -> str:
        numbers = self.anatomy
        change = f", {len(self.changes)} changes" if self.changes else ""
        return f"SteerableModel({self.name}: {numbers.family}, {numbers.layers} layers x {numbers.heads} heads, hidden {numbers.hidden}{change})"

    @property
    def name(self) -> str:
        """How it was loaded."""
        return self.identity.name

    @property
    def anatomy(self) -> Anatomy:
        """Where its parts are, and how many."""
        return self.taps.anatomy

    @property
    def places(self) -> Places:
        """Its parts, as modules."""
        return self.taps.places

    @property
    def backbone(self) -> nn.Module:
        """Everything but the vocabulary head."""
        return self.places.backbone

    @property
    def lm_head(self) -> nn.Module:
        """The vocabulary head."""
        return self.places.head

    @property
    def device(self) -> torch.device:
        """Where token ids go; under a `device_map`, where the embedding is computed."""
        hook = getattr(self.places.embedding, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
        return next(self.places.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = self.hf.dtype
        return dtype

    @property
    def longest(self) -> int | None:
        """How many positions the configuration allows; None where it does not say."""
        value = getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)
        return value if isinstance(value, int) and value > 0 else None

    @property
    def in_force(self) -> tuple[tuple[Change, float], ...]:
        """(change, coefficient) under which this view runs now: of the open contexts, then its own not yet entered."""
        return (*self.taps.entered, *self._waiting())

    def _waiting(self) -> tuple[tuple[Change, float], ...]:
        return tuple(entry for entry in self.changes if not any(entry is viewed for viewed in self.taps.viewed))

    @property
    def change_ids(self) -> tuple[str, ...]:
        """One hash per change in force; "unknown" for a `Custom` function; empty for a plain model."""
        return tuple(change_id(change, coefficient) for change, coefficient in self.in_force)

    def out_projection(self, layer: int) -> nn.Module:
        """The attention output projection of one layer."""
        self.anatomy.check_layers([layer], "out_projection")
        return self.places.layers[layer].attention_output

    def parameter(self, module: str, layer: int) -> nn.Parameter:
        """Return the weight (out, in) of a projection; on an offloaded model it lies on the meta device.

        Args:
            module: `attention_output` or `mlp_output`.
            layer: counts from 0.

        Raises:
            SteerError: no such module or layer, or a layer with experts was asked for its `mlp_output`.
        """
        self.anatomy.shape(module, layer)
        place = self.places.layers[layer]
        found = {"attention_output": place.attention_output, "mlp_output": place.mlp_output}.get(module)
        if found is None:
            raise SteerError(f"a layer has no module {module!r}", "attention_output or mlp_output")
        weight = found.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    # Reading and writing.

    @contextmanager
    def steered(self, steering: Steering, coefficient: float = 1.0) -> Iterator[Report]:
        """Steer every forward pass inside; nested contexts act in the order in which they were entered.

        Args:
            steering: what to do.
            coefficient: c of the request; 0 changes not a bit.

        Yields:
            What was touched, see `Report`; a steering that touched nothing is warned about at the end.

        Raises:
            SteerError: the steering does not fit this model, its phases need marks that the tokenizer lacks, the
                coefficient has no meaning for it, or the model is compiled.
        """
        with self.active(), self._steered(steering, coefficient) as report:
            yield report

    @contextmanager
    def _steered(self, steering: Steering, coefficient: float) -> Iterator[Report]:
        steering.check(self.anatomy, self.identity)
        for intervention in steering.interventions:
            check_phase(intervention.phase, self.marks)
            check_coefficient(intervention, coefficient)
        with self.taps.entering(steering, coefficient), self.taps.write(steering, coefficient) as report:
            yield report

    @contextmanager
    def capture(self, wanted: Wanted, every: bool = False) -> Iterator[Capture]:
        """Keep values: `with m.capture({"resid_post": [3], "z": None}) as acts: ...; acts["z"][0]`.

        Args:
            wanted: site -> layers; None means all layers.
            every: keep all forward passes (under `generate` the prompt's, then one per token) in `acts.forwards`
                instead of the last one only.

        Yields:
            {site: {layer: tensor}} of the last forward pass; tensors (batch, token, hidden), at `z` (batch, token,
            heads, head width), at `router_logits` (batch, token, experts), on the device where they arose, still
            attached to the graph if there is one. At `router` a `steer.routing.Routing` of two tensors.
        """
        capture = Capture(every)
        tensors = {site: layers for site, layers in wanted.items() if site != "router"}
        with ExitStack() as stack:
            stack.enter_context(self.read(capture.take, tensors))
            if "router" in wanted:
                stack.enter_context(self.hear(capture.hear, wanted["router"]))
            yield capture

    @contextmanager
    def read(self, callback: Reader, wanted: Wanted) -> Iterator[None]:
        """Call `callback(site, layer, value, states)` in the pass, after all writes; see `steer.hooks.Reader`."""
        with self.active(), self.taps.read(callback, wanted):
            yield

    @contextmanager
    def hear(self, listener: Listener, layers: Sequence[int] | None = None) -> Iterator[None]:
        """Call `listener(layer, routing, states)` with every choice of experts, after all writes.

        A block that never calls its router is never heard, and nothing here says so; `routed` and `probes.collect` do.

        Args:
            listener: see `steer.routing.Listener`.
            layers: that have experts; None: all of them.

        Raises:
            SteerError: a layer has no experts.
        """
        with self.active(), self.taps.hear(listener, layers):
            yield

    @contextmanager
    def routed(self) -> Iterator[Routes]:
        """Keep which experts the tokens go to: `with m.routed() as routes: traces = m.generate(questions)`; `routes[trace]`.

        Raises:
            SteerError: the model has no experts.
        """
        if not self.anatomy.expert_layers:
            raise SteerError(f"{self.name}, a {self.anatomy.family} model, has no experts", "a mixture of experts")
        routes = Routes(self.anatomy.expert_layers)
        with self.hear(routes.hear):
            self.taps.routes.append(routes)
            try:
                yield routes
            finally:
                self.taps.routes.remove(routes)

    @property
    def routes(self) -> Sequence[Routes]:
        """What keeps the routed experts of replies now."""
        return tuple(self.taps.routes)

    def at(self, positions: Positions) -> AbstractContextManager[None]:
        """Make phases known to the hooks: `positions` observes the tokens of every forward pass inside."""
        return self.taps.at(positions)

    # Views.

    def with_(self, *changes: object, coefficient: float = 1.0) -> SteerableModel:
        """Return a view of the same model under further changes; its weights are shared, nothing is changed yet.

        Args:
            changes: steerings and patches, in the order in which they are entered.
            coefficient: c of these changes; scales a patch's operations.

        Raises:
            SteerError: something else was given.
        """
        added: list[tuple[Change, float]] = []
        for change in changes:
            if not isinstance(change, Steering | Patch):
                raise SteerError(
                    f"with_ was given a {type(change).__name__}",
                    "a Steering or a Patch",
                    "Wrap interventions: Steering((intervention,))",
                )
            added.append((change, coefficient))
        view = SteerableModel(self.hf, self.tokenizer, self.taps, self.identity, self.marks, self.path, self.card)
        view.changes = (*self.changes, *added)
        return view

    @contextmanager
    def active(self) -> Iterator[tuple[Report, ...]]:
        """Enter those of this view's changes that are not in force yet; yields the reports of the steerings."""
        with ExitStack() as stack:
            reports = []
            for entry in self._waiting():
                stack.enter_context(listed(self.taps.viewed, entry))
                change, coefficient = entry
                if isinstance(change, Patch):
                    stack.enter_context(change.on(self, coefficient))
                else:
                    reports.append(stack.enter_context(self._steered(change, coefficient)))
            yield tuple(reports)

    # Running.

    @torch.no_grad()
    def run(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None = None,
        marks_from: Sequence[int] | None = None,
        *,
        head: bool = True,
    ) -> list[Float[Tensor, "token width"]]:
        """Run whole sequences through the model, padded on the right, under this view's changes.

        Args:
            sequences: token ids, each at least one.
            prompt_lengths: tokens of each prompt; without them only phase `all` can act, and readers get no states.
            marks_from: per sequence the first token at which a mark counts; None: as for raw text.
            head: False stops before the vocabulary head.

        Returns:
            Per sequence the logits (token, vocab), or the backbone's last hidden state (token, hidden), after the
            final norm; float32, float64 for a float64 model.
        """
        if not sequences or not all(len(sequence) for sequence in sequences):
            raise SteerError("there is nothing to run, or a sequence is empty", "at least one token per sequence")
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        with self.active(), ExitStack() as stack:
            if prompt_lengths is not None:
                prompts_of = [sequence[:length] for sequence, length in zip(sequences, prompt_lengths, strict=True)]
                starts = (
                    [self.marks.raw_text_start(prompt) for prompt in prompts_of] if marks_from is None else marks_from
                )
                stack.enter_context(self.at(Positions(self.marks, list(prompt_lengths), list(starts), self.device)))
            model = self.hf if head else self.backbone
            output = model(input_ids=ids, attention_mask=mask, use_cache=False)
        values = output.logits if head else output.last_hidden_state
        precise = torch.promote_types(values.dtype, torch.float32)
        return [values[row, : len(sequence)].to(precise) for row, sequence in enumerate(sequences)]

    def render(self, content: prompts.Content, thinking: bool | None = None) -> prompts.Rendered:
        """Turn text or chat messages into token ids; see `steer.prompts.render`."""
        if self.tokenizer is None:
            raise SteerError(f"{self.name} has no tokenizer", "token ids", "Give one to wrap(hf_model, tokenizer)")
        return prompts.render(self.tokenizer, content, thinking, self.marks)

    def generate_shard(self, prompts: Sequence[Any], **options: Any) -> list[Trace]:
        """Reply to the prompts of one shard; arguments as `steer.generation.generate_shard`."""
        from steer.generation import generate_shard

        return generate_shard(self, prompts, **options)

    def generate(self, prompts: Sequence[Any], **options: Any) -> Traces:
        """Reply to prompts under this view's changes; arguments as `steer.generation.generate`."""
        from steer.generation import generate

        return generate(self, prompts, **options)


def change_id(change: Any, coefficient: float) -> str:
    """Return the hash of a steering, a patch or an adapter at its coefficient; "unknown" for a `Custom` function."""
    if isinstance(change, Steering) and not change.has_fingerprint:
        return UNKNOWN
    return digest([change.fingerprint.encode(), canonical(coefficient).encode()])


def wrap(
    hf_model: Any,
    tokenizer: Any = None,
    *,
    name: str = "",
    anatomy: str | Path | Record | None = None,
    marks: Marks | None = None,
    path: Path | None = None,
    weights_id: str = UNKNOWN,
    self_check: bool = True,
) -> SteerableModel:
    """Make a loaded Hugging Face model steerable, without changing it.

    Args:
        hf_model: a causal language model of `transformers`, not compiled.
        tokenizer: its tokenizer; without one there are no marks and no text.
        name: for the reader; the configuration's name by default.
        anatomy: a record, or the YAML file of one; None takes the bundled one.
        marks: what opens and closes its thinking; None asks the tokenizer.
        path: the folder that it was loaded from.
        weights_id: hash of its weights, where known.
        self_check: prove the anatomy by one forward pass over four tokens.

    Raises:
        SteerError: the family has no record, the record does not describe the model, or the model is compiled.
    """
    refuse_compiled(hf_model)
    record = anatomy if isinstance(anatomy, Record) or anatomy is None else read_record(anatomy)
    found = resolve(hf_model.config.to_dict(), shapes_of(hf_model), record)
    taps = Taps(hf_model, found, places(hf_model, found))
    title = name or getattr(hf_model.config, "name_or_path", "") or type(hf_model).__name__
    vocabulary = UNKNOWN if tokenizer is None else tokenizer_id(tokenizer)
    identity = ModelIdentity(title, found.record.family, shape_id(found.numbers()), weights_id, vocabulary)
    if marks is None:
        marks = Marks() if tokenizer is None else Marks.from_tokenizer(tokenizer)
    model = SteerableModel(hf_model, tokenizer, taps, identity, marks, path)
    if self_check:
        check_model(model)
    return model


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    anatomy: str | Path | Record | None = None,
    self_check: bool = True,
) -> SteerableModel:
    """Load a model; arguments and errors as `steer.loading.load`."""
    from steer.loading import load as load_now

    return load_now(name, dtype=dtype, device=device, device_map=device_map, anatomy=anatomy, self_check=self_check)
