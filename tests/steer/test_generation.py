"""Generation on every family against forwards of whole sequences without a cache, and its promises."""

from __future__ import annotations

import inspect
import itertools
import logging

import numpy as np
import pytest
import torch

import steer
from steer.generation import BATCH, as_prompts, generate, generate_shard
from steer.policy import Decision
from steer.prompts import Prompt, RawText
from steer.sampling import Sampling
from steer.shards import cut
from steer.trace import trace_line
from steer.tracefile import parse_line
from steer.traces import Traces
from tests.steer.made import refused
from tests.tiny import FAMILIES, WORDS

GREEDY = Sampling(0.0, max_new_tokens=24)


def question(number: int, length: int) -> str:
    drawn = np.random.default_rng(number).choice(WORDS[11:], length)
    return " ".join(drawn)


def items(count: int, longest: int = 40) -> list[Prompt]:
    return [Prompt(f"{i:03d}", question(i, 1 + (7 * i) % longest)) for i in range(count)]


class Listener:
    """A policy that changes nothing and keeps the logits it sees."""

    name = "listener"

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int, int], torch.Tensor] = {}

    def __call__(self, rows, logits):
        for row, key in enumerate(zip(rows.items, rows.samples, rows.generated.tolist(), strict=True)):
            self.seen.setdefault(key, logits[row].clone())
        return Decision()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_with_a_cache_agree_with_whole_sequences_without(family, dtype, tiny):
    """Left padding, refilled rows, sliding windows (32) that prompt and reply exceed, all against one plain forward."""
    hf, tokenizer = tiny(family, dtype=dtype)
    if "num_experts_per_tok" in FAMILIES[family]:
        hf.set_experts_implementation("eager")  # The grouped kernels know no fp64.
    model = steer.wrap(hf, tokenizer)
    allowed = 1e-5 if dtype == torch.float32 else 1e-10
    if model.anatomy.linear_layers:  # A prompt is read in chunks and a token by recurrence, both in fp32 inside.
        allowed = 1e-4 if dtype == torch.float32 else 1e-5
    elif family in ("deepseek_v3", "glm4_moe") and dtype == torch.float64:  # Their routers compute in fp32.
        allowed = 1e-6
    listener = Listener()
    traces = generate(model, items(6), sampling=Sampling(0.0, max_new_tokens=16), policy=listener, batch_size=2)
    assert max(len(trace.tokens) for trace in traces) > 36
    for trace in traces:
        with torch.no_grad():
            plain = model.hf(input_ids=torch.tensor([trace.tokens]), use_cache=False).logits[
                0, trace.prompt_length - 1 :
            ]
        seen = torch.stack([listener.seen[trace.item, 0, step] for step in range(len(trace.completion_token_ids))])
        scale = max(1.0, float(plain.abs().max()))
        assert (seen - plain[:-1]).abs().max() <= allowed * scale
        if dtype == torch.float64:
            assert plain[:-1].argmax(-1).tolist() == list(trace.completion_token_ids)


@pytest.fixture(scope="module")
def model(tiny):
    return steer.wrap(*tiny("qwen3", dtype=torch.float64))


def test_what_is_sampled_does_not_depend_on_the_batch(model):
    options = {"sampling": Sampling(1.3, 0.95, 0, 12), "samples": 2, "seed": 5}
    whole = generate(model, items(6), **options, batch_size=64)
    for size in (1, 7):
        assert list(generate(model, items(6), **options, batch_size=size)) == list(whole)
    alone = generate(model, items(6)[3:4], **options)
    assert list(alone) == [trace for trace in whole if trace.item == "003"]


def test_seeds_samples_and_items_differ(model):
    options = {"sampling": Sampling(1.3, max_new_tokens=12)}
    same = [Prompt("a", question(1, 5)), Prompt("b", question(1, 5))]
    first = generate(model, same, samples=2, seed=0, **options)
    assert len({trace.completion_token_ids for trace in first}) == 4
    assert [trace.id for trace in first] == ["a/0", "a/1", "b/0", "b/1"]
    assert not {t.completion_token_ids for t in generate(model, same, samples=2, seed=1, **options)} & {
        t.completion_token_ids for t in first
    }


def test_shards_in_any_order_give_the_bytes_of_one_run(model):
    """What several processes or a resumed run do: each shard alone, in whatever order, joined in shard order."""
    prompts = items(70, 6)
    options = {"sampling": Sampling(1.0, max_new_tokens=4), "seed": 3}
    whole = generate(model, list(reversed(prompts)), **options)
    by_id = {prompt.id: prompt for prompt in prompts}
    shards = cut(by_id)
    assert len(shards) == 2
    parts = {shard.index: generate_shard(model, [by_id[i] for i in shard.ids], **options) for shard in reversed(shards)}
    assert Traces([*parts[0], *parts[1]]).lines() == whole.lines()
    assert [trace.item for trace in whole] == sorted(by_id)


