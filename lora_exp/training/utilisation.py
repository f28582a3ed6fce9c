"""Model FLOPs utilisation (arXiv:2204.02311, appendix B), against what the machine was measured to multiply."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from lora_exp.adapters.inspection.parameter_counts import logical_numel

_TOKENS = "train/tokens_per_s"


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """``flops_per_token``: what training needs; ``rate``: FLOP/s of the machine's products, 0 if not known."""

    flops_per_token: int
    rate: float

    @classmethod
    def of(cls, model: nn.Module, rate: float, trains_base: bool) -> Utilisation:
        """4 FLOPs a weight and token, forward and to the input, and 2 more where the weights are trained themselves.

        Attention, adapters and what checkpointing repeats are not counted: it is the useful share.
        """
        return cls((6 if trains_base else 4) * multiplied_weights(model, trains_base), rate)

    def figures(self, record: Mapping[str, float]) -> dict[str, float]:
        """``train/mfu`` of a record with a speed in tokens; nothing otherwise."""
        if _TOKENS not in record or not self.rate or not self.flops_per_token:
            return {}
        return {"train/mfu": self.flops_per_token * record[_TOKENS] / self.rate}


def multiplied_weights(model: nn.Module, trains_base: bool = False) -> int:
    """The base's weights that every token is multiplied with: those of linear layers and the head, tied or not."""
    layers = [module for module in model.modules() if _is_linear(module)]
    weights = [layer.weight for layer in layers if isinstance(layer.weight, Tensor)]
    base = [weight for weight in weights if trains_base or not weight.requires_grad]  # others are factors
    return sum({id(weight): logical_numel(weight) for weight in base}.values())


def _is_linear(module: nn.Module) -> bool:
    """Also transformers' Conv1D, and adapted and quantised layers, which are subclasses; PEFT's hold such a layer."""
    kinds = (kind.__name__ for kind in type(module).__mro__)
    return isinstance(module, nn.Linear) or "Conv1D" in kinds
