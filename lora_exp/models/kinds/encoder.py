"""Encoders of transformers (BERT, RoBERTa, MiniLM, DistilBERT, …) with a new head for classes."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_exp.models.kind import model_kind
from lora_exp.models.kinds.causal_lm import CausalLM

_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
)


@model_kind("encoder")
class Encoder(CausalLM):
    """Loaded, quantised and planned as causal language models are, which get such a head as well."""

    def convert(self, packaged: Path, folder: Path) -> None:
        """A packaged folder in hub layout is copied: its weights, config and tokenizer."""
        for pattern in _FILES:
            for file in packaged.glob(pattern):
                shutil.copyfile(file, folder / file.name)
