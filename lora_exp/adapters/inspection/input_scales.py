"""How large each input of a layer is, over data: what the layer's error counts for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def input_scales(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """The root mean square (K,) of the inputs (..., K) that `layers` get while `run()` calls the model in evaluation.

    A layer that is not called, or whose inputs are indices, is left out.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if x.is_floating_point():
                rows = x.detach().reshape(-1, x.shape[-1])
                sums[name] = sums.get(name, 0) + rows.float().square().sum(0)
                counts[name] = counts.get(name, 0) + len(rows)

        return see

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).sqrt() for name, total in sums.items()}