def test_why_a_reply_ends(model):
    prompts = items(12)
    replies = {trace.item: trace for trace in generate(model, prompts, sampling=Sampling(1.5, max_new_tokens=60))}
    stopped = [trace for trace in replies.values() if trace.finish_reason == "stop"]
    assert stopped and all(
        trace.completion_token_ids[-1] == 2 and 2 not in trace.completion_token_ids[:-1] for trace in stopped
    )
    assert all("<eos>" not in trace.text for trace in stopped)
    full = [trace for trace in replies.values() if trace.finish_reason == "length"]
    assert full and all(len(trace.completion_token_ids) == 60 and 2 not in trace.completion_token_ids for trace in full)


def test_any_of_several_end_tokens(model, monkeypatch):
    before = generate(model, items(6), sampling=Sampling(1.5, max_new_tokens=30))
    often = max(range(len(WORDS)), key=lambda token: sum(token in trace.completion_token_ids for trace in before))
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", [2, often])
    after = generate(model, items(6), sampling=Sampling(1.5, max_new_tokens=30))
    for long, short in zip(before, after, strict=True):
        at = [place for place, token in enumerate(long.completion_token_ids) if token in (2, often)]
        expected = long.completion_token_ids[: at[0] + 1] if at else long.completion_token_ids
        assert short.completion_token_ids == expected and short.finish_reason == ("stop" if at else "length")


def test_room_left_by_the_prompt(model, caplog):
    prompt = Prompt("long", question(0, 250))  # The tiny models read 256 tokens.
    with caplog.at_level(logging.WARNING):
        trace = generate(model, [prompt], sampling=Sampling(0.0, max_new_tokens=50))[0]
    assert len(trace.completion_token_ids) <= 6 and "as few as 6 new tokens" in caplog.text
    refused(lambda: generate(model, [Prompt("too long", question(0, 256))]), "'too long'".strip("'"), "256", "Shorten")


def test_a_prompt_is_read_once_for_all_its_samples(model):
    read: list[int] = []
    handle = model.backbone.register_forward_pre_hook(
        lambda _m, _a, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    traces = generate(model, items(2), samples=5, sampling=Sampling(1.0, max_new_tokens=3))
    handle.remove()
    assert len(traces) == 10 and read[0] == 2 * max(trace.prompt_length for trace in traces) and read[1] == 10


def test_only_the_last_positions_logits_are_computed(model):
    shapes: list[tuple[int, ...]] = []
    handle = model.lm_head.register_forward_hook(lambda _m, _a, out: shapes.append(tuple(out.shape)))
    generate(model, items(3), sampling=GREEDY)
    handle.remove()
    assert shapes and {shape[1] for shape in shapes} == {1}


def test_a_model_that_cannot_keep_the_last_logits_alone(tiny):
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)

    class Older(type(hf)):
        def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )

    expected = list(generate(steer.wrap(hf, tokenizer), items(4), sampling=GREEDY))
    hf.__class__ = Older
    assert list(generate(steer.wrap(hf, tokenizer, self_check=False), items(4), sampling=GREEDY)) == expected


def test_a_tokenizer_without_padding(tiny):
    hf, tokenizer = tiny("llama", dtype=torch.float64)
    expected = list(generate(steer.wrap(hf, tokenizer), items(5), sampling=GREEDY))
    tokenizer.pad_token = None
    hf.generation_config.pad_token_id = hf.config.pad_token_id = None
    assert list(generate(steer.wrap(hf, tokenizer), items(5), sampling=GREEDY)) == expected


def test_long_prompts_are_read_in_parts(model, monkeypatch):
    expected = list(generate(model, items(9), sampling=GREEDY))
    monkeypatch.setattr("steer.generation.PREFILL", 50)
    assert list(generate(model, items(9), sampling=GREEDY)) == expected


def test_chat_and_the_thinking_switch(model):
    chat = [{"role": "system", "content": "think"}, {"role": "user", "content": "a = 3"}]
    on, off = (generate(model, [chat], sampling=GREEDY, thinking=thinking)[0] for thinking in (None, False))
    assert on.prompt == chat and on.item == "00000"
    assert off.thinking_span == (off.prompt_length - 2, off.prompt_length) and off.closed
    assert off.generation_prompt_start == off.prompt_length - 4 == on.generation_prompt_start
    refused(lambda: generate(model, [RawText("a")], thinking=False), "raw text")
    refused(lambda: generate(model, [Prompt("x", "a")], thinking=False), "raw text")


