"""One VeRA adapter on one layer: vector-based random matrix adaptation (arXiv 2310.11454).

h = x Wᵀ + b + scale * ((drop(x) A) ∘ d B) ∘ b, with A (in, r) and B (r, out) random, frozen and shared by all layers of
the adapter; d (r,) and b (out,) train. d ∘ stands at B here, as d ∘ B: the same product, for which x need not be
retained. b starts at zero, so that nothing changes at first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_exp.adapters.config import Json, LoraConfig
from lora_exp.adapters.host import Host
from lora_exp.adapters.variants.lora import LoraAdapter
from lora_exp.adapters.variants.peft_format import PeftFormat
from lora_exp.adapters.variants.registry import variant
from lora_exp.errors import UserError


class Projection(nn.Module):
    """A (r, widest in) and B (widest out, r) of one adapter: a layer takes its first columns and rows, as in PEFT.

    One module in every layer's adapter, so that a move, a cast and a copy keep it one.
    """

    A: Tensor
    B: Tensor

    def __init__(self, rank: int, inputs: int, outputs: int, seed: int, like: Tensor) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(seed)
        self.register_buffer("A", _uniform((rank, inputs), drawn, like))
        self.register_buffer("B", _uniform((outputs, rank), drawn, like))


def _uniform(shape: tuple[int, int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Kaiming's uniform values, the very ones that PEFT draws from a seed: in float32 on the CPU."""
    if like.is_meta:
        return torch.empty(shape, dtype=like.dtype, device="meta")
    bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator).to(like)


class VeraFormat(PeftFormat):
    """PEFT's VERA, which has no scale: `vera_lambda_b` is scale * b, and what is read has scale 1."""

    peft_type: ClassVar[str] = "VERA"
    takes_exclusions: ClassVar[bool] = False
    read: ClassVar[tuple[str, ...]] = (
        "r", "target_modules", "vera_dropout", "bias", "layers_to_transform", "layers_pattern", "modules_to_save",
        "peft_type", "task_type", "projection_prng_key", "save_projection", "d_initial", "init_weights",
    )  # fmt: skip
    refused: ClassVar[tuple[str, ...]] = ()
    without_meaning: ClassVar[tuple[str, ...]] = (
        "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out", "auto_mapping", "peft_version",
    )  # fmt: skip

    def fields(self, config: LoraConfig) -> Json:
        return {
            "r": config.rank,
            "vera_dropout": config.lora_dropout,
            "bias": {"lora_only": "vera_only"}.get(config.bias, config.bias),
            "projection_prng_key": config.variant_options.get("projection_seed", 0),
            "d_initial": config.variant_options.get("d_initial", 0.1),
            "save_projection": True,
            "init_weights": True,
        }

    def arguments(self, stored: Json, notes: Json) -> Json:
        rank, bias = stored.get("r", 256), stored.get("bias", "none")
        return {
            "rank": rank,
            "lora_alpha": rank,
            "use_rslora": False,
            "lora_dropout": stored.get("vera_dropout", 0.0),
            "bias": {"vera_only": "lora_only"}.get(bias, bias),
            "variant": "vera",
            "variant_options": {
                "projection_seed": stored.get("projection_prng_key", 0),
                "d_initial": stored.get("d_initial", 0.1),
            },
        }

    def check(self, stored: Json, source: str) -> None:
        super().check(stored, source)
        if not stored.get("save_projection", True):
            raise UserError(
                f"{source} was saved with save_projection=False, without vera_A and vera_B; save it with them from "
                "where it was trained, as no seed is sure to give the same values elsewhere"
            )

    def refusal(self, config: LoraConfig, hosts: Sequence[Host]) -> str | None:
        if config.rank_pattern:
            return "a rank_pattern, where PEFT's VeRA has one rank for all layers"
        return super().refusal(config, hosts)

    def shared_tensors(self, adapters: Sequence[LoraAdapter]) -> dict[str, Tensor]:
        first = adapters[0]
        assert isinstance(first, VeraAdapter)
        shared = first.projection
        return {"base_model.vera_A": shared.A, "base_model.vera_B": shared.B}

    def stored_rank(self, key: str, tensor: Tensor) -> tuple[str, int] | None:
        layer, is_d, rest = key.rpartition(".vera_lambda_d")
        return (layer, len(tensor)) if is_d and not rest and tensor.dim() else None


@variant("vera")
class VeraAdapter(LoraAdapter):
    """Letters and shapes as above. `projection_seed` gives A and B, `d_initial` fills d (§3.3)."""

    title: ClassVar[str] = "VeRA"
    peft_format: ClassVar[PeftFormat] = VeraFormat()
    starts_at_base: ClassVar[bool] = True
    projection: Projection
    d: nn.Parameter
    b: nn.Parameter

    def __init__(
        self,
        name: str,
        rank: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        layer_key: int = 0,
        *,
        projection_seed: int = 0,
        d_initial: float = 0.1,
    ) -> None:
        super().__init__(name, rank, alpha, dropout, use_rslora, layer_key)
        self.projection_seed, self.d_initial = projection_seed, d_initial

    @classmethod
    def share(cls, placed: Sequence[tuple[Host, LoraAdapter]]) -> None:
        """One projection, wide enough for every layer."""
        if others := [host for host, _ in placed if host.layer_type != "linear"]:
            raise UserError(
                f"variant='vera' is for linear layers, and {type(others[0]).__name__} is of type "
                f"{others[0].layer_type}; target linear layers alone, or take another variant"
            )
        hosts, adapters = zip(*placed, strict=True)
        inputs, outputs = (max(sizes) for sizes in zip(*map(_sides, hosts), strict=True))
        dtype = functools.reduce(torch.promote_types, (host.factor_dtype for host in hosts))
        like = torch.empty(0, device=hosts[0].weight.device, dtype=dtype)
        rank = max(adapter.rank for adapter in adapters)
        shared = Projection(rank, inputs, outputs, adapters[0].projection_seed, like)
        for adapter in adapters:
            adapter.projection = shared

    def prepare(self, host: Host) -> None:
        if "projection" not in self._modules:
            self.share([(host, self)])
        like = torch.empty(0, device=host.weight.device, dtype=host.factor_dtype)
        self.d = nn.Parameter(like.new_full((self.rank,), float(self.d_initial)))
        self.b = nn.Parameter(like.new_zeros(_sides(host)[1]))

    def factors(self, host: Host) -> tuple[Tensor, Tensor]:
        """A and (d bᵀ) ∘ B. Layers of one model may lie on several devices, and move on their own."""
        inputs, outputs = _sides(host)
        A = self.projection.A[: self.rank, :inputs].T.to(self.d)
        B = self.projection.B[:outputs, : self.rank].T.to(self.d)
        return A, torch.outer(self.d, self.b) * B

    def peft_tensors(self, host: Host) -> dict[str, Tensor]:
        b = self.b.detach()
        return {"vera_lambda_d": self.d.detach(), "vera_lambda_b": b if self.scale == 1 else b * self.scale}


def _sides(host: Host) -> tuple[int, int]:
    """(in, out)"""
    shape_A, shape_B = host.factor_shapes(1)
    return shape_A[0], shape_B[1]
