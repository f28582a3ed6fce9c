"""Put what is trained on a frozen base: our LoRA, PEFT's, or the weights themselves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_exp.backends.base_weights import chosen_weights, save_weights, saved_weights, say_ties
from lora_exp.config import Config, conf_folder, default_targets, resolve_alpha
from lora_exp.errors import UserError

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Origin:
    """Where a base came from, for whoever loads what was trained on it.

    ``name``: the hub's, where the weights lie in a folder that nobody else has; None: the name it was loaded by
    stands. ``files_sha256``: the digest of its weight files. ``tokenizer()`` loads the one to save beside.
    """

    name: str | None = None
    files_sha256: str | None = None
    tokenizer: Callable[[], Any] | None = None


def adapt(base: nn.Module, config: Config, origin: Origin | None = None) -> Adapted:
    """Freeze ``base`` and add what the config trains. Draws from torch's global RNG: seed first.

    Raises UserError when a target matches nothing, is of another layer type or beyond the backend, or when
    the rank does not fit.
    """
    from lora_exp.adapters.inspection.parameter_counts import stored_bytes

    origin = origin or Origin()
    stored = stored_bytes(base)  # before anything is added to it
    _name(base, origin)
    adapted = _adapted(base, config, origin)

    def save(folder: Path) -> None:
        adapted.save(folder)
        if origin.tokenizer is not None:
            origin.tokenizer().save_pretrained(folder)
        _open_as_umask_says(folder)

    return replace(adapted, base_weight_bytes=stored, save=save)


def target_modules(config: Config) -> list[str] | str | None:
    """``targets`` if set, else the model's own for the layer type, else None: all of that type but the head."""
    if config.targets is not None:
        return config.targets
    return default_targets(config) or None


def _adapted(base: nn.Module, config: Config, origin: Origin) -> Adapted:
    if config.adapter.trains == "weights":
        return _weights(base, chosen_weights(base, config))
    if config.adapter.trains == "modules_to_save":
        return _weights(base, saved_weights(base, config))
    return _peft(base, config) if config.backend == "peft" else _native(base, config, origin)


def _name(base: Any, origin: Origin) -> None:
    """Adapters of both backends say which base they are for by the name that the model has for itself."""
    if origin.name and hasattr(base, "name_or_path"):
        base.config._name_or_path = base.name_or_path = origin.name


def _open_as_umask_says(folder: Path) -> None:
    """safetensors makes its files for the owner alone, also below PEFT and transformers."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _native(base: nn.Module, config: Config, origin: Origin) -> Adapted:
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

    def save(folder: Path) -> None:
        model.save_pretrained(folder, base_files_sha256=origin.files_sha256)

    return Adapted(model, parameters, trainable, total, save, check_gradients)


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
        revision=getattr(getattr(base, "config", None), "_commit_hash", None),
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
        variant=config.adapter.variant or "lora",
        variant_options=config.adapter.options,
        modules_to_save=config.model.modules_to_save or None,
        layer_types=tuple(config.layer.types),
    )


def _targeted(base: nn.Module, config: Config, wanted: Any) -> dict[str, nn.Module]:
    """The layers that will be adapted, all of the type that ``layer`` says: else the run would be mislabelled."""
    from lora_exp.adapters.inspection.traversal import base_modules
    from lora_exp.adapters.layers.registry import layer_class_for
    from lora_exp.adapters.surgery.targets import find_targets

    layers = find_targets(base, dict(base_modules(base)), wanted).layers
    for name, module in layers.items():
        kind = getattr(layer_class_for(module), "layer_type", "")
        if wanted.layer_types != ("all",) and kind not in wanted.layer_types:
            choices = f"layer={kind}, " if (conf_folder() / "layer" / f"{kind}.yaml").is_file() else ""
            raise UserError(
                f"targets={config.targets} names {name}, which is of type {kind}, but layer={config.layer.name}: "
                f"choose {choices}layer=all or other targets"
            )
    return layers


def _check_peft_can(layers: dict[str, nn.Module], wanted: Any) -> None:
    """PEFT 0.21 trains these convolutions on another geometry than the base's, or cannot merge them."""
    for name, module in layers.items():
        weight: Any = module.weight
        if wanted.use_dora and weight.device.type == "cpu" and type(weight).__name__ == "Int8Params":
            raise UserError(
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
                raise UserError(
                    f"backend=peft cannot adapt {name}: PEFT's LoRA leaves out the convolution's {what}="
                    f"{getattr(module, what)}, so that it could not be merged: use backend=native, or other targets"
                )


def _weights(base: nn.Module, chosen: dict[str, nn.Parameter]) -> Adapted:
    """Train ``chosen`` weights of the base themselves."""
    from lora_exp.adapters.inspection.parameter_counts import count_parameters

    trained = {id(parameter) for parameter in chosen.values()}  # a tied weight has a name wherever it is used
    for parameter in base.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    say_ties(base, chosen)
    trainable, total = count_parameters(chosen.values(), base.parameters())

    def save(folder: Path) -> None:
        save_weights(base, chosen, folder)

    return Adapted(base, list(chosen.values()), trainable, total, save)
