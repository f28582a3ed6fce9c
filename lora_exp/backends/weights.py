"""The base's own weights as what is trained (``adapter=full``, ``adapter=head``), tied ones included."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lora_exp.backends.registry import Adapted, Origin, Way, trains
from lora_exp.config import Config
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

log = logging.getLogger(__name__)


@trains("weights")
class Weights(Way):
    """All of them, or with ``targets`` set those of the modules that these name."""

    def problems(self, config: Config) -> list[str]:
        stored = config.quantization.name
        if stored == "none":
            return []
        return [f"quantization={stored} freezes what adapter=full would train: use adapter=lora"]

    def adapt(self, base: nn.Module, config: Config, origin: Origin) -> Adapted:
        return _trained(base, chosen_weights(base, config))


@trains("modules_to_save")
class ModulesToSave(Way):
    """Those of ``model.modules_to_save`` alone: a new head."""

    def problems(self, config: Config) -> list[str]:
        label = config.model.label or config.model.name
        if not (config.model.modules_to_save or config.data.new_head):
            return [
                f"adapter=head trains model.modules_to_save alone, and model={label} has none: name them, or use lora"
            ]
        if config.targets is not None:
            return [f"targets={config.targets} has no meaning with adapter=head: leave it out, or use adapter=lora"]
        return []

    def adapt(self, base: nn.Module, config: Config, origin: Origin) -> Adapted:
        return _trained(base, saved_weights(base, config))


def chosen_weights(base: nn.Module, config: Config) -> dict[str, nn.Parameter]:
    """Every weight, or with ``targets`` set all those inside the modules they match, and of a new head."""
    if config.targets is None:
        return dict(base.named_parameters())
    from lora_exp.adapters import LoraConfig
    from lora_exp.adapters.config import ALL_LINEAR
    from lora_exp.adapters.inspection.adapter_state import without_repeats
    from lora_exp.adapters.inspection.traversal import base_modules
    from lora_exp.adapters.surgery.targets import find_targets, matching

    if config.targets == ALL_LINEAR:
        wanted = LoraConfig(rank=1, target_modules=ALL_LINEAR)
        found = set(find_targets(base, dict(base_modules(base)), wanted).layers)
    else:
        found = matching(config.targets, _every_name(base), "targets")
    chosen = _inside(base, found)
    if not chosen:
        raise UserError(f"targets={config.targets} names {', '.join(sorted(found)[:3])}: no weights are in there")
    return without_repeats(chosen | saved_weights(base, config))


def saved_weights(base: nn.Module, config: Config) -> dict[str, nn.Parameter]:
    """Those of ``model.modules_to_save``, given as dotted suffixes: a new head."""
    if not config.model.modules_to_save:
        return {}
    from lora_exp.adapters.surgery.targets import matching

    return _inside(base, matching(config.model.modules_to_save, _every_name(base), "model.modules_to_save"))


def say_ties(base: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
    """Say which of the chosen weights are those of other modules too."""
    names = {id(parameter): name for name, parameter in chosen.items()}
    if len(names) == len(list(base.parameters())):
        return  # all of them are trained, tied or not
    for other, parameter in base.named_parameters(remove_duplicate=False):
        if (name := names.get(id(parameter))) is not None and other not in chosen:
            log.info(f"{name} is also {other}: training one trains both")


def save_weights(base: nn.Module, chosen: dict[str, nn.Parameter], folder: Path) -> None:
    from lora_exp.adapters.files.safetensors import write_tensors

    whole = len(chosen) == len(list(base.parameters()))
    save = getattr(base, "save_pretrained", None)
    if whole and callable(save):
        save(folder)  # unties shared weights as safetensors needs it
        return
    write_tensors(folder / "weights.safetensors", base.state_dict() if whole else chosen, {})


def _trained(base: nn.Module, chosen: dict[str, nn.Parameter]) -> Adapted:
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


def _every_name(base: nn.Module) -> list[str]:
    """The names of all modules; of one that is used in several places, all of its names."""
    return [name for name, _ in base.named_modules(remove_duplicate=False)]


def _inside(base: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters inside modules, those included that are tied to others outside."""
    from lora_exp.adapters.inspection.adapter_state import without_repeats

    found: dict[str, nn.Parameter] = {}
    for name in sorted(names):
        for key, parameter in base.get_submodule(name).named_parameters(remove_duplicate=False):
            found[f"{name}.{key}" if name else key] = parameter
    return without_repeats(found)
