"""Our own LoRA library."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lora_exp.backends.registry import Adapted, Origin, Way, backend
from lora_exp.backends.targets import lora_config, targeted
from lora_exp.config import Config

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from lora_exp.adapters import Given, LoraConfig

log = logging.getLogger(__name__)


@backend("native")
class Native(Way):
    def adapt(self, base: nn.Module, config: Config, origin: Origin) -> Adapted:
        from lora_exp.adapters import LoraModel

        wanted = lora_config(config)
        layers = targeted(base, config, wanted)
        model = LoraModel(base, wanted, verbose=False, given=_given(base, layers, wanted, origin))
        model.known_base = origin.known or model.known_base
        trainable, total = model.parameter_counts()
        parameters = list(model.adapter_parameters().values())

        def check_gradients() -> None:
            unreached = model.check_gradients()  # raises if that is all of them
            if unreached:
                named = ", ".join(unreached[:10]) + (", …" if len(unreached) > 10 else "")
                log.warning(f"{len(unreached)} adapted layers got no gradient in the first step: {named}")

        def save(folder: Path) -> None:
            model.save_pretrained(folder, base_files_sha256=origin.files_sha256)

        fast, masks, load_masks = model.fast_parameters(), model.dropout_state, model.load_dropout_state
        counts = parameters, trainable, total
        more = {"fast": fast, "masks": masks, "load_masks": load_masks, "base_sha256": model.base_sha256}
        more["starts_at_base"] = starts_at_base(wanted)
        more["without"] = model.disable_adapter
        return Adapted(model, *counts, save, check_gradients, **more)  # type: ignore[arg-type]


def starts_at_base(wanted: LoraConfig) -> bool:
    from lora_exp.adapters.starts.registry import start_named
    from lora_exp.adapters.variants.registry import variant_named

    variant, start = vars(variant_named(wanted.variant)), start_named(wanted.start)
    return variant.get("starts_at_base", False) and (start.starts_at_base or start.is_subtracted)


def _given(base: nn.Module, layers: dict[str, nn.Module], wanted: LoraConfig, origin: Origin) -> Given:
    """What a start may be made of; the base sees data only where the start asks for it."""
    from lora_exp.adapters import Given
    from lora_exp.adapters.inspection.input_scales import input_scales
    from lora_exp.adapters.starts.registry import make_start

    rows, show = make_start(wanted.start, wanted.start_options).rows, origin.show
    scales = input_scales(layers, lambda: show(base, rows)) if rows and show is not None else None
    return Given(origin.dense_weights, scales)
