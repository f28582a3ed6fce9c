"""Quantise a causal language model while it loads, and make it ready to be trained upon, by bitsandbytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

from lora_exp.adapters.numerics.packed_weights import is_quantised, keep_trainable
from lora_exp.adapters.surgery.targets import matching
from lora_exp.config import BLOCK_SIZES, QuantizationConfig
from lora_exp.errors import UserError
from lora_exp.machine.place import Place, supported_dtype
from lora_exp.models.heads import heads_of

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel
    from transformers.quantizers.base import HfQuantizer

DEVICES = ("cuda", "cpu")


class _Weight(Protocol):
    blocksize: int


class _Layer(Protocol):
    """bitsandbytes' linear layers, the 8-bit ones with a state."""

    in_features: int
    compute_dtype: torch.dtype
    weight: _Weight
    state: object


class CannotQuantiseError(UserError):
    """The model is there, but not to be quantised as wished."""


@contextmanager
def quantising(section: QuantizationConfig, place: Place) -> Iterator[dict[str, object]]:
    """What ``from_pretrained`` needs, called inside, to load the weights quantised: {} for ``quantization=none``.

    transformers' config has no block size and takes names to skip as loose suffixes, hence its quantiser is
    replaced by one that has both. Raises ``CannotQuantiseError`` for what ``place`` cannot do.
    """
    if section.name == "none":
        yield {}
        return
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING  # imports bitsandbytes, which takes seconds

    key = "bitsandbytes_8bit" if section.name == "int8" else "bitsandbytes_4bit"
    original = cast("type[HfQuantizer]", AUTO_QUANTIZER_MAPPING[key])
    AUTO_QUANTIZER_MAPPING[key] = _quantiser(original, section, place)
    try:
        yield {"quantization_config": _bits_and_bytes(section, place), "device_map": {"": place.device}}
    finally:
        AUTO_QUANTIZER_MAPPING[key] = original


def compute_dtype(section: QuantizationConfig, place: Place) -> torch.dtype:
    """What products with quantised weights are computed in. Raises ``CannotQuantiseError``."""
    if section.compute_dtype == "auto":
        return place.dtype
    try:
        return supported_dtype(place.device, section.compute_dtype, "quantization.compute_dtype")
    except ValueError as error:
        raise CannotQuantiseError(str(error)) from error


def prepare(model: nn.Module, section: QuantizationConfig, place: Place) -> None:
    """Freeze a quantised ``model``; keep what is not quantised (norms, embeddings, head) in float32.

    As PEFT's ``prepare_model_for_kbit_training`` does, without switching checkpointing on. Inputs of checkpointed
    layers need a gradient under reentrant checkpointing alone, which switches that on itself.
    """
    keep_trainable(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype in (torch.float16, torch.bfloat16) and not is_quantised(parameter):
            parameter.data = parameter.data.float()
    modules = [module for module in model.modules() if is_quantised(getattr(module, "weight", None))]
    layers = [cast(_Layer, module) for module in modules]
    for layer in layers:
        layer.compute_dtype = compute_dtype(section, place)
    _evaluate_as_trained([layer.state for layer in layers if hasattr(layer, "state")])


def has_quantised(model: nn.Module) -> bool:
    """Whether any weight is quantised, by us or in the files it came from."""
    return any(is_quantised(parameter) for parameter in model.parameters())


def _evaluate_as_trained(states: list[object]) -> None:
    """Let bitsandbytes' int8 layers evaluate as they train.

    On a CPU it rounds activations to 8 bits in evaluation alone: a model would be validated that is not the one in
    training.
    """
    if states:
        always = property(lambda self: True, lambda self, value: None)
        fixed = type(states[0].__class__.__name__, (type(states[0]),), {"is_training": always})
        for state in states:
            state.__class__ = fixed


def _bits_and_bytes(section: QuantizationConfig, place: Place) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    if place.device.type not in DEVICES:
        raise CannotQuantiseError(
            f"quantization={section.name} is not on device={place.device.type}: use device=cpu, or quantization=none"
        )
    if section.name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.name,
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=compute_dtype(section, place),
    )


def _quantiser(base: type[HfQuantizer], section: QuantizationConfig, place: Place) -> type[HfQuantizer]:
    def process(self: HfQuantizer, model: PreTrainedModel, *args: object, **kwargs: object) -> None:
        wishes = cast("BitsAndBytesConfig", self.quantization_config)
        try:
            wishes.llm_int8_skip_modules = _skipped(model, section.skip_modules)
        except ValueError as error:
            raise CannotQuantiseError(str(error)) from error
        base._process_model_before_weight_loading(self, model, *args, **kwargs)
        four_bit = {
            name: cast(_Layer, module)
            for name, module in model.named_modules()
            if hasattr(getattr(module, "weight", None), "blocksize")
        }
        if place.device.type == "cpu":
            _check_blocks(four_bit, section)
        for module in four_bit.values():
            module.weight.blocksize = section.block_size

    return type("Quantiser", (base,), {"_process_model_before_weight_loading": process})


def _check_blocks(layers: dict[str, _Layer], section: QuantizationConfig) -> None:
    """bitsandbytes 0.50 misreads, on a CPU, a block that starts in one row of a weight and ends in the next."""
    uneven = {name: m.in_features for name, m in layers.items() if m.in_features % section.block_size}
    if not uneven:
        return
    name, inputs = next(iter(uneven.items()))
    common = math.gcd(*(m.in_features for m in layers.values()))
    fits = [size for size in BLOCK_SIZES if common % size == 0]
    raise CannotQuantiseError(
        f"quantization.block_size={section.block_size} does not divide the {inputs} inputs of {name} (one of "
        f"{len(uneven)}), which bitsandbytes needs on a CPU: use "
        + (f"quantization.block_size={max(fits)}, or " if fits else "")
        + "quantization=int8, device=cuda, or quantization.skip_modules to leave such layers as they are"
    )


def _skipped(model: nn.Module, suffixes: list[str] | None) -> list[str]:
    """The output head, what is tied to it, a classifier's new head, and every module that ``suffixes`` name.

    As transformers' patterns.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    named = matching(suffixes, dict(model.named_modules()), "quantization.skip_modules") if suffixes else ()
    return [
        re.escape(name)
        for name in (*get_keys_to_not_convert(model), *heads_of(cast("PreTrainedModel", model)), *sorted(named))
    ]
