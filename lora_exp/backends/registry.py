"""Which ways there are to train something on a frozen base: each registers itself, in a file of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_exp.config import Config
from lora_exp.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from lora_exp.adapters.inspection.base_hash import Known


@dataclass(frozen=True)
class Adapted:
    """A model with its trainable parameters. ``save(folder)`` writes them as safetensors there.

    ``base_weight_bytes``: what the base's own weights take, quantisation constants included; ``base_parameters``:
    how many values those are. ``fast``: the parameters, by name, that LoRA+ trains at a higher rate. ``added``:
    parameters and buffers that are not the base's own, trained or not. ``masks``: what its dropout masks follow from,
    beside torch's generators; ``load_masks`` takes that up again. ``base_sha256``: of the base's values, as the
    adapter's card names it, where it has one. ``without()``: the base alone, for a block before training.
    ``starts_at_base``: whether the model gives what the base gives, to the bit, until it is trained.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    trainable: int
    total: int
    save: Callable[[Path], None]
    check_gradients: Callable[[], object] = lambda: None
    base_weight_bytes: int = 0
    base_parameters: int = 0
    fast: Mapping[str, nn.Parameter] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Callable[[], Mapping[str, int]] = dict
    load_masks: Callable[[Mapping[str, int]], object] = lambda masks: None
    base_sha256: Callable[[], str | None] = lambda: None
    starts_at_base: bool = False
    without: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


@dataclass(frozen=True)
class Origin:
    """Where a base came from, for whoever loads what was trained on it.

    ``name``: the hub's, where the weights lie in a folder that nobody else has; None: the name it was loaded by
    stands. ``files_sha256``: the digest of its weight files. ``tokenizer()`` loads the one to save beside.
    ``dense_weights(layer)``: a layer's weight as it was before it was quantised. ``show(model, rows)``: has a model
    see that many rows of the training data. ``class_names``: what a new head's outputs stand for. ``known``: what is
    known of the base's values, for all who train on them.
    """

    name: str | None = None
    files_sha256: str | None = None
    tokenizer: Callable[[], PreTrainedTokenizerBase | None] | None = None
    dense_weights: Callable[[str], Tensor] | None = None
    show: Callable[[nn.Module, int], None] | None = None
    class_names: Sequence[str] = ()
    known: Known | None = None


class Way:
    """A backend (``backend=name``), or what of a base is trained (``adapter.trains=name``)."""

    def problems(self, config: Config) -> list[str]:
        """What it cannot do of the config, as can be seen before anything is loaded."""
        return []

    def adapt(self, base: nn.Module, config: Config, origin: Origin) -> Adapted:
        """Freeze ``base`` and add what the config trains."""
        raise NotImplementedError


backends: Registry[type[Way]] = Registry("backend", "lora_exp.backends")
backend = backends.add
trained: Registry[type[Way]] = Registry("adapter.trains", "lora_exp.backends")
trains = trained.add
