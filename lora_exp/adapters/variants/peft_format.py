"""What PEFT's folders say of a kind of adapter: which of PEFT's methods it is, the fields and tensors of that method.

Where an adapter is and which modules are saved with it is said alike for all of them, by `files`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lora_exp.adapters.config import Json, LoraConfig
from lora_exp.adapters.host import Host
from lora_exp.adapters.variants.registry import variant_named
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from lora_exp.adapters.variants.lora import LoraAdapter

log = logging.getLogger(__name__)
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change base weights
_RANK_KEYS = (".lora_A.weight", ".lora_embedding_A")


class PeftFormat:
    """PEFT's LORA. Another method is a subclass in its variant's file, and there the variant's `peft_format`.

    read, refused, without_meaning: the fields of adapter_config.json that are understood, that are refused if they
    are set, and that say nothing once an adapter is trained.
    """

    peft_type: ClassVar[str] = "LORA"
    takes_exclusions: ClassVar[bool] = True  # whether the method knows exclude_modules
    read: ClassVar[tuple[str, ...]] = (
        "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "peft_type",
        "task_type", "init_lora_weights", "ensure_weight_tying", "target_parameters",
    )  # fmt: skip
    refused: ClassVar[tuple[str, ...]] = (
        "lora_bias", "use_qalora", "velora_config", "kasa_config", "arrow_config", "alora_invocation_tokens",
        "trainable_token_indices", "layer_replication", "megatron_config", "use_bdlora", "monteclora_config",
    )  # fmt: skip
    without_meaning: ClassVar[tuple[str, ...]] = (  # once an adapter is trained
        "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out", "auto_mapping", "peft_version",
        "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
        "runtime_config",
    )  # fmt: skip

    def fields(self, config: LoraConfig) -> Json:
        """The method's own fields for an adapter of this config."""
        alpha = config.lora_alpha
        return {
            "r": config.rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": config.lora_dropout,
            "bias": config.bias,
            "use_rslora": config.use_rslora,
            "use_dora": False,
            **variant_named(config.variant).peft_flags,
            "rank_pattern": config.rank_pattern or {},
            "alpha_pattern": config.alpha_pattern or {},
            "init_lora_weights": True,
        }

    def arguments(self, stored: Json, notes: Json) -> Json:
        """The same way back: LoraConfig's arguments. notes: what we noted beside PEFT's fields."""
        stacked = bool(stored.get("target_parameters"))  # beside which PEFT allows no dropout
        return {
            "rank": stored.get("r", 8),
            "lora_alpha": stored.get("lora_alpha", 8),
            "lora_dropout": stored.get("lora_dropout") or (stacked and notes.get("lora_dropout")) or 0.0,
            "bias": stored.get("bias", "none"),
            "use_rslora": stored.get("use_rslora", False),
            "use_dora": stored.get("use_dora", False),
            "dora_detach_norm": notes.get("dora_detach_norm", True),
            **self._noted_variant(stored, notes),
        }

    def check(self, stored: Json, source: str) -> None:
        """Raise UserError for what this library does not have, and say what is passed over."""
        if used := [key for key in self.refused if stored.get(key)]:
            raise UserError(f"{source} uses {', '.join(used)}, which this library does not have; load it with PEFT")
        start = str(stored.get("init_lora_weights"))
        if start.lower().startswith(_REWRITES_BASE):
            raise UserError(
                f"{source} was initialised with {start!r}, which changes the base weights; convert it to plain "
                "LoRA with PEFT's path_initial_model_for_weight_conversion first"
            )
        known = (*self.read, *self.refused, *self.without_meaning)
        if new := [key for key in stored if key not in known and stored[key]]:
            log.warning("%s has fields that are not known here and are passed over: %s", source, ", ".join(sorted(new)))

    def refusal(self, config: LoraConfig, hosts: Sequence[Host]) -> str | None:
        """Why PEFT would compute something else from this adapter; None if it would not."""
        return next((reason for host in hosts if (reason := host.peft_refusal())), None)

    def shared_tensors(self, adapters: Sequence[LoraAdapter]) -> dict[str, Tensor]:
        """What one adapter's layers share, as views under PEFT's keys: of none that is written by the layer."""
        return {}

    def stored_rank(self, key: str, tensor: Tensor) -> tuple[str, int] | None:
        """(layer, its rank), if this key of a file tells it."""
        for ending in _RANK_KEYS:
            if key.endswith(ending) and tensor.dim() > 0:
                return key.removesuffix(ending), tensor.shape[0]
        return None

    def _noted_variant(self, stored: Json, notes: Json) -> Json:
        """The variant that was saved, unless the config was changed since to another one that PEFT knows."""
        name = notes.get("variant", "lora")
        kind = variant_named(name)
        flags = {key: True for key in ("use_dora",) if stored.get(key)}
        if kind.peft_format.peft_type != self.peft_type or kind.peft_flags != flags:
            return {}
        return {"variant": name, "variant_options": notes.get("variant_options", {})}
