"""Put what is trained on a frozen base: our LoRA, PEFT's, or the weights themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from lora_exp.backends.class_names import save_class_names
from lora_exp.backends.registry import Adapted, Origin, Way, backend, backends, trained, trains
from lora_exp.config import Config
from lora_exp.machine.saving import open_as_umask_says

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["Adapted", "Origin", "Way", "adapt", "backend", "backends", "name_base", "trained", "trains"]


def adapt(base: nn.Module, config: Config, origin: Origin | None = None) -> Adapted:
    """Freeze ``base`` and add what the config trains. Draws from torch's global RNG: seed first.

    Raises UserError when a target matches nothing, is of another layer type or beyond the backend, or when
    the rank does not fit.
    """
    from lora_exp.adapters.inspection.parameter_counts import count_parameters, stored_bytes

    origin = origin or Origin()
    stored, (count, _) = stored_bytes(base), count_parameters(base.parameters(), ())  # before anything is added
    own = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    name_base(base, origin.name)
    adapted = trained[config.adapter.trains]().adapt(base, config, origin)

    def save(folder: Path) -> None:
        adapted.save(folder)
        if origin.tokenizer is not None and (tokenizer := origin.tokenizer()) is not None:
            tokenizer.save_pretrained(folder)
        if origin.class_names:
            save_class_names(base, origin.class_names, folder)
        open_as_umask_says(folder)

    now = (*adapted.model.named_parameters(), *adapted.model.named_buffers())
    added = {name: tensor for name, tensor in now if id(tensor) not in own}
    return replace(adapted, base_weight_bytes=stored, base_parameters=count, save=save, added=added)


def name_base(base: nn.Module, name: str | None) -> None:
    """Adapters of both backends say which base they are for by the name that the model has for itself; None: it stays.

    The cache's copy of a packaged model has the hub's name.
    """
    if name and hasattr(base, "name_or_path"):
        own = cast("PreTrainedModel", base)
        own.config._name_or_path = own.name_or_path = name
