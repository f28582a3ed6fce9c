"""PEFT's methods, whichever there are: their configs are built, checked and injected by PEFT itself."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lora_exp.backends.targets import lora_config, target_modules, targeted
from lora_exp.config import Config
from lora_exp.errors import UserError, is_bug

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

log = logging.getLogger(__name__)
_REFUSALS = (
    *(ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, AssertionError),
    *(NotImplementedError, IndexError),
)
_LOOK_AT_DATA = ("eva", "corda", "lora_ga")
_KNOBS = ("rank", "alpha", "dropout", "bias")  # of the config, which are our own variants'


def method_problems(config: Config) -> list[str]:
    """What is wrong with the method or its options, as PEFT sees it. Imports PEFT, as a training is about to."""
    try:
        method_config(config)
    except UserError as error:
        return [str(error)]
    return _unused_knobs(config)


def method_config(config: Config) -> PeftConfig:
    """PEFT's own config of ``adapter.method`` with ``adapter.options``, targets aside. Raises UserError."""
    section = config.adapter
    if section.method is None:
        raise UserError(
            f"adapter={section.name} names no method: add adapter.method=OFT, or adapter.config=FILE in the form of "
            "PEFT's adapter_config.json"
        )
    kind = _config_class(section.method)
    options = _checked_options(section.method, kind, section.options)
    if (init := options.get("init_lora_weights")) in _LOOK_AT_DATA:  # some of which PEFT begins as any LoRA then
        raise UserError(
            f"adapter.options.init_lora_weights={init} looks at data before training, which is not done here: "
            "leave it out, or choose one that follows from the base, such as pissa or olora"
        )
    if options.get("task_type") is None and config.model.kind == "causal_lm":
        options["task_type"] = "CAUSAL_LM"
    try:
        made: PeftConfig = kind(**options)
    except _REFUSALS as error:
        raise UserError(f"adapter.method={section.method} refuses its options: {_reason(error)}") from error
    if made.is_prompt_learning and getattr(made, "num_virtual_tokens", 1) is None:
        raise UserError(f"adapter.method={section.method} has no tokens: add adapter.options.num_virtual_tokens=20")
    return made


def wrapped(base: nn.Module, config: Config) -> PeftModel:
    """``base`` frozen, with what the method adds. Raises UserError for what PEFT refuses, or cannot train here."""
    import peft

    asked = method_config(config)
    _set_targets(asked, base, config)
    _set_modules_to_save(asked, config)
    try:
        model = peft.get_peft_model(base, asked)
    except _REFUSALS as error:
        if is_bug(error):
            raise
        raise UserError(
            f"adapter.method={config.adapter.method} refuses this model ({_reason(error)}{_unset(error, asked)}): "
            "choose other targets or options"
        ) from error
    _check_trainable(model, config)
    return model


def try_out(model: PeftModel, config: Config, show: Callable[[nn.Module, int], None] | None) -> None:
    """Have ``model`` see a row of the data. Raises UserError where PEFT's method wants more than that to compute."""
    if show is None:
        return
    try:
        show(model, 1)
    except _REFUSALS as error:
        if is_bug(error):
            raise
        raise UserError(
            f"adapter.method={config.adapter.method} does not compute on data={config.data.label} ({_reason(error)}): "
            "it wants other inputs, or options of its own"
        ) from error


def _config_class(method: str) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {str(getattr(kind, "value", kind)): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if (found := known.get(method.upper())) is not None:
        return found
    near = difflib.get_close_matches(method.upper(), known, n=3)
    meant = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(sorted(known))}"
    raise UserError(f"adapter.method={method} is none of PEFT's: {meant}")


def _checked_options(method: str, kind: Any, options: Mapping[str, object]) -> dict[str, object]:
    """PEFT passes over options that its version has not. One that is null, false or empty says nothing."""
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    if unknown := [name for name, value in options.items() if name not in known and value not in (None, False, {}, [])]:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        meant = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(sorted(known))}"
        raise UserError(f"adapter.options: {', '.join(unknown)} is no option of PEFT's {method}: {meant}")
    return {name: value for name, value in options.items() if name in known}


