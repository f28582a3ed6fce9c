"""Put what is trained on a frozen base: our LoRA, PEFT's, or the weights themselves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_exp.config import Config, default_targets, resolve_alpha

log = logging.getLogger(__name__)
LAYER_TYPES = {"linear": ("linear",), "embedding": ("embedding",), "conv2d": ("conv2d",), "all": ("all",)}


@dataclass(frozen=True)
class Adapted:
    """A model with its trainable parameters. ``save(folder)`` writes them as safetensors there.

    ``base_weight_bytes``: what the base's own weights take, quantisation constants included.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    trainable: int
    total: int
    save: Callable[[Path], None]
    check_gradients: Callable[[], object] = lambda: None
    base_weight_bytes: int = 0


def adapt(base: nn.Module, config: Config) -> Adapted:
    """Freeze ``base`` and add what the config trains. Draws from torch's global RNG: seed first.

    Raises ValueError when a target matches nothing, is of another layer type or beyond the backend, or when
    the rank does not fit.
    """
    from lora_exp.adapters.counts import stored_bytes

    stored = stored_bytes(base)  # before anything is added to it
    return replace(_adapted(base, config), base_weight_bytes=stored)


def target_modules(config: Config) -> list[str] | str | None:
    """``targets`` if set, else the model's own for the layer type, else None: all of that type but the head."""
    if config.targets is not None:
        return config.targets
    return default_targets(config) or None


def _adapted(base: nn.Module, config: Config) -> Adapted:
    if config.adapter.name == "full":
        return _weights(base, _chosen_weights(base, config))
    if config.adapter.name == "head":
        return _weights(base, _inside(base, config.model.modules_to_save))
    return _peft(base, config) if config.backend == "peft" else _native(base, config)


def _native(base: nn.Module, config: Config) -> Adapted:
    from lora_exp.adapters import LoraModel

    wanted = _lora_config(config)
    _targeted(base, config, wanted)
    model = LoraModel(base, wanted, verbose=False)
    trainable, total = model.parameter_counts()
    parameters = list(model.adapter_parameters().values())

    def check_gradients() -> None:
        unreached = model.check_gradients()  # raises if that is all of them
        if unreached:
            named = ", ".join(unreached[:10]) + (", …" if len(unreached) > 10 else "")
            log.warning(f"{len(unreached)} adapted layers got no gradient in the first step: {named}")

    return Adapted(model, parameters, trainable, total, model.save_pretrained, check_gradients)


def _peft(base: nn.Module, config: Config) -> Adapted:
    import peft

    wanted = _lora_config(config)
    layers = _targeted(base, config, wanted)
    _check_peft_can(layers, wanted)
    named = wanted.target_modules if wanted.target_modules not in (None, "all-linear") else sorted(layers)
    asked = peft.LoraConfig(
        r=wanted.rank,
        target_modules=named,
        lora_alpha=wanted.lora_alpha,
        lora_dropout=wanted.lora_dropout,
        bias=wanted.bias,
        use_rslora=wanted.use_rslora,
        use_dora=wanted.use_dora,
        modules_to_save=wanted.modules_to_save,
    )
    with warnings.catch_warnings():  # PEFT 0.21 asks under a name that transformers 5.23 has changed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = peft.get_peft_model(base, asked)
    trainable, total = model.get_nb_trainable_parameters()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def save(folder: Path) -> None:
        # "auto" would add the whole frozen embedding to the file of an adapted one.
        model.save_pretrained(str(folder), save_embedding_layers=False)

    return Adapted(model, parameters, trainable, total, save)


def _lora_config(config: Config) -> Any:
    from lora_exp.adapters import LoraConfig

    return LoraConfig(
        rank=config.rank,
        target_modules=target_modules(config),
        lora_alpha=resolve_alpha(config.alpha, config.rank),
        lora_dropout=config.dropout,
        bias=config.bias,
        use_rslora=config.scaling.name == "rslora",
        use_dora=config.adapter.name == "dora",
        modules_to_save=config.model.modules_to_save or None,
        layer_types=LAYER_TYPES[config.layer.name],
    )


