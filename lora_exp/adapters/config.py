"""What a user asks of an adapter: `LoraConfig`, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lora_exp.adapters.patterns import full_match, suffix_match
from lora_exp.errors import UserError

BIAS_MODES = ("none", "all", "lora_only")
ALL_LINEAR = "all-linear"
LARGEST_ALPHA = 1_000_000
Json = dict[str, Any]  # an object of a file: adapter_config.json, or what we note beside it


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """One adapter: where it goes, how large it is, how it is scaled.

    rank: r, the inner dimension of the factors.
    target_modules: None (every layer of `layer_types` but the output head, which may be several layers),
        "all-linear" (every linear one but those), a list of dotted suffixes ("q_proj", "mlp.down_proj"; a
        container stands for the layers inside it), or a regular expression that must match a module's full
        dotted name (without backreferences, in at most 20,000 characters).
        A mixture's stacked expert weights are named as if they were layers ("gate_up_proj", "experts.down_proj").
    exclude_modules: a list of dotted suffixes or a full-match regular expression, taken out again.
    lora_alpha, use_rslora: the scale is alpha/sqrt(r) (rsLoRA, arXiv 2312.03732 §4) or alpha/r (LoRA §4.1).
    lora_dropout: probability of dropping an input of the adapter; the frozen path sees no dropout.
    bias: which biases train: "none", "all" of the model's, or those of adapted layers ("lora_only").
    variant, variant_options: which kind of adapter, and what that kind alone can be told.
    start, start_options: how A and B begin ("default", "orthogonal", "pissa", "olora", "loftq"), and what that start
        alone can be told. The base is never changed: what a start takes off it in its paper is taken off the adapter.
    use_dora: the variant "dora" (arXiv 2402.09353), as PEFT spells it; `dora_detach_norm=False`, its option
        `detach_norm`, lets gradients through the norm that §4.3 of the paper detaches.
    layers_to_transform: indices of the blocks to adapt, where blocks are numbered in the module's name.
    rank_pattern, alpha_pattern: {dotted suffix or regular expression: value} for single layers.
    modules_to_save: modules (a classifier head) trained in full and saved with the adapter.
    layer_types: what `target_modules=None` and a targeted container stand for; "all" is every type there is.
    """

    rank: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = True
    use_dora: bool = False
    layers_to_transform: list[int] | int | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    layer_types: tuple[str, ...] = ("linear",)
    dora_detach_norm: bool = True
    variant: str = "lora"
    variant_options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    start: str = "default"
    start_options: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._settle_dora()
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"):
            object.__setattr__(self, name, _plain_list(getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", [self.modules_to_save])
        object.__setattr__(self, "start_options", dict(self.start_options))
        kinds = (self.layer_types,) if isinstance(self.layer_types, str) else tuple(self.layer_types)
        object.__setattr__(self, "layer_types", kinds)
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}) or None)
        if problems := list(_problems(self)):
            raise UserError("LoraConfig: " + "; ".join(problems))

    def _settle_dora(self) -> None:
        """PEFT's spellings and ours say the same."""
        options = dict(self.variant_options)
        if self.use_dora is True and self.variant == "lora":
            object.__setattr__(self, "variant", "dora")
        if self.variant == "dora":
            object.__setattr__(self, "use_dora", True)
            if self.dora_detach_norm is False:
                options["detach_norm"] = False
            object.__setattr__(self, "dora_detach_norm", options.get("detach_norm", self.dora_detach_norm))
        object.__setattr__(self, "variant_options", options)

    @property
    def scale(self) -> float:
        return scaling_factor(self.rank, self.lora_alpha, self.use_rslora)

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def scaling_factor(rank: int, alpha: float, use_rslora: bool) -> float:
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def check_factors(rank: object, alpha: object, dropout: object) -> None:
    """Raise one ValueError that names everything wrong with a layer's rank, alpha and dropout."""
    found = [
        *_rank_problems("rank", rank),
        *_alpha_problems("lora_alpha", alpha),
        *_dropout_problems(dropout),
    ]
    if found:
        raise UserError("; ".join(found))


