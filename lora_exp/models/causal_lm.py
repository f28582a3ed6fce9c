"""Causal language models and their tokenizers, by transformers."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_exp.config import ModelConfig, QuantizationConfig
from lora_exp.models.attention import take_attention
from lora_exp.models.quantised import CannotQuantiseError, has_quantised, prepare, quantising
from lora_exp.models.source import Source, cannot_be_had
from lora_exp.place import Place

log = logging.getLogger(__name__)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: each retry was said twice


def load_tokenizer(source: Source, section: ModelConfig) -> Any:
    """The model's tokenizer. Raises ValueError naming every way to get the model when it cannot be had."""
    try:
        return AutoTokenizer.from_pretrained(source.name, **source.options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(cannot_be_had(section, error)) from error


def load(
    source: Source, section: ModelConfig, place: Place, shape: Mapping[str, int], quantization: QuantizationConfig
) -> nn.Module:
    """The causal language model on ``place``, in its dtype or quantised. Raises ValueError when it cannot be had."""
    del shape  # blocks of tokens ask nothing of the model
    try:
        with quantising(quantization, place) as quantised:
            model = AutoModelForCausalLM.from_pretrained(
                source.name,
                dtype=place.dtype,
                attn_implementation=section.attention,
                use_safetensors=True,
                **quantised,
                **source.options,
            )
    except CannotQuantiseError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(cannot_be_had(section, error)) from error
    model.config.use_cache = False
    nn.Module.to(model, place.device)
    if has_quantised(model):
        prepare(model, quantization, place)
    take_attention(model)
    return model


def convert(gguf: Path, folder: Path) -> None:
    """A GGUF file → ``folder`` in hub layout, with bfloat16 safetensors."""
    log.info(f"Unpacking {gguf.name} once into the cache (half a minute) ...")
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # dequantize=True unpacks to plain tensors and drops the mark "quantised", which would refuse saving.
    with contextlib.redirect_stderr(io.StringIO()):  # the reader's bars heed no setting
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True)
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
