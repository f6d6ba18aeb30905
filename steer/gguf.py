"""GGUF files: materialised once into an ordinary Hugging Face folder in the user's cache.

`transformers` turns the quantised blocks back into float32. What it gets wrong or leaves behind is put right here: the
special tokens come from the file's own metadata, and the note "quantised by gguf", which is no longer true, is replaced
by `dequantised_from` in config.json. Nothing is believed that was not checked: text must survive the tokenizer, words
must not fall apart into characters, and the model must find an English paragraph far likelier than chance.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import shutil
from pathlib import Path
from typing import Any

from steer.errors import SteerError
from steer.files import MODE
from steer.weights import cache_folder, file_hash

ARCHITECTURES = ("llama",)
"""Seen with transformers 5.17: Gemma 3's tokenizer is read without its merges, so English falls into characters and
nothing is said. Hence an architecture is listed only after its tokenizer and its loss were looked at."""
VERSION = 1
"""Of this conversion; part of the folder's name, so that a cache made by an older one is not used."""
PARAGRAPH = (
    "The harbour wakes before the town does. Fishing boats come back in the grey light, gulls follow them, and the "
    "first buyers stand on the quay with their hands around cups of hot coffee. By seven o'clock the market is open, "
    "and by nine most of the fish is sold. In winter the days are short and the sea is rough, so the boats stay in, "
    "and people mend their nets and talk about the weather."
)
"""Written for this check; a language model of any size knows every turn of it."""
TEXTS = (
    PARAGRAPH,
    "She paid $3.50 for 12 eggs in 2024; that's 29 cents each.\n\nTwo   spaces\tand a tab — café, naïve, 日本語.",
)
LOSS_SHARE = 0.5
"""The loss per token must be below this share of log(vocabulary), the loss of a model that knows nothing."""
TOKENS_PER_CHARACTER = 0.5
"""English has about a quarter of a token per character; a tokenizer without merges has one."""


def materialise(path: Path) -> Path:
    """Return the folder of a GGUF file's model: config.json, tokenizer and float32 safetensors.

    The folder is made once per content of the file and lies in the user's cache; config.json says what it was
    dequantised from.

    Args:
        path: a `.gguf` file of an architecture in `ARCHITECTURES`.

    Raises:
        SteerError: the file is missing, damaged or of another architecture, the `gguf` package is missing, or what was
            read fails one of the checks above.
        OSError: the cache cannot be written.
    """
    if not path.is_file():
        raise SteerError(f"there is no file {path}", "a GGUF file", "Check the path")
    _refuse_unreadable(path)
    sha256 = file_hash(path)
    folder = cache_folder() / "gguf" / f"{path.stem}-{sha256[:16]}-{VERSION}"
    if folder.is_dir():
        return folder
    metadata = _metadata(path)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _convert(path, metadata, sha256, partial)
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _refuse_unreadable(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise SteerError(f"{path} begins with {magic!r}", "a GGUF file, which begins with b'GGUF'", "Download it again")
    if importlib.util.find_spec("gguf") is None:
        raise SteerError("the package `gguf` is not installed", "", "Run `pip install 'reasoning-steer[gguf]'`")


def _metadata(path: Path) -> dict[str, Any]:
    """Read the small fields of the file's header.

    Raises:
        SteerError: the header is damaged, or names an architecture that is not supported.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(path)).fields
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise SteerError(f"{path} is no whole GGUF file ({error})", "a complete file", "Download it again") from error
    wanted = [name for name in fields if name.startswith("general.") or name.endswith("_token_id")]
    metadata = {name: fields[name].contents() for name in wanted}
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise SteerError(
            f"{path.name} holds a model of architecture {architecture!r}",
            f"{', '.join(ARCHITECTURES)}, the one whose tokenizer is known to come out of GGUF whole",
            "Use the model's safetensors checkpoint",
        )
    return metadata


def _convert(path: Path, metadata: dict[str, Any], sha256: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    auto: Any = AutoModelForCausalLM
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, **where)
    tokenizer.clean_up_tokenization_spaces = False  # Else decoding eats spaces before punctuation.
    tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False  # What is saved.
    _name_special_tokens(tokenizer, metadata)
    _check_tokenizer(tokenizer, path)
    model = auto.from_pretrained(path.parent, dtype=torch.float32, **where)
    _check_loss(model, tokenizer, path)
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    config.dequantised_from = {"file": path.name, "sha256": sha256, "format": "gguf"}
    with torch.device("meta"):
        plain = auto.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)  # The same tensors in a model that is not "quantised".
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(MODE)


def _name_special_tokens(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Take the special tokens from the file; a file without a padding token pads with its end token."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    found = {attribute: metadata.get(f"tokenizer.ggml.{name}_token_id") for name, attribute in names.items()}
    if found["pad_token"] is None:
        found["pad_token"] = found["eos_token"]
    for attribute, number in found.items():
        if number is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(number)))


def _check_tokenizer(tokenizer: Any, path: Path) -> None:
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back.strip() != text:
            place = next((n for n, pair in enumerate(zip(back.strip(), text, strict=False)) if pair[0] != pair[1]), 0)
            raise SteerError(
                f"the tokenizer read from {path.name} turns {text[place : place + 20]!r} into {back.strip()[place : place + 20]!r}",
                "the same text after encoding and decoding",
                "Use the model's safetensors checkpoint",
            )
    count = len(tokenizer(PARAGRAPH, add_special_tokens=False).input_ids)
    if count > TOKENS_PER_CHARACTER * len(PARAGRAPH):
        raise SteerError(
            f"the tokenizer read from {path.name} splits {len(PARAGRAPH)} characters of English into {count} tokens",
            f"at most {TOKENS_PER_CHARACTER * len(PARAGRAPH):.0f}; its merges were lost",
            "Use the model's safetensors checkpoint",
        )


def _check_loss(model: Any, tokenizer: Any, path: Path) -> None:
    import torch

    ids = torch.tensor([tokenizer(PARAGRAPH, add_special_tokens=False).input_ids])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    chance = math.log(model.config.vocab_size)
    if not loss < LOSS_SHARE * chance:
        raise SteerError(
            f"the model read from {path.name} has a loss of {loss:.2f} per token on plain English",
            f"far below {chance:.2f}, the loss of guessing",
            "Use the model's safetensors checkpoint",
        )


def _publish(partial: Path, folder: Path) -> None:
    """Give the finished folder its name; another process that was faster is right too."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
