"""Single layers: every variant on linear layers, embeddings and convolutions, quantised bases, merging."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pairs import DTYPES, Holder, Setup, linear, three
from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.adapters.variants.registry import variant_names

from .checks import LIMITS, Case, LeftOut, differences

RANK = 8
KINDS = ("linear", "embedding", "conv2d")


def cases(device: torch.device) -> Iterator[Case]:
    dtypes = [torch.float32, torch.bfloat16]
    for kind, variant, dtype in itertools.product(KINDS, variant_names(), dtypes):
        name = f"{variant} on {kind}, {_short(dtype)}: outputs and gradients as in float64"
        yield name, LIMITS[dtype], partial(_against_float64, kind, variant, dtype, device)
    for dora, short in itertools.product((False, True), DTYPES):
        setup = Setup(RANK, 0.0, dora, short)
        yield f"{setup.label}: as PEFT on this device", LIMITS[DTYPES[short]], partial(_against_peft, setup, device)
    for kind, dora in itertools.product(("nf4", "fp4", "int8"), (False, True)):
        name = f"{'DoRA' if dora else 'LoRA'} on {kind}, fp32: as on the dequantised weight"
        yield name, 2e-2 if kind == "int8" else 1e-4, partial(_quantised, kind, dora, device)
    for variant in variant_names():
        yield f"{variant} merged, fp32: as adapted", LIMITS[torch.float32], partial(_merged, variant, device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def base(kind: str) -> nn.Module:
    """A model of one layer of ``kind``, in float32 on the CPU."""
    torch.manual_seed(0)
    if kind == "linear":
        return Holder(nn.Linear(192, 320))
    if kind == "embedding":
        return Holder(nn.Embedding(300, 192, padding_idx=0))
    return Holder(nn.Conv2d(24, 32, 3, padding=1, stride=2, groups=2))


def given(kind: str) -> Tensor:
    """What that layer takes: x (4, 96, 192), indices (4, 96) or an image (4, 24, 17, 17)."""
    torch.manual_seed(1)
    if kind == "embedding":
        return torch.randint(0, 300, (4, 96))
    return torch.randn(4, 96, 192) if kind == "linear" else torch.randn(4, 24, 17, 17)


def adapted(model: nn.Module, kind: str, variant: str) -> LoraModel:
    """With factors as after some training. Raises LeftOut for a variant that this kind of layer does not take."""
    wanted = LoraConfig(rank=RANK, target_modules=["layer"], layer_types=KINDS, variant=variant, lora_alpha=16)
    try:
        made = LoraModel(model, wanted, verbose=False)
    except ValueError as error:
        raise LeftOut(str(error)) from None
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in made.adapter_parameters().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return made


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of input and parameters, for a fixed gradient of the output."""
    x = x.clone().requires_grad_(x.is_floating_point())
    out = model(x)
    torch.manual_seed(3)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out))
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return found | {"output": out.detach()} | ({"input": x.grad} if x.grad is not None else {})


def _against_float64(kind: str, variant: str, dtype: torch.dtype, device: torch.device) -> float:
    model, x = adapted(base(kind), kind, variant), given(kind)
    model = rounded(model, dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    exact = step(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
    return differences(step(model.to(device), x.to(device)), exact)


def rounded(model: LoraModel, dtype: torch.dtype) -> LoraModel:
    """The base in ``dtype``, and the trained parameters in float32, as a run has them."""
    trained = {id(parameter) for name in model.configs for parameter in model.adapter_parameters(name).values()}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if id(tensor) not in trained and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def _against_peft(setup: Setup, device: torch.device) -> float:
    torch.manual_seed(0)
    sides = three(linear(192, 320, setup), setup, ["layer"])
    x = torch.randn(4, 96, 192).to(DTYPES[setup.dtype])
    found = {name: step(sides[name].to(device), x.to(device)) for name in ("ours", "peft")}
    return differences(*({key: side[key] for key in ("output", "input")} for side in found.values()))


def _quantised(kind: str, dora: bool, device: torch.device) -> float:
    torch.manual_seed(0)
    plain = nn.Linear(256, 192)
    layer = _quantise(plain, kind).to(device)
    holder = Holder(layer)
    holder.is_loaded_in_4bit = kind != "int8"  # type: ignore[assignment]
    holder.is_loaded_in_8bit = kind == "int8"  # type: ignore[assignment]
    variant = "dora" if dora else "lora"
    dense = nn.Linear(256, 192)
    dense.weight.data, dense.bias.data = _dequantised(layer).float().cpu(), plain.bias.data.clone()
    model, exact = adapted(holder, "linear", variant), adapted(Holder(dense), "linear", variant).double()
    for name, parameter in model.adapter_parameters().items():
        exact.adapter_parameters()[name].data.copy_(parameter.data)
    torch.manual_seed(1)
    x = torch.randn(4, 64, 256)
    return differences(step(model.to(device), x.to(device)), step(exact, x.double()))


def _quantise(plain: nn.Linear, kind: str) -> nn.Module:
    try:
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
    except ImportError as error:
        raise LeftOut(f"bitsandbytes is not there ({error})") from None
    if kind == "int8":
        made: nn.Module = Linear8bitLt(256, 192, has_fp16_weights=False)
    else:
        made = Linear4bit(256, 192, compute_dtype=torch.float32, quant_type=kind)
    made.load_state_dict(plain.state_dict(), strict=False)
    return made.requires_grad_(False)


def _dequantised(layer: nn.Module) -> Tensor:
    from bitsandbytes import functional

    weight: Any = layer.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        dense: Tensor = functional.dequantize_4bit(weight.data, state)
    else:
        dense = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return dense


def _merged(variant: str, device: torch.device) -> float:
    model, x = adapted(base("linear"), "linear", variant).to(device), given("linear").to(device)
    with torch.no_grad():
        before = model(x)
        model.merge()
        merged = model(x)
        model.unmerge()
        again = model(x)
    if not torch.equal(before, again):
        raise AssertionError("what was merged and unmerged is not what it was, to the bit")
    return differences({"output": merged}, {"output": before})
