"""Between our words and vLLM's: `Sampling` to `SamplingParams`, what an engine wrote to traces.

Every reply has a seed of its own, made from (seed, item, sample), so that what is sampled does not depend on the order or
the company in which requests run. The random streams are vLLM's: the same seed gives other replies than the HF back end.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from steer.backends.vllm import budget
from steer.errors import SteerError
from steer.generation import OnToken, Progress
from steer.identity import canonical
from steer.marks import Marks
from steer.policy import Policy
from steer.prompts import Prompt, Rendered
from steer.sampling import Sampling
from steer.trace import Trace, make_trace

COLDEST = 0.01
"""Below it vLLM takes a temperature for this one."""


@dataclass(frozen=True)
class Terms:
    """What a call asks for, of all its replies.

    Attributes:
        sampling, samples, policy, seed, thinking: as of `steer.generation.generate`.
        thoughts: the thinking budget, if there is one, as we count.
        logprobs: whether those of the chosen tokens are wanted.

    Raises:
        SteerError: no samples, or a temperature that vLLM would change.
    """

    sampling: Sampling
    samples: int = 1
    policy: Policy | None = None
    seed: int = 0
    thinking: bool | None = None
    thoughts: int | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise SteerError(f"samples is {self.samples}", "1 or more")
        if 0 < self.sampling.temperature < COLDEST:
            raise SteerError(f"the temperature is {self.sampling.temperature}", f"0, or at least {COLDEST} in vLLM")


@dataclass
class Reply:
    """One request and what came of it.

    Attributes:
        prompt, rendered, sample: what is replied to, and which of the replies this is.
        limit: longest reply.
        extra: `extra_args`, which ask for steering.
        adapter: vLLM's `LoRARequest`; None for none.
        tokens: the reply so far.
        logprobs: of each of them, where they were asked for.
        finish: why it ended.
    """

    prompt: Prompt
    rendered: Rendered
    sample: int
    limit: int
    extra: dict[str, Any] = field(default_factory=dict)
    adapter: Any = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None

    @property
    def name(self) -> str:
        """Item and sample."""
        return f"{self.prompt.id}/{self.sample}"

    def trace(self, tokenizer: Any, marks: Marks, thoughts: int | None) -> Trace:
        """Return the trace.

        Args:
            tokenizer, marks: of the model.
            thoughts: the thinking budget, if there was one.

        Raises:
            SteerError: vLLM ended the reply for another reason than an end token or its length, or its budget acted
                otherwise than ours.
        """
        start, length = self.rendered.generation_prompt_start, len(self.rendered.token_ids)
        if self.finish not in ("stop", "length"):
            raise SteerError(f"vLLM ended the reply {self.name} with {self.finish!r}", "stop or length")
        forced: Sequence[int] = ()
        if thoughts is not None:
            tokens = (*self.rendered.token_ids, *self.tokens)
            forced = budget.forced(self.name, tokens, length, start, marks, thoughts)
        return make_trace(
            item=self.prompt.id,
            sample=self.sample,
            prompt=self.prompt.content,
            prompt_token_ids=self.rendered.token_ids,
            completion_token_ids=self.tokens,
            tokenizer=tokenizer,
            marks=marks,
            generation_prompt_start=start,
            finish_reason="stop" if self.finish == "stop" else "length",
            forced=forced,
            gold=self.prompt.gold,
            group=self.prompt.group,
        )


def seed_of(seed: int, item: str, sample: int) -> int:
    """Return the seed of one reply, below 2^63."""
    key = canonical([seed, item, sample]).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def parameters(terms: Terms, reply: Reply, ends: Iterable[int], streamed: bool) -> Any:
    """Return vLLM's `SamplingParams` of one reply.

    Args:
        terms: what the call asks for.
        reply: the request.
        ends: tokens that end a reply.
        streamed: whether tokens are wanted as they come.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = terms.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=reply.limit,
        seed=seed_of(terms.seed, reply.prompt.id, reply.sample) if sampling.temperature > 0 else None,
        ignore_eos=True,
        stop_token_ids=sorted(ends),
        detokenize=False,
        logprobs=0 if terms.logprobs else None,
        output_kind=RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY,
        thinking_token_budget=None if terms.thoughts is None else terms.thoughts - 1,
        extra_args=dict(reply.extra) or None,
    )


def run(
    engine: Any,
    replies: Sequence[Reply],
    params: Sequence[Any],
    progress: Callable[[Progress], None] | None = None,
    on_token: OnToken | None = None,
) -> None:
    """Let an engine write replies, all at once; whatever interrupts, nothing of them stays in it.

    Args:
        engine: vLLM's `LLMEngine`.
        replies: filled in here.
        params: of each.
        progress: called with every reply that is done.
        on_token: called with (prompt, sample, token id) as each token is written.
    """
    named, done, tokens, begun = {}, 0, 0, time.monotonic()
    try:
        for number, (reply, each) in enumerate(zip(replies, params, strict=True)):
            name = f"{number}-{reply.name}"
            prompt = {"prompt_token_ids": list(reply.rendered.token_ids)}
            engine.add_request(name, prompt, each, lora_request=reply.adapter)
            named[name] = reply
        while engine.has_unfinished_requests():
            for output in engine.step():
                reply = named[output.request_id]
                _take(reply, output.outputs[0], on_token)
                if output.finished:
                    done, tokens = done + 1, tokens + len(reply.tokens)
                    del named[output.request_id]
                    if progress is not None:
                        progress(Progress(done, len(replies), tokens, time.monotonic() - begun))
    finally:
        if named:
            engine.abort_request(list(named))


def _take(reply: Reply, output: Any, on_token: OnToken | None) -> None:
    fresh = [int(token) for token in output.token_ids]
    reply.tokens += fresh
    if output.logprobs is not None:
        reply.logprobs += [float(row[token].logprob) for row, token in zip(output.logprobs, fresh, strict=True)]
    reply.finish = output.finish_reason
    if on_token is not None:
        for token in fresh:
            on_token(reply.prompt, reply.sample, token)
