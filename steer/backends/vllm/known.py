"""What is known of a model before an engine has its weights: headers, tokenizer, and what its checkpoint asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.anatomy.headers import read_headers
from steer.anatomy.packed import shapes_of
from steer.anatomy.record import read_record
from steer.anatomy.resolve import Anatomy, resolve
from steer.identity import ModelIdentity, shape_id, tokenizer_id
from steer.loading import tokenizer_of
from steer.marks import Marks
from steer.sources import Source, locate
from steer.weights import weights_id


@dataclass(frozen=True, eq=False)
class Known:
    """A model without its weights; the attributes are those of `SteerableModel`.

    Attributes:
        source: name and folder.
        anatomy, tokenizer, marks, identity: as there.
        generation_config: as transformers reads it.
    """

    source: Source
    anatomy: Anatomy
    tokenizer: Any
    marks: Marks
    identity: ModelIdentity
    generation_config: Any

    @property
    def name(self) -> str:
        """How it was named."""
        return self.source.name

    @classmethod
    def of(cls, model: str | Path, record: str | Path | None = None) -> Known:
        """Read a model's headers and tokenizer.

        Args:
            model: hub id, folder, `file.gguf` or `organism:NAME`.
            record: of the anatomy, of the user's own.

        Raises:
            SteerError: there is no such model, its anatomy is not known, or it has no tokenizer.
        """
        source = locate(str(model))
        headers = read_headers(source.folder)
        own = None if record is None else read_record(record)
        anatomy = resolve(headers.config, shapes_of(headers.config, headers.shapes), own)
        tokenizer = tokenizer_of(source.name)
        weights = weights_id(source.folder, headers.files)
        numbers = shape_id(anatomy.numbers())
        identity = ModelIdentity(source.name, anatomy.record.family, numbers, weights, tokenizer_id(tokenizer))
        marks = Marks.from_tokenizer(tokenizer)
        return cls(source, anatomy, tokenizer, marks, identity, _generation_config(source.folder))


def _generation_config(folder: Path) -> Any:
    """Read what the checkpoint asks for, as transformers would."""
    from transformers import AutoConfig, GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return GenerationConfig.from_model_config(config)
