"""A model with adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import files
from .config import LoraConfig
from .counts import count_parameters
from .injection import inject
from .layer import DEFAULT
from .routing import BASE, Clock, Plan, Route, draw_seed
from .walk import joined, lora_layers


class LoraModel(nn.Module):
    """Freezes `model`, adds adapters to it in place, and otherwise behaves as it does.

    The base model is `wrapped`; attributes that LoraModel does not have are looked up there.
    """

    def __init__(
        self, model: nn.Module, config: LoraConfig, adapter_name: str = DEFAULT, verbose: bool = True
    ) -> None:
        super().__init__()
        self.wrapped = model
        self.configs: dict[str, LoraConfig] = {}
        self.route_state = Route()
        model.requires_grad_(False)
        self.add_adapter(adapter_name, config)
        self.set_adapter(adapter_name)
        if verbose:
            print(self.summary())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward; in training, its layer calls can be told from other passes'."""
        stochastic = self._is_stochastic()
        if not self.wrapped.training or (torch.compiler.is_compiling() and not stochastic):
            return self.wrapped(*args, **kwargs)
        with self.route_state.training_pass(draw=stochastic):
            return self.wrapped(*args, **kwargs)

    def _is_stochastic(self) -> bool:
        """Whether a replay of this pass must find its own masks or its own route again."""
        live = self.route_state.live
        drops = any(self.configs[name].lora_dropout > 0 for name in live.names if name != BASE)
        return drops or live.sizes is not None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "wrapped":  # not there yet: __init__, or a copy being filled
                raise
            return getattr(self.wrapped, name)

    # Adapters

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Add a named adapter; its factors are drawn from the global RNG. It is not active yet."""
        self._check_new_name(name)
        inject(self.wrapped, config, name, self.route_state)
        self.configs[name] = config
        self.route_state.clocks[name] = Clock(draw_seed())

    def set_adapter(self, name: str) -> None:
        self._check_name(name)
        self.route_state.live = Plan((name,))

    @property
    def active_adapter(self) -> str | None:
        """The adapter that serves the whole batch; None while disabled or routed."""
        live = self.route_state.live
        return live.names[0] if live.names and live.sizes is None else None

    def adapter_parameters(self, name: str = DEFAULT) -> dict[str, nn.Parameter]:
        """Everything that an adapter trains, by dotted name without the adapter's."""
        self._check_name(name)
        found: dict[str, nn.Parameter] = {}
        for layer_name, layer in lora_layers(self.wrapped):
            if name in layer.adapters:
                own = layer.adapters[name].named_parameters()
                found.update((joined(layer_name, key), value) for key, value in own)
        return found

    def parameter_counts(self, name: str | None = None) -> tuple[int, int]:
        """(trainable parameters of an adapter, parameters of the base and all adapters)."""
        return count_parameters(self.adapter_parameters(self._chosen(name)).values(), self.parameters())

    def summary(self) -> str:
        trainable, total = self.parameter_counts()
        return (
            f"Initial Parameters : {total - trainable:,} || LoRA Parameters : {trainable:,} || "
            f"Trainable Proportion : {100 * trainable / total:.4f}%"
        )

    def check_gradients(self) -> list[str]:
        """After a backward pass: names of adapted layers whose B got no gradient; raises if none got one.

        Some layers may rightly wait (an expert without a token yet); all of them means that training
        reads the weights without calling the layers, or that the loss does not depend on them.
        """
        served = set(self.route_state.trained)
        dead: dict[str, bool] = {}
        for layer_name, layer in lora_layers(self.wrapped):
            for name in served & set(layer.adapters):
                factor: Any = layer.adapters[name].lora_B
                dead[layer_name] = dead.get(layer_name, False) or factor.grad is None
        if all(dead.values()):
            raise ValueError(
                f"no adapter got a gradient in the last backward pass (of {', '.join(list(dead)[:5])}); "
                "target layers that the model calls, and with reentrant checkpointing let the embeddings' "
                "output require gradients"
            )
        return [name for name, is_dead in dead.items() if is_dead]

    # Files

    def save_model(self, path: str | Path, merge_weights: bool = False, name: str | None = None) -> None:
        """One safetensors file with an adapter alone."""
        chosen = self._chosen(name)
        files.save_adapter(path, self.adapter_parameters(chosen), self.configs[chosen])

    def load_model(self, path: str | Path, name: str | None = None) -> None:
        """Load what save_model wrote into an adapter made with the same config; strict."""
        chosen = self._chosen(name)
        files.load_adapter(path, self.adapter_parameters(chosen), self.configs[chosen])

    def _chosen(self, name: str | None) -> str:
        chosen = name or self.active_adapter or next(iter(self.configs))
        self._check_name(chosen)
        return chosen

    def _check_name(self, name: str) -> None:
        if name not in self.configs:
            raise ValueError(f"there is no adapter {name!r}; this model has {', '.join(self.configs)}")

    def _check_new_name(self, name: str) -> None:
        if name in self.configs:
            raise ValueError(f"there is an adapter {name!r} already; choose another name or delete it first")
        if not re.fullmatch(r"\w[\w-]*", name) or name == BASE or hasattr(nn.ModuleDict, name):
            raise ValueError(f"adapter name {name!r} cannot be used; take letters, digits, _ and -")
