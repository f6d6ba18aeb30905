"""Where a model comes from: a name becomes a folder on disk, without any weight being read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.errors import SteerError

BUILTIN = Path(__file__).parent / "builtin"
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.yaml")


@dataclass(frozen=True)
class Source:
    """A model's folder.

    Attributes:
        name: as the user wrote it.
        folder: config, tokenizer and weights.
        organism: whether it is one of ours.
    """

    name: str
    folder: Path
    organism: bool = False

    @property
    def card(self) -> dict[str, Any] | None:
        """The organism's card.yaml; None for every other model."""
        path = self.folder / "card.yaml"
        if not self.organism or not path.is_file():
            return None
        import yaml

        card: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return card


def organisms() -> tuple[str, ...]:
    """Names of the bundled organisms."""
    return tuple(sorted(path.parent.name for path in BUILTIN.glob("*/config.json")))


def locate(name: str) -> Source:
    """Find the folder of a model, downloading from the hub only what is missing and allowed (HF_HUB_OFFLINE).

    Args:
        name: `organism:NAME`, a folder, a `.gguf` file, or a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.

    Raises:
        SteerError: an unknown organism, a missing folder or file, a hub id that does not exist or cannot be reached.
    """
    if name.startswith("organism:"):
        wanted = name.removeprefix("organism:")
        if wanted not in organisms():
            raise SteerError(
                f"there is no organism {wanted!r}", f"one of {', '.join(organisms()) or 'none in this installation'}"
            )
        return Source(name, BUILTIN / wanted, organism=True)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        from steer.gguf import materialise

        return Source(name, Path(materialise(path)))
    if path.is_dir():
        return Source(name, path)
    if path.exists() or name.startswith((".", "/", "~", os.sep)) or name.count("/") != 1 or not all(name.split("/")):
        found = "is a file" if path.is_file() else "is neither a folder nor a hub id"
        raise SteerError(
            f"{name!r} {found}",
            "a model folder, a .gguf file, owner/name on the hub, or organism:NAME",
            "Check the path",
        )
    return Source(name, _from_hub(name))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except HFValidationError as error:
        raise SteerError(
            f"{name!r} is no valid hub id", "owner/name, a folder, or organism:NAME", "Check the spelling or the path"
        ) from error
    except GatedRepoError as error:
        raise SteerError(
            f"{name!r} is gated and this account has no access",
            "an account that accepted its terms",
            "Log in with `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise SteerError(
            f"the hub knows no model {name!r}, or it is private",
            "an existing owner/name",
            "Check the spelling, or log in",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        offline = (
            "HF_HUB_OFFLINE is set"
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
            else "the hub could not be reached"
        )
        raise SteerError(
            f"{name!r} is no folder here and not in the local Hugging Face cache, and {offline}",
            "a model on disk, or a connection to the hub",
            "Check the path; or download it once with a connection (`hf download`); or start with organism:chain, which needs none",
        ) from error
