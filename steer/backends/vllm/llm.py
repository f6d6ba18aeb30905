"""`SteeredLLM`: vLLM with the face of `steer.load`, a steering of its own for every prompt of a batch.

    with steer.SteeredLLM("organism:chain", steerings={"short": steering}) as llm:
        plain, short = llm.generate(["a = 3 ; b = a + 4 ; ? b"] * 2, steering=[None, "short"])

Prompts are rendered here, as everywhere in this toolkit, and sent as token ids, so marks count from where they count in the
HF back end. Traces and run folders are the same; the random streams are vLLM's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch

from steer import prompts as rendering
from steer.anatomy.resolve import Anatomy
from steer.backends.vllm import adapters as lora
from steer.backends.vllm import budget, start
from steer.backends.vllm.adapters import Adapter, Weights
from steer.backends.vllm.capture import Taken, Wanted, whole
from steer.backends.vllm.capture_read import read
from steer.backends.vllm.choice import Choice, kept, named, of_steerings, per_prompt, the_adapter
from steer.backends.vllm.config import Declared
from steer.backends.vllm.known import Known
from steer.backends.vllm.lowering import Place
from steer.backends.vllm.replies import Reply, Terms, parameters, run
from steer.backends.vllm.store import Store, usual
from steer.errors import SteerError
from steer.generation import OnToken, Progress, Prompt, as_prompts, run_meta
from steer.model import change_id
from steer.policy import Policy, check_policy
from steer.sampling import Sampling, end_tokens
from steer.steering import Steering
from steer.trace import Trace
from steer.traces import Traces

EVERYWHERE = ("resid_post", "attn_out", "mlp_out")
"""Sites of `places="all"`, for `Add` and `ProjectOut`, in every layer."""
Ask: TypeAlias = Steering | str | None


class SteeredLLM:
    """An engine of vLLM whose requests may be steered, each in its own way.

    Args:
        model: hub id, folder, `file.gguf` or `organism:NAME`.
        steerings: what is to run: a mapping from names, or values with names of their own. They decide which layers can
            be steered at all, see `places`.
        adapters: name -> a patch (or a steering with a patch form) of low rank, or the folder of an adapter.
        places: further (site, kind, layer) that may be steered; "all" is `Add` and `ProjectOut` at resid_post, attn_out
            and mlp_out of every layer. Layers that nobody declared are left as vLLM made them.
        slots: different steerings that one step can hold; None: `max_num_seqs`, which always suffices.
        store: folder in which steerings are kept for the engine's processes; None: one in the user's cache.
        dtype: of the weights; None keeps the checkpoint's, float32 for organisms.
        anatomy: a record of the user's own.
        capture: (site, layer) whose rows can be read.
        options: of `vllm.LLM`, such as `max_num_seqs`, `tensor_parallel_size`, `max_model_len`.

    Attributes:
        llm: the `vllm.LLM`.
        tokenizer, marks, anatomy, identity, card: as of `SteerableModel`.
        declared: what the engine was started for.
        steerings, adapters: by name.

    Raises:
        SteerError: vLLM is not installed; no such model, or without a tokenizer; a steering that does not fit the model
            or has no form in vLLM; a patch that is no adapter.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        steerings: Mapping[str, Steering] | Iterable[Steering] = (),
        adapters: Mapping[str, Weights] | None = None,
        places: Iterable[Place] | Literal["all"] | None = None,
        slots: int | None = None,
        store: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        anatomy: str | Path | None = None,
        capture: Iterable[tuple[str, int]] = (),
        **options: Any,
    ) -> None:
        start.require()
        known = Known.of(model, anatomy)
        source, self.anatomy, self.tokenizer = known.source, known.anatomy, known.tokenizer
        self.marks, self.identity, self.card = known.marks, known.identity, known.source.card
        self.generation_config = known.generation_config
        self.steerings = _with_names(steerings)
        for steering in self.steerings.values():
            steering.check(self.anatomy, self.identity)
        self.changes: tuple[tuple[Steering | Adapter, float], ...] = ()
        self._machine = start.machine()
        self._scratch = TemporaryDirectory(prefix="steer-vllm-")
        kept = usual() if store is None else Path(store)
        kept.mkdir(parents=True, exist_ok=True)
        self.store = Store(kept)
        folder = start.runnable(source, self._machine.processors)
        own = folder == source.folder
        self.adapters = lora.prepared(adapters or {}, folder, self.identity, Path(self._scratch.name), own)
        told = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
        given = {"dtype": "float32"} if source.organism else {}
        held = list(self.adapters.values())
        given |= {
            **told,
            **lora.options(held, self._machine.processors, self.anatomy.experts),
            **lora.only(held),
            **options,
        }
        arguments = start.options(folder, self._machine, given, source.organism, self.marks, self.tokenizer)
        self._simple = "reasoning_config" not in given and "reasoning_config" in arguments
        self.declared = Declared.of(
            self.anatomy,
            self.store.folder,
            self.steerings.values(),
            slots=arguments["max_num_seqs"] if slots is None else slots,
            places=_everywhere(self.anatomy) if places == "all" else places or (),
            capture=capture,
            marks=self.marks,
        )
        arguments["additional_config"] = {**arguments.get("additional_config", {}), **self.declared.to_config()}
        self.llm = _started(arguments)
        self.longest = int(self.llm.llm_engine.model_config.max_model_len)
        self.batch_size = int(arguments["max_num_seqs"])

    def __repr__(self) -> str:
        changes = f", {len(self.changes)} changes" if self.changes else ""
        return f"SteeredLLM({self.identity.name}: vLLM {self._machine.version}, {len(self.declared.places)} places{changes})"

    def __enter__(self) -> SteeredLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and remove what was written for it alone; views of it end with it. A second time does nothing."""
        self.llm.llm_engine.engine_core.shutdown()
        self._scratch.cleanup()

    def _check_runs(self) -> None:
        """Refuse to go on behind `close`, whichever view was closed: they share what it removes."""
        if not Path(self._scratch.name).is_dir():
            raise SteerError(f"the engine of {self.identity.name} was stopped", "one that runs", "Use it before close(), within its with block")  # fmt: skip

    @property
    def name(self) -> str:
        """How it was loaded."""
        return self.identity.name

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = self.llm.llm_engine.model_config.dtype
        return dtype

    @property
    def device(self) -> str:
        """Where it runs, such as `cuda`."""
        return self._machine.device

    @property
    def backend(self) -> dict[str, Any]:
        """What `run.yaml` says of the engine."""
        parallel = self.llm.llm_engine.vllm_config.parallel_config
        return {
            "name": "vllm",
            "version": self._machine.version,
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensor_parallel": int(parallel.tensor_parallel_size),
            "pipeline_parallel": int(parallel.pipeline_parallel_size),
        }

    @property
    def in_force(self) -> tuple[tuple[Steering | Adapter, float], ...]:
        """(change, coefficient) of this view."""
        return self.changes

    @property
    def change_ids(self) -> tuple[str, ...]:
        """One hash per change of this view, the same as of the HF back end."""
        return tuple(change_id(change, coefficient) for change, coefficient in self.changes)

    def with_(self, *changes: Steering | str, coefficient: float = 1.0) -> SteeredLLM:
        """Return a view of the same engine under which every prompt runs; a steering of a call acts after its changes.

        Args:
            changes: steerings, or names of steerings and adapters that the engine was given.
            coefficient: c of the steerings; 1 for adapters.

        Raises:
            SteerError: no such name, a steering that needs a place that was not declared, a second adapter.
        """
        view = copy.copy(self)
        added = [(self._looked_up(change), coefficient) for change in changes]
        view.changes = (*self.changes, *added)
        view._chosen(None, 1.0, None)
        return view

    def render(self, content: rendering.Content, thinking: bool | None = None) -> rendering.Rendered:
        """Turn text or chat messages into token ids; see `steer.prompts.render`."""
        return rendering.render(self.tokenizer, content, thinking, self.marks)

    def generate(
        self,
        prompts: Sequence[rendering.Content | Prompt],
        *,
        steering: Ask | Sequence[Ask] = None,
        coefficient: float | Sequence[float] = 1.0,
        phase: str | Sequence[str | None] | None = None,
        sampling: Sampling | None = None,
        samples: int = 1,
        policy: Policy | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        thinking: bool | None = None,
        progress: Callable[[Progress], None] | None = None,
        on_token: OnToken | None = None,
    ) -> Traces:
        """Reply to prompts; the face of `SteerableModel.generate`, with a steering per prompt.

        Args:
            prompts: texts, lists of chat messages, `RawText` or `Prompt`s, as of `steer.generation.generate`.
            steering: a steering, a name that the engine was given, or a list with one (or None) per prompt.
            coefficient: c of the steering; or one per prompt.
            phase: in place of every intervention's own; None: their own; or one per prompt.
            sampling: None takes what the model's generation config asks for.
            samples: replies per prompt.
            policy: `budget:N`, where vLLM can run it exactly.
            seed: of all random streams, which are vLLM's: other replies than the HF back end's from the same seed.
            batch_size: was fixed when the engine was started (`max_num_seqs`); another one is refused.
            thinking: sets the chat template's own switch.
            progress: called with every reply that is done.
            on_token: called with (prompt, sample, token id) as each token is written.

        Raises:
            SteerError: bad prompts or options; a steering that does not fit the model or needs a place that was not
                declared at start; a name that nobody gave; a policy that vLLM does not run.
        """
        self._check_batch(batch_size)
        asked = self._asked(prompts)
        if steering is None and (coefficient != 1 or phase is not None):
            raise SteerError("a coefficient or a phase was given, and no steering", "a steering too")
        terms = self._terms(sampling, samples, policy, seed, thinking)
        chosen = self._each(asked, steering, coefficient, phase)
        replies = self._written(asked, chosen, terms, progress, on_token)
        meta = run_meta(
            self,
            sampling=terms.sampling,
            samples=samples,
            policy=policy,
            seed=seed,
            batch_size=self.batch_size,
            thinking=thinking,
        )
        return Traces(self._traces(replies, terms), meta | {"steering": _told(chosen)}, tokenizer=self.tokenizer)

    def generate_shard(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling,
        samples: int = 1,
        policy: Policy | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        thinking: bool | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[Trace]:
        """The replies to one shard's prompts under this view; arguments as `steer.generation.generate_shard`.

        `batch_size` as in `generate`.
        """
        self._check_batch(batch_size)
        terms = self._terms(sampling, samples, policy, seed, thinking)
        return self._traces(self._written(prompts, self._each(prompts), terms, progress), terms)

    def greedy(self, prompts: Sequence[rendering.Content | Prompt], tokens: int) -> list[Reply]:
        """Let prompts be replied to with the likeliest tokens under this view.

        Returns:
            Replies with the logarithms of the chosen tokens' probabilities, in the order of the prompts' ids.
        """
        asked = self._asked(prompts)
        terms = Terms(Sampling(temperature=0.0, max_new_tokens=tokens), logprobs=True)
        return self._written(asked, self._each(asked), terms)

    def read(self, traces: Sequence[Trace], wanted: Sequence[Wanted] | None = None) -> list[Taken]:
        """Put finished traces through the engine under this view; keep what is wanted of the rows at `capture`.

        Args:
            traces: of fewer tokens than the engine reads.
            wanted: of each; None: every row. `probes.collect.vllm` asks for sums over spans alone.

        Raises:
            SteerError: the engine was not started for reading (`capture=`); as a `ValueError` too, what it cannot run.
        """
        self._check_runs()
        asked = [whole(trace) for trace in traces] if wanted is None else wanted
        choice = self._chosen(None, 1.0, None)
        extra = [choice.extra(trace.generation_prompt_start) for trace in traces]
        adapter = None if choice.adapter is None else choice.adapter.request()
        return read(self.llm, [trace.tokens for trace in traces], asked, extra, adapter)

    def _check_batch(self, batch_size: int | None) -> None:
        if batch_size not in (None, self.batch_size):
            raise SteerError(
                f"batch_size is {batch_size}",
                f"{self.batch_size}, for which the engine was started",
                "Start it with max_num_seqs",
            )

    def _asked(self, prompts: Sequence[rendering.Content | Prompt]) -> list[Prompt]:
        return as_prompts(prompts, chat=self.tokenizer.chat_template is not None)

    def _terms(
        self, sampling: Sampling | None, samples: int, policy: Policy | None, seed: int, thinking: bool | None
    ) -> Terms:
        check_policy(policy, self.marks)
        thoughts = budget.budget_of(policy, self.marks, self._simple)
        return Terms(Sampling.of(self) if sampling is None else sampling, samples, policy, seed, thinking, thoughts)

    def _written(
        self,
        asked: Sequence[Prompt],
        chosen: Mapping[str, Choice],
        terms: Terms,
        progress: Callable[[Progress], None] | None = None,
        on_token: OnToken | None = None,
    ) -> list[Reply]:
        """Every reply, ordered by (item, sample)."""
        self._check_runs()
        replies = []
        for prompt in sorted(asked, key=lambda prompt: prompt.id):
            rendered = self.render(prompt.content, terms.thinking)
            ids, begin, choice = rendered.token_ids, rendered.generation_prompt_start, chosen[prompt.id]
            limit = min(terms.sampling.max_new_tokens, self.longest - len(ids))
            if limit < 1:
                raise SteerError(
                    f"prompt {prompt.id} has {len(ids)} tokens",
                    f"fewer than the {self.longest} that the engine reads",
                    "Shorten the prompt, or start with a larger max_model_len",
                )
            if terms.thoughts is not None:
                budget.check_prompt(prompt.id, ids, begin, self.marks)
            adapter = None if choice.adapter is None else choice.adapter.request()
            replies += [
                Reply(prompt, rendered, sample, limit, choice.extra(begin), adapter) for sample in range(terms.samples)
            ]
        ends = end_tokens(self)
        params = [parameters(terms, reply, ends, streamed=on_token is not None) for reply in replies]
        run(self.llm.llm_engine, replies, params, progress, on_token)
        return replies

    def _traces(self, replies: Sequence[Reply], terms: Terms) -> list[Trace]:
        return [reply.trace(self.tokenizer, self.marks, terms.thoughts) for reply in replies]

    def _each(
        self, asked: Sequence[Prompt], steering: Any = None, coefficient: Any = 1.0, phase: Any = None
    ) -> dict[str, Choice]:
        """What acts on every prompt, by its id."""
        count = len(asked)
        known: dict[Any, Choice] = {}
        rows = zip(
            asked,
            per_prompt(steering, count, "steerings"),
            per_prompt(coefficient, count, "coefficients"),
            per_prompt(phase, count, "phases"),
            strict=True,
        )
        found = {}
        for prompt, one, c, when in rows:
            key = (one if isinstance(one, str) else id(one), c, when)
            if key not in known:
                known[key] = self._chosen(one, c, when)
            found[prompt.id] = known[key]
        return found

    def _chosen(self, asked: Ask, coefficient: float, phase: str | None) -> Choice:
        """What acts on a prompt: this view's changes, then what is asked for."""
        wanted = None if asked is None else self._looked_up(asked)
        weights = [(change, c, None) for change, c in self.changes if isinstance(change, Adapter)]
        adapter = the_adapter([*weights, (wanted, coefficient, phase)] if isinstance(wanted, Adapter) else weights)
        parts = [(change, c) for change, c in self.changes if isinstance(change, Steering)]
        found = of_steerings(parts, wanted if isinstance(wanted, Steering) else None, coefficient, phase)
        if found is None:
            return Choice(adapter=adapter)
        steering = found[0]
        steering.check(self.anatomy, self.identity)
        self.declared.check_places(steering)
        own = steering.name or steering.fingerprint[:12]
        return kept(*found, self.store, asked if isinstance(asked, str) and steering is wanted else own, adapter)

    def _looked_up(self, asked: Steering | str) -> Steering | Adapter:
        if isinstance(asked, Steering):
            return asked
        if isinstance(asked, str):
            return named(asked, self.steerings, self.adapters)
        raise SteerError(
            f"a {type(asked).__name__} was given for a steering",
            "a Steering, a name, or None",
            "Patches run as adapters: SteeredLLM(adapters={'name': patch}), then steering='name'",
        )


def _with_names(steerings: Mapping[str, Steering] | Iterable[Steering]) -> dict[str, Steering]:
    if isinstance(steerings, Mapping):
        return dict(steerings)
    given = list(steerings)
    found = {steering.name or steering.fingerprint[:12]: steering for steering in given}
    if len(found) < len(given):
        raise SteerError("two of the steerings have the same name", "different names", "Give a mapping: steerings={'name': steering}")  # fmt: skip
    return found


def _everywhere(anatomy: Anatomy) -> list[Place]:
    return [(site, kind, layer) for site in EVERYWHERE for kind in ("add", "project") for layer in range(anatomy.layers)]  # fmt: skip


def _started(arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(**arguments)


def _told(chosen: Mapping[str, Choice]) -> Any:
    """What acted, for `run.yaml`: one entry where it is the same for all prompts, else one per item."""
    told = {item: choice.to_dict() or None for item, choice in chosen.items()}
    different = {str(each) for each in told.values()}
    return next(iter(told.values())) if len(different) == 1 else told
