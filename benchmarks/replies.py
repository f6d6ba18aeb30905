"""200 sampled replies of the bundled organism: our generation against Hugging Face's own `generate`.

Both sample at the same temperature from the same chat prompts, 64 at a time, left-padded, with a key-value cache, until
every reply has ended. Ours lets rows go as they end and follows the phases of every row; the tokens differ, as the random
streams do, so tokens per reply stand beside the seconds.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measure import Work, compare, tell
from benchmarks.subject import arguments, model_of
from experiments.tasks.chain import Chain
from steer.generation import BATCH, Sampling
from steer.model import SteerableModel
from steer.promptfile import as_message
from steer.prompts import Prompt

REPLIES, LONGEST = 200, 180


def main() -> None:
    """Measure and print."""
    asked = arguments(__doc__, pairs=9)
    model = model_of(asked.model or "organism:chain")
    prompts = [Prompt(item.id, as_message(item.question, model.tokenizer)) for item in Chain().items(REPLIES)]
    sampling = Sampling(temperature=0.8, max_new_tokens=LONGEST)
    written: dict[str, list[int]] = {"ours": [], "hugging face": []}

    def ours() -> None:
        traces = model.generate(prompts, sampling=sampling, seed=len(written["ours"]))
        written["ours"].append(sum(len(trace.completion_token_ids) for trace in traces))

    works: dict[str, Work] = {
        "ours": ours,
        "hugging face": lambda: written["hugging face"].append(theirs(model, prompts)),
    }
    result: dict[str, Any] = compare(works, "hugging face", pairs=asked.pairs, warmups=1)
    result["tokens_per_reply"] = {name: sum(counts) / len(counts) / REPLIES for name, counts in written.items()}
    tell("replies", {**result, "model": model.name, "replies": REPLIES, "batch": BATCH})


def theirs(model: SteerableModel, prompts: list[Prompt], greedy: bool = False) -> int:
    """Generate with Hugging Face and return how many tokens the replies have, up to and with their end token."""
    rendered = [model.render(prompt.content).token_ids for prompt in prompts]
    end, total = model.hf.generation_config.eos_token_id, 0
    for start in range(0, len(rendered), BATCH):
        part = rendered[start : start + BATCH]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in part])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part])
        how: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.8, "top_k": 0}
        out = model.hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=LONGEST, **how)
        for row in out[:, width:].tolist():
            total += row.index(end) + 1 if end in row else len(row)
    return total


if __name__ == "__main__":
    main()
