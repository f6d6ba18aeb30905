"""Generation: our own batched sampler on a Hugging Face model, with a key-value cache and known phases.

Items are cut into shards of 64 (sorted ids); a shard's replies share a batch, and rows that end make room for the next
ones of the same shard. Each sequence has a random stream of its own, keyed by (seed, item, sample). Hence what is
sampled depends on the options and the item, and bytes are equal for one process, several, and a resumed run.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from steer.decoding import Batch, Decodable, Reply
from steer.errors import SteerError
from steer.identity import tokenizer_id
from steer.policy import Policy, check_decision, check_policy, forced_tokens
from steer.positions import Positions
from steer.prompts import Content, Prompt, RawText, Rendered, render
from steer.sampling import Sampling, choose, end_tokens, uniforms
from steer.shards import cut
from steer.trace import Trace, make_trace
from steer.traces import Traces

__all__ = ["BATCH", "OnToken", "Progress", "Prompt", "Sampling", "as_prompts", "generate", "generate_shard", "run_meta"]

BATCH = 64
PREFILL = 16384  # Prompt tokens, padding included, that are read at once.
logger = logging.getLogger(__name__)

OnToken: TypeAlias = Callable[[Prompt, int, int], None]


@dataclass(frozen=True)
class Progress:
    """How far a generation is.

    Attributes:
        done, total: replies.
        tokens: written so far.
        seconds: since the start.
    """

    done: int
    total: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second so far."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class _Counter:
    """Adds up over shards and tells the caller after each step."""

    def __init__(self, total: int, tell: Callable[[Progress], None] | None) -> None:
        self.total, self.tell, self.done, self.tokens, self.start = total, tell, 0, 0, time.monotonic()
        self.warned = False

    def add(self, tokens: int, done: int) -> None:
        self.tokens += tokens
        self.done += done
        if self.tell is not None:
            self.tell(Progress(self.done, self.total, self.tokens, time.monotonic() - self.start))


def as_prompts(prompts: Sequence[Content | Prompt], chat: bool = False) -> list[Prompt]:
    """Give every prompt an id: its own, or its number, so that the order stays.

    Args:
        prompts: texts, lists of chat messages, or `Prompt`s.
        chat: whether a plain text is a user's message; `RawText` and the content of a `Prompt` stay as they are.

    Raises:
        SteerError: there are no prompts, one is neither text nor messages, or an id occurs twice.
    """
    if not prompts:
        raise SteerError("there are no prompts", "at least one")
    if isinstance(prompts, str):
        raise SteerError("a single text was given for a list of prompts", "a list", "Write [prompt]")
    named: list[Prompt] = []
    width = max(5, len(str(len(prompts) - 1)))
    for number, given in enumerate(prompts):
        item = given.id if isinstance(given, Prompt) else f"{number:0{width}d}"
        content = given.content if isinstance(given, Prompt) else _spoken(given, chat)
        messages = isinstance(content, list | tuple) and all(isinstance(message, Mapping) for message in content)
        if not isinstance(content, str) and not (messages and content):
            raise SteerError(
                f"prompt {item} is {str(content)[:60]!r}", "text, or a list of messages with role and content"
            )
        named.append(given if isinstance(given, Prompt) else Prompt(item, content))
    cut(prompt.id for prompt in named)  # Refuses an id that occurs twice.
    return named


def _spoken(content: Any, chat: bool) -> Any:
    plain = chat and isinstance(content, str) and not isinstance(content, RawText)
    return [{"role": "user", "content": content}] if plain else content


def generate(
    model: Decodable,
    prompts: Sequence[Content | Prompt],
    *,
    sampling: Sampling | None = None,
    samples: int = 1,
    policy: Policy | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    thinking: bool | None = None,
    progress: Callable[[Progress], None] | None = None,
    on_token: OnToken | None = None,
) -> Traces:
    """Reply to prompts; inside `with model.steered(...)`, or on a view made by `with_`, under that change.

    Args:
        model: a `SteerableModel`.
        prompts: texts, lists of chat messages, or `Prompt`s with ids. Where the model has a chat template a text is a
            user's message; a `RawText` is not. Traces come in the order of the ids.
        sampling: None takes what the model's generation config asks for (`Sampling.of`).
        samples: replies per prompt.
        policy: a think policy (see `steer.policy`).
        seed: of all random streams.
        batch_size: rows decoded together at most; results depend on it by the rounding of logits only.
        thinking: sets the chat template's own switch; None leaves its default.
        progress: called after every step.
        on_token: called with (prompt, sample, token id) as each token is written.

    Raises:
        SteerError: bad prompts or options, a template without the switch, or logits that are not numbers.
    """
    if model.tokenizer is None:
        raise SteerError(
            "the model has no tokenizer", "one that encodes the prompts", "Give one to steer.wrap(hf_model, tokenizer)"
        )
    sampling = Sampling.of(model) if sampling is None else sampling
    asked = as_prompts(prompts, chat=model.tokenizer.chat_template is not None)
    shards = cut([prompt.id for prompt in asked])
    named = {prompt.id: prompt for prompt in asked}
    counter = _Counter(len(named) * samples, progress)
    traces: list[Trace] = []
    for shard in shards:
        traces += _shard(
            model,
            [named[item] for item in shard.ids],
            sampling,
            samples,
            policy,
            seed,
            batch_size,
            thinking,
            counter,
            on_token,
        )
    meta = run_meta(
        model, sampling=sampling, samples=samples, policy=policy, seed=seed, batch_size=batch_size, thinking=thinking
    )
    return Traces(traces, meta, tokenizer=model.tokenizer)


def generate_shard(
    model: Decodable,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    samples: int = 1,
    policy: Policy | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    thinking: bool | None = None,
    progress: Callable[[Progress], None] | None = None,
    on_token: OnToken | None = None,
) -> list[Trace]:
    """The replies to one shard's prompts, ordered by (item, sample); arguments as in `generate`.

    A function of its arguments alone, whatever ran before: the unit of a journal, of resume and of distribution.
    """
    counter = _Counter(len(prompts) * samples, progress)
    return _shard(model, prompts, sampling, samples, policy, seed, batch_size, thinking, counter, on_token)


def run_meta(
    model: Any,
    *,
    sampling: Sampling,
    samples: int,
    policy: Policy | None,
    seed: int,
    batch_size: int,
    thinking: bool | None,
) -> dict[str, Any]:
    """What `run.yaml` says about a generation: every option that its traces depend on."""
    identity, backend = getattr(model, "identity", None), getattr(model, "backend", None)
    return {
        **({} if backend is None else {"backend": backend}),
        "model": None if identity is None else identity.to_dict(),
        "changes": list(getattr(model, "change_ids", ())),
        "tokenizer_id": tokenizer_id(model.tokenizer) if identity is None else identity.tokenizer_id,
        "marks": model.marks.to_dict(),
        "sampling": sampling.to_dict(),
        "samples": samples,
        "policy": None if policy is None else policy.name,
        "seed": seed,
        "batch_size": batch_size,
        "thinking": thinking,
    }


def _shard(
    model: Decodable,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
    policy: Policy | None,
    seed: int,
    batch_size: int,
    thinking: bool | None,
    counter: _Counter,
    on_token: OnToken | None,
) -> list[Trace]:
    if samples < 1 or batch_size < 1:
        raise SteerError(f"samples is {samples} and batch_size is {batch_size}", "1 or more")
    check_policy(policy, model.marks)
    rendered = {prompt.id: render(model.tokenizer, prompt.content, thinking, model.marks) for prompt in prompts}
    replies = [
        _reply(model, prompt, rendered[prompt.id], sample, sampling, seed)
        for prompt in sorted(prompts, key=lambda prompt: prompt.id)
        for sample in range(samples)
    ]
    shortest = min((reply.limit for reply in replies), default=sampling.max_new_tokens)
    if shortest < sampling.max_new_tokens and not counter.warned:
        counter.warned = True
        logger.warning(
            "prompts leave room for as few as %d new tokens, not the %d allowed.", shortest, sampling.max_new_tokens
        )
    # Followed once around all forwards: entered anew for every one, the hooks would be installed anew each time.
    with torch.no_grad(), model.active(), model.at(Positions(model.marks, [1])):
        _decode(model, replies, sampling, policy, batch_size, counter, on_token)
    return [_trace(model, reply) for reply in replies]


def _reply(model: Decodable, prompt: Prompt, rendered: Rendered, sample: int, sampling: Sampling, seed: int) -> Reply:
    length = len(rendered.token_ids)
    room = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    limit = sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, int(room) - length)
    if limit < 1:
        raise SteerError(
            f"prompt {prompt.id} has {length} tokens",
            f"fewer than the {room} that this model reads",
            "Shorten the prompt",
        )
    numbers = uniforms(seed, prompt.id, sample, limit) if sampling.temperature > 0 else np.zeros(0)
    return Reply(prompt, rendered, sample, limit, numbers)


def _decode(
    model: Decodable,
    replies: Sequence[Reply],
    sampling: Sampling,
    policy: Policy | None,
    batch_size: int,
    counter: _Counter,
    on_token: OnToken | None,
) -> None:
    """Write all replies, `batch_size` rows at a time; what a step costs is paid for few idle rows only."""
    ends = end_tokens(model)
    waiting = deque(replies)
    batch: Batch | None = None
    while waiting or batch is not None:
        running = 0 if batch is None else sum(reply.finish is None for reply in batch.replies)
        free = batch_size - running
        if batch is not None and running == 0:
            batch = None
        if batch is not None and _worth_dropping(len(batch), running):
            batch.drop_finished()
        if waiting and (batch is None or 4 * free >= batch_size):
            batch = _refill(model, batch, waiting, free)
        if batch is None:
            continue
        tokens = _next_tokens(batch, sampling, policy)
        _write(batch, tokens, ends, counter, on_token)
        if any(reply.finish is None for reply in batch.replies):
            batch.step(tokens.clamp(min=0))


def _worth_dropping(rows: int, running: int) -> bool:
    return rows - running >= max(1, rows // 8)


def _refill(model: Decodable, batch: Batch | None, waiting: deque[Reply], free: int) -> Batch:
    """Prefill up to `free` waiting replies, in parts of bounded size, and join them to the batch."""
    if batch is not None and any(reply.finish is not None for reply in batch.replies):
        batch.drop_finished()
    while free and waiting:
        part: list[Reply] = []
        prompts: set[str] = set()
        longest = 0
        while waiting and len(part) < free:
            item, length = waiting[0].prompt.id, len(waiting[0].rendered.token_ids)
            longest = max(longest, length)
            prompts.add(item)
            if part and longest * len(prompts) > PREFILL:
                break
            part.append(waiting.popleft())
        fresh = Batch(model, part)
        free -= len(part)
        if batch is None:
            batch = fresh
        else:
            batch.join(fresh)
    assert batch is not None
    return batch


def _next_tokens(batch: Batch, sampling: Sampling, policy: Policy | None) -> Int[Tensor, " batch"]:
    """The next token of every row; -1 where a policy stops the reply. Forced ones are noted."""
    logits = batch.logits
    if policy is None:
        return choose(logits, batch.uniform(), sampling)
    decision = policy(batch.policy_rows(), logits)
    check_decision(decision, *logits.shape)
    if decision.added is not None:
        logits = logits + decision.added.to(logits)
    if decision.banned is not None:
        logits = logits.masked_fill(decision.banned.to(logits.device), -torch.inf)
    tokens = choose(logits, batch.uniform(), sampling)
    forced = forced_tokens(decision, len(batch), logits.device)
    tokens = torch.where(forced >= 0, forced, tokens)
    stop = torch.zeros_like(tokens, dtype=torch.bool) if decision.stop is None else decision.stop.to(tokens.device)
    for reply, written, stopped in zip(batch.replies, (forced >= 0).tolist(), stop.tolist(), strict=True):
        if written and not stopped and reply.finish is None:
            reply.forced.append(len(reply.tokens))
    return torch.where(stop, -1, tokens)


def _write(
    batch: Batch, tokens: Int[Tensor, " batch"], ends: frozenset[int], counter: _Counter, on_token: OnToken | None
) -> None:
    """Append the tokens to the replies that still run, and end those that are done."""
    written = done = 0
    for reply, token in zip(batch.replies, tokens.tolist(), strict=True):
        if reply.finish is not None:
            continue
        if token < 0:
            reply.finish = "policy"
        else:
            reply.tokens.append(token)
            written += 1
            if on_token is not None:
                on_token(reply.prompt, reply.sample, token)
            if token in ends:
                reply.finish = "stop"
            elif len(reply.tokens) >= reply.limit:
                reply.finish = "length"
        done += reply.finish is not None
    counter.add(written, done)


def _trace(model: Decodable, reply: Reply) -> Trace:
    assert reply.finish is not None
    return make_trace(
        item=reply.prompt.id,
        sample=reply.sample,
        prompt=reply.prompt.content,
        prompt_token_ids=reply.rendered.token_ids,
        completion_token_ids=reply.tokens,
        tokenizer=model.tokenizer,
        marks=model.marks,
        generation_prompt_start=reply.rendered.generation_prompt_start,
        finish_reason=reply.finish,
        forced=reply.forced,
        gold=reply.prompt.gold,
        group=reply.prompt.group,
    )
