"""What a training's result follows from, as one hash: two jobs of one identity come to the same.

``job_identity`` needs no loaded model and no read data: files are told by their bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.adapters.files.whole import write_text
from lora_exp.config import Config, DataConfig, ModelConfig, conf_folder, resolve_alpha
from lora_exp.credentials import redacted
from lora_exp.data import kind_of
from lora_exp.data.sources import ELSEWHERE
from lora_exp.determining import settings
from lora_exp.errors import UserError
from lora_exp.inputs import weights_of
from lora_exp.job import IDENTITY_FILE, IDENTITY_TAG, Job
from lora_exp.listed import KNOBS
from lora_exp.machine import launch
from lora_exp.machine.cache import known_sha256
from lora_exp.machine.packaged import locate_packaged
from lora_exp.models.source import Source, folder_of
from lora_exp.plugins import source_files

if TYPE_CHECKING:
    from lora_exp.adapters.numerics.precision import Answers
    from lora_exp.machine.place import Place
    from lora_exp.tracking.mlflow import Run

_BY_CONTENT = ("model.label", "plugins", *(f"data.{name}" for name in ELSEWHERE))  # are told by what they name
_OF_A_BASE = (
    "*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "*.py",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_COMPUTING = (
    "adapters", "backends", "data", "models", "packing", "training", "run.py", "keeping.py", "written.py",
    "forgetting.py", "forgotten.py",
)  # fmt: skip
_LIBRARIES = ("torch", "transformers")
_OF_ANOTHER_LOOP = ("accelerate", "trl")


@dataclass(frozen=True)
class JobIdentity:
    """``parts``, in JSON's types, are what it follows from."""

    parts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """The hash, 32 of 0-9 and a-f."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:32]

    def write(self, folder: Path, result: Mapping[str, Any] | None = None) -> Path:
        """Into a job's folder, with what came of it once that is known. Returns the file."""
        found = {"identity": self.digest, "parts": self.parts} | ({"result": result} if result else {})
        write_text(folder / IDENTITY_FILE, redacted(json.dumps(found, indent=2, sort_keys=True)) + "\n")
        return folder / IDENTITY_FILE


def job_identity(config: Config, place: Place, answers: Answers, processes: int = 1) -> JobIdentity | None:
    """That of a training on ``place`` of a machine with ``answers``; None where the base is not here yet.

    Raises UserError for data that cannot be had, and OSError for files that cannot be read.
    """
    base = _base(config.model)
    if base is None:
        return None
    parts = {
        "settings": _settings(config),
        "base": base,
        "data": _data(kind_of(config.data)),
        "files": {key: known_sha256(file) for key, file in _named_files(config)},
        "plugins": {name: _hashes(source_files(name)) for name in config.plugins},
        "versions": _versions(config),
        "products": _products(place, answers, config.quantization.name != "none"),
        "processes": processes,
    }
    return JobIdentity(json.loads(json.dumps(parts)))


def identity_here(config: Config) -> JobIdentity | None:
    """The same on this machine, before anything is loaded."""
    from lora_exp.machine.place import resolve_device, resolve_place
    from lora_exp.machine.precision import take_precision

    precision = take_precision(config.machine, resolve_device(config.device))
    place = resolve_place(
        config.device, config.model.dtype, not config.adapter.is_added, config.quantization.name != "none"
    )
    launched = launch.current()
    return job_identity(config, place, precision.answers, 1 if launched is None else launched.size)


def told_identity(
    tracked: Run, job: Job, config: Config, place: Place, answers: Answers, processes: int
) -> JobIdentity | None:
    """``job_identity``, which tracking and the job's folder are told."""
    found = job_identity(config, place, answers, processes)
    if found is not None:
        tracked.log_tags({IDENTITY_TAG: found.digest})
        found.write(job.folder)
    return found


def _settings(config: Config) -> dict[str, Any]:
    """As short as they can be said: alpha as a number, and nothing that has no meaning here."""
    found = {key: value for key, value in settings(config).items() if not _is_below(key, _BY_CONTENT)}
    if not config.adapter.is_added:
        return {key: value for key, value in found.items() if key not in KNOBS}
    return found | {"alpha": resolve_alpha(config.alpha, config.rank)}