def _unused_knobs(config: Config) -> list[str]:
    """Rank, alpha and others that were given, and that no option takes over, would be a wish without effect."""
    found = []
    for name in _KNOBS:
        value, default = getattr(config, name), Config.__dataclass_fields__[name].default
        if value != default and value not in config.adapter.options.values():
            found.append(
                f"{name}={value} is not an option of PEFT's {config.adapter.method}, which has its own: leave it out, "
                f"or hand it on, such as 'adapter.options.NAME=${{{name}}}'"
            )
    return found


def _set_targets(asked: PeftConfig, base: nn.Module, config: Config) -> None:
    """The method's own targets where its options name some (null: those that PEFT knows for the model), else ours.

    Raises UserError for a name that no module has: PEFT passes over it where another one has.
    """
    from lora_exp.adapters.config import ALL_LINEAR
    from lora_exp.adapters.inspection.traversal import base_modules
    from lora_exp.adapters.surgery.targets import matching

    method, options = config.adapter.method, config.adapter.options
    if not hasattr(asked, "target_modules"):
        if config.targets is not None:
            raise UserError(f"targets={config.targets} has no meaning with adapter.method={method}: leave it out")
        return
    if "target_modules" in options and config.targets is not None:
        raise UserError(f"targets={config.targets} and adapter.options.target_modules are both set: leave one out")
    if "target_modules" not in options:
        asked.target_modules = None if _takes_others(asked, base, config) else _harness_targets(base, config)
    if asked.target_modules not in (None, ALL_LINEAR):
        wish = asked.target_modules
        names = [name for name, _ in base_modules(base)]
        matching(wish if isinstance(wish, str) else sorted(wish), names, "targets")


def _harness_targets(base: nn.Module, config: Config) -> list[str] | str:
    """Those that the other arms have."""
    named = target_modules(config)
    return sorted(targeted(base, config, lora_config(config))) if named is None else named


def _takes_others(asked: PeftConfig, base: nn.Module, config: Config) -> bool:
    """Whether PEFT knows the method to be for modules of another kind than ``layer`` says, such as norms."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from lora_exp.adapters.inspection.traversal import base_modules
    from lora_exp.adapters.layers.registry import layer_class_for
    from lora_exp.adapters.surgery.targets import suffixes

    tuner = dict[Any, Any](PEFT_TYPE_TO_TUNER_MAPPING).get(asked.peft_type)
    architecture = getattr(getattr(base, "config", None), "model_type", None)
    known = (getattr(tuner, "target_module_mapping", None) or {}).get(architecture)
    if config.targets is not None or not isinstance(known, (list, tuple, set)):
        return False
    found = [module for name, module in base_modules(base) if not set(known).isdisjoint(suffixes(name))]
    kinds = {getattr(layer_class_for(module), "layer_type", "") for module in found}
    return bool(found) and config.layer.types != ["all"] and kinds.isdisjoint(config.layer.types)


def _set_modules_to_save(asked: PeftConfig, config: Config) -> None:
    heads = config.model.modules_to_save
    if not heads or "modules_to_save" in config.adapter.options:
        return
    if not hasattr(asked, "modules_to_save"):
        raise UserError(
            f"adapter.method={config.adapter.method} cannot train the model's new head ({', '.join(heads)}) beside it"
        )
    asked.modules_to_save = list(heads)


def _check_trainable(model: PeftModel, config: Config) -> None:
    method = config.adapter.method
    if hasattr(model.base_model, "update_and_allocate"):
        raise UserError(
            f"adapter.method={method} has to be told of each optimizer step and adds to the loss, which is not done "
            "here: choose another method"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"adapter.method={method} trains nothing with these options: choose others")


def _unset(error: Exception, asked: PeftConfig) -> str:
    """The options that are null, where PEFT has fallen over one."""
    if not isinstance(error, TypeError):
        return ""
    shared = {field.name for field in dataclasses.fields(type(asked).__mro__[1])} | {"modules_to_save", "revision"}
    names = [name for name, value in vars(asked).items() if value is None and name not in shared]
    return f"; not set: {', '.join(names)}" if names else ""


def _reason(error: Exception) -> str:
    """What PEFT says, in a line."""
    said = re.sub(r"\s+", " ", str(error)).strip()[:300]
    return f"{type(error).__name__}: {said}" if isinstance(error, (KeyError, AttributeError)) else said
