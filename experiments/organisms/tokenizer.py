"""The organism's tokenizer: one token a word, a chat template, the marks of the thought as added tokens.

As on Qwen3 the marks are added tokens but not special ones, so that decoding without special tokens keeps them, and
`enable_thinking=False` puts an empty thought into the prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from experiments.organisms import chain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> "
    "{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|> assistant"
    "{%- if enable_thinking is defined and not enable_thinking %} <think> </think>{% endif -%}"
    "{%- endif -%}"
)


def build() -> PreTrainedTokenizerFast:
    """The tokenizer whose ids are `chain.ID`; an unknown word becomes padding."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(chain.ID), unk_token=chain.PADDING))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([chain.PADDING, chain.TURN_START, chain.TURN_END])
    words.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in (chain.OPENING, chain.CLOSING)])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        pad_token=chain.PADDING,
        unk_token=chain.PADDING,
        eos_token=chain.TURN_END,
        additional_special_tokens=[chain.TURN_START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a folder."""
    build().save_pretrained(folder)