def _targeted(base: nn.Module, config: Config, wanted: Any) -> dict[str, nn.Module]:
    """The layers that will be adapted, all of the type that ``layer`` says: else the run would be mislabelled."""
    from lora_exp.adapters.registry import layer_class_for
    from lora_exp.adapters.targets import find_targets
    from lora_exp.adapters.walk import base_modules

    layers = find_targets(base, dict(base_modules(base)), wanted).layers
    for name, module in layers.items():
        kind = getattr(layer_class_for(module), "layer_type", "")
        if kind not in wanted.layer_types:
            raise ValueError(
                f"targets={config.targets} names {name}, which is of type {kind}, but layer={config.layer.name}: "
                f"choose layer={kind if kind in LAYER_TYPES else 'all'}, layer=all or other targets"
            )
    return layers


def _check_peft_can(layers: dict[str, nn.Module], wanted: Any) -> None:
    """PEFT 0.21 trains these convolutions on another geometry than the base's, or cannot merge them."""
    for name, module in layers.items():
        weight: Any = module.weight
        if wanted.use_dora and weight.device.type == "cpu" and type(weight).__name__ == "Int8Params":
            raise ValueError(
                f"backend=peft cannot train {name}: PEFT's DoRA loses int8 constants on a CPU after the first pass: "
                "use backend=native, adapter=lora or quantization=nf4"
            )
        problems = {
            "groups": getattr(module, "groups", 1) != 1,
            "dilation": any(extent != 1 for extent in getattr(module, "dilation", ())),
            "padding_mode": getattr(module, "padding_mode", "zeros") != "zeros",
        }
        for what, is_problem in problems.items():
            if is_problem:
                raise ValueError(
                    f"backend=peft cannot adapt {name}: PEFT's LoRA leaves out the convolution's {what}="
                    f"{getattr(module, what)}, so that it could not be merged: use backend=native, or other targets"
                )


def _weights(base: nn.Module, chosen: dict[str, nn.Parameter]) -> Adapted:
    """Train ``chosen`` weights of the base themselves."""
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in chosen)
    from lora_exp.adapters.counts import count_parameters

    trainable, total = count_parameters(chosen.values(), base.parameters())

    def save(folder: Path) -> None:
        _save_weights(base, chosen, folder)

    return Adapted(base, list(chosen.values()), trainable, total, save)


def _chosen_weights(base: nn.Module, config: Config) -> dict[str, nn.Parameter]:
    """Every weight, or with ``targets`` set those of the modules they match, and of a new head."""
    everything = dict(base.named_parameters())
    if config.targets is None:
        return everything
    from lora_exp.adapters import LoraConfig
    from lora_exp.adapters.targets import find_targets
    from lora_exp.adapters.walk import base_modules

    wanted = LoraConfig(rank=1, target_modules=config.targets)
    modules = find_targets(base, dict(base_modules(base)), wanted).layers
    chosen = {name: parameter for name, parameter in everything.items() if name.rpartition(".")[0] in modules}
    return chosen | _inside(base, config.model.modules_to_save)


def _inside(base: nn.Module, modules: list[str]) -> dict[str, nn.Parameter]:
    """The parameters inside ``modules``, given as dotted suffixes."""
    if not modules:
        return {}
    from lora_exp.adapters.targets import matching

    found = matching(modules, dict(base.named_modules()), "model.modules_to_save")
    below = tuple(f"{name}." for name in found)
    return {name: parameter for name, parameter in base.named_parameters() if name.startswith(below)}


def _save_weights(base: Any, chosen: dict[str, nn.Parameter], folder: Path) -> None:
    whole = len(chosen) == len(dict(base.named_parameters()))
    if whole and hasattr(base, "save_pretrained"):
        base.save_pretrained(folder)  # unties shared weights as safetensors needs it
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kept = base.state_dict() if whole else chosen
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in kept.items()}
    save_file(tensors, folder / "weights.safetensors", metadata={"format": "pt"})
