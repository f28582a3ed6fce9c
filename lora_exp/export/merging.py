"""A finished run's model as a plain one of transformers, with what was trained inside of its weights."""

from __future__ import annotations

import collections
import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_exp.adapters import LoraModel, MergeReport
from lora_exp.adapters.inspection.traversal import lora_layers
from lora_exp.adapters.layers.bitsandbytes import dense_of
from lora_exp.adapters.numerics.packed_weights import is_quantised
from lora_exp.models.heads import heads_of

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

QUANTISED = {"nf4": 0.52, "fp4": 0.52, "int8": 1.01}  # bytes a weight, constants included
_DENSE = ".dense"


@dataclass
class MergedModel:
    """A plain ``model``. Of what was adapted ``base`` and ``merged`` are the dense weights before and after, by layer;
    ``rounding``: what storing the sums in the model's dtype took."""

    model: nn.Module
    rounding: MergeReport = field(default_factory=MergeReport)
    base: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, Tensor] = field(default_factory=dict)


def merged_model(model: LoraModel, name: str, dtype: torch.dtype, keep: bool = False) -> MergedModel:
    """The model's own class with adapter ``name`` inside, its parameters in ``dtype``; ``model`` is used up.

    The sum is made in the precision that ``model`` has, and rounded once. ``keep``: the weights of what was adapted.
    """
    model.merge(name)
    rounding, base, merged = Rounding(), {}, {}
    for layer_name, layer in lora_layers(model.wrapped):
        if name in layer.adapters:
            holder, key = layer.place
            before, after = layer.dense_weight(), getattr(holder, key).detach()
            rounding.add(before, after, after.to(dtype))
            if keep:
                base[layer_name], merged[layer_name] = before, after
    plain = model.merge_and_unload(name)
    cast_parameters(plain, dtype)
    return MergedModel(plain, rounding.report, base, merged)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """As transformers loads them: what a model has to have in float32 stays so, and so do buffers. Ties stay."""
    done: dict[int, nn.Parameter] = {}
    stays = _kept_in_float32(model, dtype)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in done and parameter.is_floating_point() and not (stays and stays.search(name)):
            parameter.data = parameter.data.to(dtype)
        done[id(parameter)] = parameter
    config = getattr(model, "config", None)
    if config is not None:
        config.dtype = dtype


def save_plain(model: nn.Module, folder: Path, shard_gb: float) -> None:
    """A folder that ``from_pretrained`` loads, with safetensors of at most ``shard_gb`` · 10⁹ bytes."""
    wanted = cast("PreTrainedModel", model)
    with _config_as_published(wanted):
        wanted.save_pretrained(folder, max_shard_size=int(shard_gb * 1e9))


def save_quantised(found: MergedModel, kind: str, folder: Path, shard_gb: float, device: str) -> MergeReport:
    """The same stored in 4 or 8 bits by bitsandbytes, as transformers does; and what of the update survived that."""
    plain, dense = cast("PreTrainedModel", found.model), folder / _DENSE
    save_plain(plain, dense, shard_gb)
    wish, cls, dtype = _bits(kind, plain), type(plain), plain.dtype
    found.model = nn.Module()  # its memory is needed
    del plain
    stored = cls.from_pretrained(dense, quantization_config=wish, dtype=dtype, device_map={"": device})
    stored.save_pretrained(folder, max_shard_size=int(shard_gb * 1e9))
    shutil.rmtree(dense)
    rounding, modules = Rounding(), dict(stored.named_modules())
    for name, before in found.base.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is not None:
            now = dense_of(modules[name], weight) if is_quantised(weight) else weight.detach()
            rounding.add(before, found.merged[name], now)
    return rounding.report


def stored_dtype(files: list[Path]) -> torch.dtype:
    """What most values of safetensors files are in; float32 where there are none in floating point."""
    counts: collections.Counter[str] = collections.Counter()
    for file in files:
        with safe_open(str(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                counts[part.get_dtype()] += torch.Size(part.get_shape()).numel()
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return next((known[name] for name, _ in counts.most_common() if name in known), torch.float32)


class Rounding:
    """What storing W + D otherwise takes of D, over all layers: fills a ``MergeReport``."""

    def __init__(self) -> None:
        self._layers, self._max, self._lost, self._wanted, self._found = 0, 0.0, 0.0, 0.0, 0.0

    @torch.no_grad()
    def add(self, base: Tensor, merged: Tensor, stored: Tensor) -> None:
        """One layer's W, W + D, and what is stored of it."""
        exact = merged.float()
        delta, error = exact - base.to(exact), exact - stored.to(exact)
        self._layers += 1
        self._max = max(self._max, float(error.abs().max()))
        self._lost += float(error.square().sum())
        self._wanted += float(delta.square().sum())
        self._found += float(((delta - error) * delta).sum())

    @property
    def report(self) -> MergeReport:
        wanted = self._wanted
        relative = (self._lost / wanted) ** 0.5 if wanted else 0.0
        return MergeReport(self._layers, self._max, relative, self._found / wanted if wanted else 1.0)


def _kept_in_float32(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    names: set[str] = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(rf"(?:^|\.){name}(?:\.|$)" for name in names)) if names else None


@contextlib.contextmanager
def _config_as_published(model: PreTrainedModel) -> Iterator[None]:
    """Training switches the cache off, which a folder must not do to whoever generates with it."""
    had, configs = [], {id(each): each for each in (model.config, model.config.get_text_config())}
    for config in configs.values():
        if getattr(config, "use_cache", None) is False:
            config.use_cache = True
            had.append(config)
    try:
        yield
    finally:
        for config in had:
            config.use_cache = False


def _bits(kind: str, model: PreTrainedModel) -> BitsAndBytesConfig:
    """Heads for classes stay as they are, beside what transformers leaves out by itself."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    left: list[str] = sorted({*get_keys_to_not_convert(model), *heads_of(model)})
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=left,
    )