def _is_below(key: str, names: tuple[str, ...]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in names)


def _base(section: ModelConfig) -> dict[str, str] | None:
    """The SHA-256 of its files: weights, facts, tokenizer, code; of a packaged one that of the package's file, which
    is compared when it is unpacked, as what was unpacked is at each use."""
    if not section.path and section.packaged and locate_packaged(section.packaged):
        return {"packaged": section.packaged.sha256}
    named = str(Path(section.path).expanduser()) if section.path else section.name or ""
    folder = folder_of(Source(named, section.revision, section.trust_remote_code))
    if folder is None:
        return None
    files = sorted({file for pattern in _OF_A_BASE for file in folder.glob(pattern) if file.is_file()})
    return {file.name: known_sha256(file) for file in files} or None


def _data(section: DataConfig) -> dict[str, Any]:
    """What its sources hold. A kind of a user's own may find its data otherwise: then the kind's source must tell."""
    found: dict[str, Any] = {}
    for key in ("path", "validation_path", "test_path"):
        if (named := getattr(section, key)) is not None:
            found[key] = _weighed(named)
    if section.path is None and section.name:
        found["hub"] = _of_hub(section)
    elif section.path is None and section.packaged:
        found["packaged"] = section.packaged.sha256
    return found


def _weighed(named: object) -> object:
    try:
        return [[_content(Path(path).expanduser()), weight] for path, weight in weights_of(named).items()]
    except UserError:  # what a kind of a user's own may take
        return repr(named)


def _of_hub(section: DataConfig) -> object:
    if not getattr(section, "suffixes", ()):
        return [section.name, section.revision]
    from lora_exp.data.hub import hub_source

    splits = (section.split or "train", section.validation_split, section.test_split)
    return [hub_source(section, split).identity() for split in splits if split]


def _content(path: Path) -> object:
    """A file's hash and what it is read as; of a folder each file's, by its path inside."""
    if not path.exists():
        return str(path)
    if not path.is_dir():
        return [path.suffix.lower(), known_sha256(path)]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {file.relative_to(path).as_posix(): known_sha256(file) for file in files}


def _hashes(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: known_sha256(file) for name, file in files.items()}


def _named_files(config: Config) -> Iterator[tuple[str, Path]]:
    """The files that other values name: a template, a method's own config."""
    for key, value in settings(config).items():
        if isinstance(value, str) and not _is_below(key, (*_BY_CONTENT, "model.path", "model.name")):
            file = Path(value).expanduser() if "." in value or "/" in value else None
            if file is not None and file.is_file():
                yield key, file


def _versions(config: Config) -> dict[str, str | None]:
    """Of this package and of the libraries that compute; of a checkout, whose version stays, also its source."""
    names = [*_LIBRARIES, *(_OF_ANOTHER_LOOP if config.trainer != "native" else ())]
    if config.backend != "native" or config.trainer != "native":
        names.append("peft")
    if config.quantization.name != "none" or "8bit" in config.optimizer.name:
        names.append("bitsandbytes")
    found: dict[str, str | None] = {name: _version(name) for name in ("lora_exp", *names)}
    return found | ({} if conf_folder().parent == Path(__file__).resolve().parent else {"source": _own_source()})


def _version(name: str) -> str | None:
    if name == "lora_exp":
        from lora_exp import __version__

        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _own_source() -> str:
    """The hash of those files of a checkout that decide what is computed."""
    package = Path(__file__).parent
    files = [file for room in _COMPUTING for file in sorted((package / room).rglob("*.py")) or [package / room]]
    lines = [f"{known_sha256(file)} {file.relative_to(package).as_posix()}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _products(place: Place, answers: Answers, is_quantised: bool) -> dict[str, str]:
    """How is multiplied: what changes bits, and no more of a machine than that."""
    found: dict[str, str] = {"device": place.device.type, "dtype": str(place.dtype), "autocast": str(place.autocast)}
    if place.device.type != "cpu":
        return found
    is_short = any(dtype is not None and dtype.itemsize == 2 for dtype in (place.dtype, place.autocast))
    return {**found, "float32": answers.float32} | ({"bf16": answers.bf16} if is_short or is_quantised else {})