def test_a_text_is_what_a_user_says_where_there_is_a_template(model):
    chat = [{"role": "user", "content": "a = 3"}]
    spoken, messages, raw = (
        generate(model, [given], sampling=GREEDY)[0] for given in ("a = 3", chat, RawText("a = 3"))
    )
    assert spoken == messages and spoken.prompt == chat
    assert raw.prompt_token_ids == tuple(model.tokenizer("a = 3")["input_ids"]) != spoken.prompt_token_ids
    again = parse_line(trace_line(raw)).prompt
    assert generate(model, [again], sampling=GREEDY)[0].prompt_token_ids == raw.prompt_token_ids
    template, model.tokenizer.chat_template = model.tokenizer.chat_template, None
    try:
        assert generate(model, ["a = 3"], sampling=GREEDY)[0].prompt == "a = 3"
    finally:
        model.tokenizer.chat_template = template


def test_the_order_of_very_many_prompts_stays():
    named = as_prompts([RawText("a")] * 100_002)
    assert sorted(prompt.id for prompt in named) == [prompt.id for prompt in named]


def test_streaming_and_progress(model):
    written, told = [], []
    traces = generate(
        model, items(5), samples=2, batch_size=4, sampling=Sampling(1.0, max_new_tokens=6),
        on_token=lambda prompt, sample, token: written.append((prompt.id, sample, token)), progress=told.append,
    )  # fmt: skip
    for trace in traces:
        assert [t for item, sample, t in written if (item, sample) == (trace.item, trace.sample)] == list(
            trace.completion_token_ids
        )
    assert (told[-1].done, told[-1].total, told[-1].tokens) == (10, 10, len(written))
    assert all(a.done <= b.done and a.tokens <= b.tokens for a, b in itertools.pairwise(told))
    assert told[-1].tokens_per_second > 0


def test_run_yaml_says_what_the_traces_depend_on(model):
    traces = generate(model, ["a"], sampling=GREEDY, samples=2, seed=4)
    assert {name: traces.meta[name] for name in ("samples", "seed", "batch_size", "policy", "thinking")} == {
        "samples": 2, "seed": 4, "batch_size": BATCH, "policy": None, "thinking": None,
    }  # fmt: skip
    assert traces.meta["sampling"]["temperature"] == 0.0 and traces.marks == model.marks
    assert traces.require_tokenizer(model.identity.tokenizer_id) is traces and traces.tokenizer is model.tokenizer
    assert traces.meta["model"] == model.identity.to_dict()


def test_the_models_own_sampling_is_the_default(model, monkeypatch):
    monkeypatch.setattr(model.hf.generation_config, "max_new_tokens", 9)
    assert (
        generate(model, ["a"], seed=0)[0] == generate(model, ["a"], seed=1, sampling=Sampling(0.0, max_new_tokens=9))[0]
    )
    monkeypatch.setattr(model.hf.generation_config, "do_sample", True)
    monkeypatch.setattr(model.hf.generation_config, "max_new_tokens", 5)
    assert len(generate(model, ["a"])[0].completion_token_ids) <= 5


def test_nothing_is_left_on_the_model(model):
    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]

    before = hooks()
    generate(model, items(3), sampling=GREEDY)
    with pytest.raises(ZeroDivisionError):
        generate(model, items(3), sampling=GREEDY, on_token=lambda *_: 1 // 0)
    assert hooks() == before and sum(before) == 0


@pytest.mark.parametrize(
    ("prompts", "word"), [([], "no prompts"), ([[]], "00000"), ([3], "00000"), (["a", ["b"]], "00001")]
)
def test_prompts_that_are_none(prompts, word):
    unchecked = inspect.unwrap(as_prompts)  # In tests the signature would refuse them first.
    refused(lambda: unchecked(prompts), word)


def test_options_that_are_none(model):
    refused(lambda: as_prompts("one text"), "single text")
    refused(lambda: generate(model, [Prompt("a", "x"), Prompt("a", "y")]), "'a' occurs twice")
    refused(lambda: as_prompts([Prompt("00001", "x"), "y"]), "'00001' occurs twice")
    refused(lambda: generate(model, ["a"], samples=0), "samples is 0")
    refused(lambda: generate(model, ["a"], batch_size=0), "batch_size is 0")
    refused(lambda: generate(steer.wrap(model.hf), ["a"]), "no tokenizer")
