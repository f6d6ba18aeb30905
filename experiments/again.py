"""Questions of a run asked again, under the run's own options: of a steered model, more often, or asked differently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.evaluate import graded
from experiments.tasks.registry import named
from experiments.tasks.task import Task
from experiments.think_policies import parse_policy
from steer.errors import SteerError
from steer.generation import BATCH, Prompt, Sampling
from steer.policy import Policy
from steer.prompts import Content, RawText
from steer.trace import Trace
from steer.traces import Traces

if TYPE_CHECKING:
    from steer.model import SteerableModel


@dataclass(frozen=True)
class Again:
    """How a run was asked. The random streams are the run's, so that models are compared at common random numbers.

    Attributes:
        prompts: item -> its prompt.
        task: grades the replies.
        sampling, seed, samples, policy, thinking, batch_size: of the run.
    """

    prompts: Mapping[str, Prompt]
    task: Task
    sampling: Sampling
    seed: int
    samples: int
    policy: Policy | None
    thinking: bool | None
    batch_size: int

    @classmethod
    def of(cls, model: SteerableModel, run: Traces, task: Task | str | None = None) -> Again:
        """Read a run's options.

        Args:
            model: that the run was made with; reads the policy.
            run: with a gold answer to every question.
            task: whose grader reads the replies; None: the run's.

        Raises:
            SteerError: the run does not say how it was made, or lacks a gold answer.
        """
        told = run.meta.get("task")
        chosen = task or (told.get("name") if isinstance(told, dict) else None)
        if chosen is None or "sampling" not in run.meta:
            raise SteerError(
                "the run does not say with which task and sampling it was made",
                "a run of `steer evaluate`",
                "Make it with steer evaluate; --task names the grader",
            )
        ungolden = next((trace.id for trace in run if trace.gold is None), None)
        if ungolden is not None:
            raise SteerError(
                f"the trace {ungolden} has no gold answer, so replies to its question cannot be graded",
                "a gold answer to every question",
                "Make the run with steer evaluate, or leave --choose out",
            )
        policy = run.meta.get("policy")
        return cls(
            {trace.item: Prompt(trace.item, trace.prompt, trace.group, trace.gold) for trace in reversed(list(run))},
            named(chosen) if isinstance(chosen, str) else chosen,
            Sampling(**run.meta["sampling"]),
            int(run.meta.get("seed", 0)),
            max(trace.sample for trace in run) + 1,
            None if policy is None else parse_policy(str(policy), model.marks, model.tokenizer),
            run.meta.get("thinking"),
            int(run.meta.get("batch_size", BATCH)),
        )

    def ask(
        self,
        model: SteerableModel,
        items: Iterable[str],
        *,
        samples: int | None = None,
        policy: Policy | None = None,
        before: str | None = None,
    ) -> list[Trace]:
        """Ask again and grade.

        Args:
            model: answers; under its changes in force.
            items: the questions.
            samples: replies to each; None: as many as the run has.
            policy: instead of the run's.
            before: a text put in front of every question, on a line of its own.
        """
        asked = [self.prompts[item] for item in sorted(items)]
        if before is not None:
            asked = [Prompt(each.id, behind(before, each.content), each.group, each.gold) for each in asked]
        traces = model.generate(
            asked,
            sampling=self.sampling,
            samples=samples or self.samples,
            seed=self.seed,
            policy=policy or self.policy,
            thinking=self.thinking,
            batch_size=self.batch_size,
        )
        return [graded(trace, model, self.task) for trace in traces]


def answered(
    model: SteerableModel,
    task: Task | str,
    *,
    limit: int | None = None,
    samples: int = 1,
    seed: int = 0,
    sampling: Sampling | None = None,
    batch_size: int = BATCH,
) -> Traces:
    """Ask a task's questions and grade the replies, without a run folder; arguments as `experiments.evaluate`."""
    chosen = named(task) if isinstance(task, str) else task
    chat = model.tokenizer.chat_template is not None
    prompts = [Prompt(item.id, item.content(chat), item.group, item.gold) for item in chosen.items(limit)]
    found = model.generate(prompts, sampling=sampling, samples=samples, seed=seed, batch_size=batch_size)
    told = {"task": {"name": chosen.name, **chosen.options()}}
    return Traces((graded(trace, model, chosen) for trace in found), found.meta | told, tokenizer=model.tokenizer)


def behind(text: str, content: Content) -> Content:
    """Return a prompt with a text in front of its last message of the user, or of all of a raw prompt.

    Raises:
        SteerError: chat messages none of which the user speaks in plain text.
    """
    if isinstance(content, str):
        return RawText(f"{text}\n{content}")
    messages: list[dict[str, Any]] = [dict(message) for message in content]
    spoken = [place for place, message in enumerate(messages) if message.get("role") == "user" and isinstance(message.get("content"), str)]  # fmt: skip
    if not spoken:
        raise SteerError("a prompt has no message of the user in plain text to put a text in front of", "one")
    messages[spoken[-1]]["content"] = f"{text}\n{messages[spoken[-1]]['content']}"
    return messages
