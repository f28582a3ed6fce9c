"""EfficientNet-Lite0, a classifier of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.config import ModelConfig, QuantizationConfig
from lora_exp.models.kind import ModelKind, Outline, Shape, model_kind

if TYPE_CHECKING:
    from torch import nn

    from lora_exp.machine.place import Place
    from lora_exp.models.source import Source


@model_kind("efficientnet_lite")
class EfficientNetLite(ModelKind):
    def convert(self, packaged: Path, folder: Path) -> None:
        from lora_exp.models import efficientnet_lite

        efficientnet_lite.convert(packaged, folder)

    def load(
        self, source: Source, section: ModelConfig, place: Place, shape: Shape, quantization: QuantizationConfig
    ) -> nn.Module:
        from lora_exp.models import efficientnet_lite

        return efficientnet_lite.load(source, section, place, shape, quantization)

    def outline(self, section: ModelConfig, positions: int | None, shape: Callable[[], Shape]) -> Outline:
        from lora_exp.models import efficientnet_lite

        known = shape()
        return lambda dtype: efficientnet_lite.unloaded(section, dtype, known)
