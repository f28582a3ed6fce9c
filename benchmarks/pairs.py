"""The same layer or model, adapted by us and by PEFT with the same weights and factors."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn

from lora_exp.adapters import LoraConfig, LoraModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setup:
    """What both sides are asked for; rsLoRA scaling with alpha 16 throughout. nf4: the base is bitsandbytes' own."""

    rank: int = 8
    dropout: float = 0.0
    dora: bool = False
    dtype: str = "fp32"
    nf4: bool = False

    @property
    def label(self) -> str:
        base = " nf4" if self.nf4 else ""
        return f"{'DoRA' if self.dora else 'LoRA'}{base} {self.dtype} dropout {self.dropout:g} r={self.rank}"


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def linear(inputs: int, outputs: int, setup: Setup) -> Holder:
    """A model of one frozen linear layer without bias; in nf4 its products are in the activations' dtype."""
    plain = nn.Linear(inputs, outputs, bias=False).to(DTYPES[setup.dtype])
    if not setup.nf4:
        return Holder(plain)
    from bitsandbytes.nn.modules import Linear4bit

    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=DTYPES[setup.dtype], quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    made = Holder(layer.to(DTYPES[setup.dtype]).to("cpu"))
    made.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT asks for
    return made


def has_nf4() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def three(base: nn.Module, setup: Setup, targets: list[str]) -> dict[str, nn.Module]:
    """floor (the frozen base), ours, peft (as it comes) and tuned (PEFT without float32 casts of activations)."""
    theirs = {
        name: _peft(copy.deepcopy(base), setup, targets, cast) for name, cast in (("peft", True), ("tuned", False))
    }
    options = {"rank": setup.rank, "lora_alpha": 16, "lora_dropout": setup.dropout, "use_dora": setup.dora}
    kinds = ("linear", "embedding", "conv2d")
    wanted = LoraConfig(target_modules=targets, layer_types=kinds, **options)  # type: ignore[arg-type]
    ours = LoraModel(copy.deepcopy(base), wanted, verbose=False)
    shake(theirs["peft"])
    _copy_factors(theirs["peft"], theirs["tuned"])
    _take_factors(theirs["peft"], ours)
    floor = base.requires_grad_(False)
    return {"floor": floor, "ours": ours.train(), **{name: model.train() for name, model in theirs.items()}}


def touch(model: nn.Module) -> None:
    """Stands for an optimizer step: gradients are dropped and every trained parameter is written to."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = None
                parameter.mul_(1.0)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Factors as after some training: no longer zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            parameter.normal_(std=0.02)


def _peft(base: nn.Module, setup: Setup, targets: list[str], cast: bool) -> nn.Module:
    config = peft.LoraConfig(
        target_modules=targets,
        use_rslora=True,
        r=setup.rank,
        lora_alpha=16,
        lora_dropout=setup.dropout,
        use_dora=setup.dora,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config, autocast_adapter_dtype=cast)


@torch.no_grad()
def _copy_factors(source: nn.Module, target: nn.Module) -> None:
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(values[name])


@torch.no_grad()
def _take_factors(source: nn.Module, ours: LoraModel) -> None:
    """PEFT's factors in our layout."""
    theirs = {key.removeprefix("base_model.model."): value for key, value in source.named_parameters()}
    for key, parameter in ours.adapter_parameters().items():
        layer, _, what = key.rpartition(".")
        if what == "magnitude":
            parameter.copy_(theirs[f"{layer}.lora_magnitude_vector.default.weight"].reshape(parameter.shape))
        elif (factor := theirs.get(f"{layer}.{what.replace('lora_', 'lora_embedding_')}.default")) is not None:
            parameter.copy_(factor.T)
        else:
            value = theirs[f"{layer}.{what}.default.weight"]
            is_kernel = what == "lora_A" and value.dim() > 2
            parameter.copy_(value if is_kernel else value.reshape(value.shape[:2]).T)
