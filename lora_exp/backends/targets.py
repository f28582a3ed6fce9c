"""Which layers are adapted, and the library's config for them; both backends go by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_exp.backends.registry import Adapted, Origin, Way, backends, trains
from lora_exp.config import Config, conf_folder, default_targets, resolve_alpha, uses_rslora
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from lora_exp.adapters import LoraConfig


@trains("adapter")
class Adapter(Way):
    """What a backend adds to the base."""

    def problems(self, config: Config) -> list[str]:
        found = []
        if config.adapter.variant is None and config.backend != "peft":
            found.append(
                f"adapter={config.adapter.name} names no variant of ours: set adapter.variant, such as lora, or "
                "backend=peft for a method of PEFT's"
            )
        named = config.model.targets
        if config.targets is None and named and not default_targets(config):
            label = config.model.label or config.model.name
            found.append(
                f"layer={config.layer.name}: model={label} names targets for {', '.join(named)} alone: "
                f"choose one of them, or name yours, such as targets=[NAME]"
            )
        return found

    def adapt(self, base: nn.Module, config: Config, origin: Origin) -> Adapted:
        return backends[config.backend]().adapt(base, config, origin)


def target_modules(config: Config) -> list[str] | str | None:
    """``targets`` if set, else the model's own for the layer type, else None: all of that type but the head."""
    if config.targets is not None:
        targets: list[str] | str = config.targets
        return targets
    return default_targets(config) or None


def lora_config(config: Config) -> LoraConfig:
    from lora_exp.adapters import LoraConfig

    return LoraConfig(
        rank=config.rank,
        target_modules=target_modules(config),
        lora_alpha=resolve_alpha(config.alpha, config.rank),
        lora_dropout=config.dropout,
        bias=config.bias,
        use_rslora=uses_rslora(config),
        variant=config.adapter.variant or "lora",
        variant_options=config.adapter.options,
        start=config.start.name,
        start_options=config.start.options,
        modules_to_save=config.model.modules_to_save or None,
        layer_types=tuple(config.layer.types),
    )


def targeted(base: nn.Module, config: Config, wanted: LoraConfig) -> dict[str, nn.Module]:
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


def say_left_out_of(base: nn.Module, wanted: LoraConfig) -> None:
    """Warn of a mixture's experts that are not among the targets; our own injection says it by itself."""
    from lora_exp.adapters.inspection.traversal import base_modules
    from lora_exp.adapters.surgery.left_out import say_left_out, stacks_left_out
    from lora_exp.adapters.surgery.targets import find_targets

    modules = dict(base_modules(base))
    say_left_out(stacks_left_out(modules, wanted, find_targets(base, modules, wanted)))
