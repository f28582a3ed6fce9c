"""PEFT's library."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_exp.backends.peft_methods import method_problems, try_out, wrapped
from lora_exp.backends.registry import Adapted, Origin, Way, backend
from lora_exp.backends.targets import lora_config, say_left_out_of, targeted
from lora_exp.config import Config
from lora_exp.errors import UserError, is_bug

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from torch import nn

    from lora_exp.adapters import LoraConfig


@backend("peft")
class Peft(Way):
    def problems(self, config: Config) -> list[str]:
        start, name = config.start.name, config.adapter.name
        if config.adapter.is_added and config.adapter.variant is None:
            return method_problems(config)
        if config.adapter.is_added and start == "default":
            return []
        if config.adapter.is_added:
            return [f"start={start} is not with backend=peft, which would change the base: use backend=native"]
        return [f"backend=peft has no adapter={name}: use backend=native, which trains weights themselves"]

    def adapt(self, base: nn.Module, config: Config, origin: Origin) -> Adapted:
        import peft

        from lora_exp.adapters.surgery.left_out import is_stack

        if config.adapter.variant is None:
            with _quietly():
                model = wrapped(base, config)
                try_out(model, config, origin.show)
            return _trained(model)
        wanted = lora_config(config)
        _check_peft_trains(wanted, config)
        layers = targeted(base, config, wanted)
        _check_peft_can(layers, wanted)
        say_left_out_of(base, wanted)
        stacks = [name for name, module in layers.items() if is_stack(module)]
        by_name = wanted.target_modules in (None, "all-linear") or stacks
        asked = peft.LoraConfig(
            r=wanted.rank,
            target_modules=sorted(set(layers) - set(stacks)) if by_name else wanted.target_modules,
            target_parameters=stacks or None,
            lora_alpha=wanted.lora_alpha,  # type: ignore[arg-type]  # as PEFT takes it
            lora_dropout=wanted.lora_dropout,
            bias=wanted.bias,  # type: ignore[arg-type]
            use_rslora=wanted.use_rslora,
            use_dora=wanted.use_dora,
            modules_to_save=wanted.modules_to_save,
            revision=getattr(getattr(base, "config", None), "_commit_hash", None),
        )
        with _quietly(), _said_plainly():
            return _trained(peft.get_peft_model(base, asked))


def _trained(model: PeftModel) -> Adapted:
    trainable, total = model.get_nb_trainable_parameters()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    fast = {name: value for name, value in trained.items() if "lora_B" in name or value.dim() == 1}  # PEFT's rule

    def save(folder: Path) -> None:
        # "auto" would add the whole frozen embedding to the file of an adapted one.
        model.save_pretrained(str(folder), save_embedding_layers=False)

    return Adapted(model, list(trained.values()), trainable, total, save, fast=fast, without=model.disable_adapter)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """PEFT 0.21 asks under a name that transformers 5.23 has changed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def _said_plainly() -> Iterator[None]:
    """PEFT's ValueErrors are about the layers and options that it was asked for."""
    try:
        yield
    except ValueError as error:
        if is_bug(error):
            raise
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise UserError(f"backend=peft refuses ({reason}): use backend=native, or other targets") from error


def _check_peft_trains(wanted: LoraConfig, config: Config) -> None:
    from lora_exp.adapters.variants.registry import variant_named

    if not vars(variant_named(wanted.variant)).get("peft_trains", False):
        raise UserError(f"backend=peft does not train adapter={config.adapter.name} here: use backend=native")


def _check_peft_can(layers: dict[str, nn.Module], wanted: LoraConfig) -> None:
    """PEFT 0.21 trains these convolutions on another geometry than the base's, or cannot merge them."""
    from lora_exp.adapters.surgery.left_out import is_stack

    for name, module in layers.items():
        weight = module.get_parameter("weight")
        if wanted.lora_dropout and is_stack(module):
            raise UserError(
                f"backend=peft cannot train {name} with dropout={wanted.lora_dropout}: PEFT adds A and B to the "
                "experts' weights and so has no input to drop: use backend=native, or dropout=0"
            )
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
