"""Language models and their tokenizers, by transformers: causal ones, and classifiers of text."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_exp.config import ModelConfig, QuantizationConfig
from lora_exp.errors import UserError, is_bug
from lora_exp.machine.place import Place
from lora_exp.models.attention import take_attention
from lora_exp.models.heads import (
    auto_class,
    check_not_quantised,
    head_options,
    note_new_modules,
    unknown_to_transformers,
)
from lora_exp.models.positions import length_problem, trained_positions
from lora_exp.models.quantised import CannotQuantiseError, has_quantised, prepare, quantising
from lora_exp.models.source import Source, cannot_be_had

log = logging.getLogger(__name__)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: each retry was said twice


def load_tokenizer(source: Source, section: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError naming every way to get the model when it cannot be had."""
    try:
        return AutoTokenizer.from_pretrained(source.name, **source.options)
    except Exception as error:  # tokenizers raises no less for a damaged file
        raise _said(section, error) from error


def load(
    source: Source, section: ModelConfig, place: Place, shape: Mapping[str, Any], quantization: QuantizationConfig
) -> nn.Module:
    """The causal language model on ``place``, in its dtype or quantised; for data of classes with a head for them.

    Raises UserError when it cannot be had, or blocks of ``shape`` are too long for it.
    """
    try:
        facts = AutoConfig.from_pretrained(source.name, **source.options)
    except Exception as error:
        raise _said(section, error) from error
    _check_length(facts.to_dict(), shape, section)
    try:
        with quantising(quantization, place) as quantised:
            model: PreTrainedModel
            model, found = auto_class(shape).from_pretrained(
                source.name,
                dtype=place.dtype,
                use_safetensors=True,
                output_loading_info=True,
                **head_options(facts, shape),
                **attention_option(section),
                **quantised,
                **source.options,
            )
    except CannotQuantiseError:
        raise
    except Exception as error:
        if (unknown := unknown_to_transformers(section, shape, error)) and not is_bug(error):
            raise UserError(unknown) from error
        raise _said(section, error) from error
    _say_attention(model, section)
    if "class_names" in shape:
        note_new_modules(model, section, {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
        check_not_quantised(model)
    model.config.use_cache = False
    nn.Module.to(model, place.device)
    if has_quantised(model):
        prepare(model, quantization, place)
    take_attention(model)
    return model


def _said(section: ModelConfig, error: Exception) -> Exception:
    """What transformers, tokenizers or safetensors say of the model's files as a message; a bug of ours as it is."""
    return error if is_bug(error) else UserError(attention_problem(section, error) or cannot_be_had(section, error))


def attention_option(section: ModelConfig) -> dict[str, str]:
    """What ``from_pretrained`` and ``from_config`` are told; nothing lets them take the best that the model has."""
    return {} if section.attention == "auto" else {"attn_implementation": section.attention}


def attention_problem(section: ModelConfig, error: Exception) -> str | None:
    """A message for an error that is about the attention that was asked for; None if it is about something else."""
    if section.attention in ("auto", "eager") or not re.search(r"attention|attn_implementation", str(error)):
        return None
    reason = re.sub(r"\s+", " ", str(error))[:200]
    return (
        f"model.attention={section.attention} is not for {section.label or section.name} ({reason}): use "
        "model.attention=eager, which every model has, or auto, which takes sdpa where it is"
    )


def _say_attention(model: PreTrainedModel, section: ModelConfig) -> None:
    chosen = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if section.attention == "auto" and chosen not in (None, "sdpa"):
        log.info(f"model  {type(model).__name__} has no sdpa: model.attention={chosen} is used")


def _check_length(facts: dict[str, object], shape: Mapping[str, Any], section: ModelConfig) -> None:
    """Of whatever field of ``data`` says how long rows are."""
    field = next((name for name in ("block_size", "max_length") if name in shape), None)
    if field is None:
        return
    size, label, trained = shape[field], section.label or section.name, trained_positions(facts)
    if problem := length_problem(facts, size, label, field):
        raise UserError(problem)
    if trained is not None and size > trained:
        log.warning(f"data.{field}={size} is more than the {trained} positions that {label} was trained on")


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
