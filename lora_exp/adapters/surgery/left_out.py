"""What a config leaves out of a mixture of experts: most of the model's weights, which nobody should have to miss."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from lora_exp.adapters.config import LoraConfig
from lora_exp.adapters.layers.registry import layer_class_for
from lora_exp.adapters.surgery.targets import Targets, block_of, without_excluded

log = logging.getLogger(__name__)


def is_stack(module: nn.Module) -> bool:
    """Whether a module stands for many weights in one parameter, adapted or not."""
    kind = layer_class_for(module)
    return kind is not None and kind.is_stack


def stacks_left_out(modules: dict[str, nn.Module], config: LoraConfig, targets: Targets) -> dict[str, nn.Module]:
    """The stacks among `modules` that `config` neither covers nor says to leave out, by naming others of them too."""
    if isinstance(config.target_modules, list) and any(map(is_stack, targets.layers.values())):
        return {}
    stacks = {name: False for name, module in modules.items() if is_stack(module)}
    kept = without_excluded(stacks, modules, config) if stacks else {}
    wish = config.layers_to_transform
    wanted = None if wish is None else {wish} if isinstance(wish, int) else set(wish)
    in_blocks = [name for name in kept if wanted is None or block_of(name) in wanted]
    return {name: modules[name] for name in in_blocks if name not in targets.layers and name not in targets.skipped}


def say_left_out(left_out: Mapping[str, nn.Module]) -> None:
    """One warning: how many they are, what they hold, and the way to include them."""
    if not left_out:
        return
    weights = [part.get_parameter("weight") for part in left_out.values()]
    kinds = sorted({str(kind.layer_type) for part in left_out.values() if (kind := layer_class_for(part)) is not None})
    endings = ", ".join(sorted({name.rpartition(".")[2] for name in left_out}))
    log.warning(
        "%d weights of a mixture's experts (%s: %d parameters in all) are not among the targets and stay as they are, "
        "such as %s. To adapt them too, name %s among the targets, or choose the layer type %s, or all; "
        "exclude_modules says that they are left out on purpose",
        sum(len(weight) for weight in weights),
        endings,
        sum(weight.numel() for weight in weights),
        next(iter(left_out)),
        endings,
        " or ".join(kinds),
    )
