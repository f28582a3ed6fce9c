"""Put what is trained on a frozen base: our LoRA, PEFT's, or the weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_exp.config import Config, resolve_alpha


@dataclass(frozen=True)
class Adapted:
    """A model with its trainable parameters. ``save(folder)`` writes them as safetensors there."""

    model: nn.Module
    parameters: list[nn.Parameter]
    trainable: int
    total: int
    save: Callable[[Path], None]
    check_gradients: Callable[[], object] = lambda: None


def adapt(base: nn.Module, config: Config) -> Adapted:
    """Freeze ``base`` and add what the config trains. Draws from torch's global RNG: seed first.

    Raises ValueError when a target matches nothing or the rank does not fit.
    """
    if config.adapter.name == "full":
        return _full(base, config)
    return _peft(base, config) if config.backend == "peft" else _native(base, config)


def target_modules(config: Config) -> list[str] | str:
    """``targets`` if set, else the model's own for the layer type, else all linear layers but the head."""
    if config.targets is not None:
        return config.targets
    return config.model.targets.get(config.layer.name) or "all-linear"


def _native(base: nn.Module, config: Config) -> Adapted:
    from lora_exp.adapters import LoraConfig, LoraModel

    wanted = LoraConfig(
        rank=config.rank,
        target_modules=target_modules(config),
        lora_alpha=resolve_alpha(config.alpha, config.rank),
        lora_dropout=config.dropout,
        bias=config.bias,
        use_rslora=config.scaling.name == "rslora",
    )
    model = LoraModel(base, wanted, verbose=False)
    trainable, total = model.parameter_counts()
    parameters = list(model.adapter_parameters().values())
    return Adapted(model, parameters, trainable, total, model.save_pretrained, model.check_gradients)


def _peft(base: nn.Module, config: Config) -> Adapted:
    import peft

    wanted = peft.LoraConfig(
        r=config.rank,
        target_modules=target_modules(config),
        lora_alpha=resolve_alpha(config.alpha, config.rank),  # type: ignore[arg-type]  # it takes floats
        lora_dropout=config.dropout,
        bias=config.bias,  # type: ignore[arg-type]  # checked by the config
        use_rslora=config.scaling.name == "rslora",
    )
    model = peft.get_peft_model(base, wanted)
    trainable, total = model.get_nb_trainable_parameters()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def save(folder: Path) -> None:
        model.save_pretrained(str(folder))

    return Adapted(model, parameters, trainable, total, save)


def _full(base: nn.Module, config: Config) -> Adapted:
    chosen = _chosen_weights(base, config)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in chosen)
    trainable = sum(parameter.numel() for parameter in chosen.values())
    total = sum(parameter.numel() for parameter in base.parameters())

    def save(folder: Path) -> None:
        _save_weights(base, chosen, folder)

    return Adapted(base, list(chosen.values()), trainable, total, save)


def _chosen_weights(base: nn.Module, config: Config) -> dict[str, nn.Parameter]:
    """Every weight, or with ``targets`` set those of the modules they match."""
    everything = dict(base.named_parameters())
    if config.targets is None:
        return everything
    from lora_exp.adapters import LoraConfig
    from lora_exp.adapters.targets import find_targets

    wanted = LoraConfig(rank=1, target_modules=config.targets)
    modules = find_targets(base, dict(base.named_modules()), wanted).layers
    return {name: parameter for name, parameter in everything.items() if name.rpartition(".")[0] in modules}


def _save_weights(base: Any, chosen: dict[str, nn.Parameter], folder: Path) -> None:
    if len(chosen) == len(dict(base.named_parameters())):
        base.save_pretrained(folder)  # unties shared weights as safetensors needs it
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().contiguous().cpu() for name, parameter in chosen.items()}
    save_file(tensors, folder / "weights.safetensors", metadata={"format": "pt"})