def _plain_list(value: object) -> object:
    """A list out of whatever sequence a config file or a set gave; strings, ints and None stay."""
    if value is None or isinstance(value, (str, int)) or not isinstance(value, Iterable):
        return value
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def _problems(config: LoraConfig) -> Iterable[str]:
    yield from _rank_problems("rank", config.rank)
    yield from _alpha_problems("lora_alpha", config.lora_alpha)
    yield from _dropout_problems(config.lora_dropout)
    if config.bias not in BIAS_MODES:
        yield f"bias={config.bias!r} is no bias mode; choose one of {', '.join(BIAS_MODES)}"
    if not config.layer_types:
        yield "layer_types is empty; name at least one, such as 'linear', or 'all'"
    for name in ("use_rslora", "use_dora", "dora_detach_norm"):
        if not isinstance(getattr(config, name), bool):
            yield f"{name}={getattr(config, name)!r} is not a truth value; write True or False"
    if config.use_dora is True and config.variant != "dora":
        yield f"use_dora=True and variant={config.variant!r} contradict each other; leave use_dora out"
    yield from _name_problems(config)
    yield from _pattern_problems(config)


def _rank_problems(name: str, rank: object) -> Iterable[str]:
    if isinstance(rank, bool) or not isinstance(rank, int):
        yield f"{name}={rank!r} is not a whole number; use an integer of at least 1"
    elif rank < 1:
        yield f"{name}={rank} leaves nothing to train; use an integer of at least 1"


def _alpha_problems(name: str, alpha: object) -> Iterable[str]:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        yield f"{name}={alpha!r} is not a number; use a positive number such as 16"
    elif not (math.isfinite(alpha) and alpha > 0):
        yield f"{name}={alpha} would scale the adapter away; use a positive, finite number"
    elif alpha > LARGEST_ALPHA:
        yield f"{name}={alpha} would drown the base in the adapter; use at most {LARGEST_ALPHA:,}"


def _dropout_problems(dropout: object) -> Iterable[str]:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        yield f"lora_dropout={dropout!r} is not a number; use a probability in [0, 1)"
    elif not 0.0 <= dropout < 1.0:
        yield f"lora_dropout={dropout} is no probability in [0, 1); 0 turns dropout off"


def _name_problems(config: LoraConfig) -> Iterable[str]:
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(config, field)
        if isinstance(value, str):
            if field != "target_modules" or value != ALL_LINEAR:
                yield from _regex_problems(field, value)
        elif isinstance(value, list):
            if not value:
                yield f"{field} is an empty list, which names nothing; leave it out or name a module"
            if bad := [item for item in value if not isinstance(item, str) or not item]:
                yield f"{field} holds {bad}, which are no module names; use dotted names such as 'q_proj'"
        elif value is not None:
            yield f"{field}={value!r} is neither a list of names nor a regular expression"
    chosen = config.layers_to_transform
    if chosen is not None:
        indices = [chosen] if isinstance(chosen, int) else chosen
        if not indices or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
            yield f"layers_to_transform={chosen!r} must be block indices (0 or more), such as [0, 1]"


def _pattern_problems(config: LoraConfig) -> Iterable[str]:
    for pattern, rank in (config.rank_pattern or {}).items():
        yield from _regex_problems("rank_pattern", pattern, suffix_match)
        yield from _rank_problems(f"rank_pattern[{pattern!r}]", rank)
    for pattern, alpha in (config.alpha_pattern or {}).items():
        yield from _regex_problems("alpha_pattern", pattern, suffix_match)
        yield from _alpha_problems(f"alpha_pattern[{pattern!r}]", alpha)


def _regex_problems(field: str, pattern: str, match: Callable[[str, str], bool] = full_match) -> Iterable[str]:
    try:
        match(pattern, "")
    except ValueError as error:
        yield f"{field}: {error}; escape it or use a list of names"
