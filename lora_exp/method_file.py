"""A PEFT method's own config file (``adapter.config``), taken into the config that it stands in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from lora_exp.errors import UserError

FILE = "adapter_config.json"
_OF_THE_SAVED = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")


def with_method(composed: DictConfig) -> DictConfig:
    """``composed`` with what the file of ``adapter.config`` says as ``adapter.method`` and ``adapter.options``.

    Options that were given beside the file win. What is composed so stands for itself when the file is gone, and tells
    runs of two versions of the file apart. A method's adapter without a name is named by it. Raises UserError.
    """
    adapter = composed.adapter
    file, method = OmegaConf.select(adapter, "config"), OmegaConf.select(adapter, "method")
    if file is None and not OmegaConf.is_missing(adapter, "name"):
        return composed
    found = copy.deepcopy(composed)
    with open_dict(found):
        if file is not None:
            stored, options = read_method(file)
            if method is not None and str(method).upper() != stored:
                raise UserError(f"adapter.config={file} is of {stored}, and adapter.method={method}: leave one out")
            given = OmegaConf.to_container(adapter.options)
            assert isinstance(given, dict)
            method, found.adapter.method, found.adapter.config = stored, stored, None
            found.adapter.options = options | given
        if OmegaConf.is_missing(adapter, "name"):
            found.adapter.name = "peft_method" if method is None else str(method).lower()
    return found


def read_method(place: str) -> tuple[str, dict[str, Any]]:
    """The method and the options of a file in the form of PEFT's ``adapter_config.json``, or of a folder with one.

    What it says of the adapter that it was saved with (its base, PEFT's version) is left out.
    """
    file = Path(place).expanduser()
    file = file / FILE if file.is_dir() else file
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"adapter.config={place} cannot be read ({error.strerror}): name a file such as PEFT's {FILE}"
        ) from error
    except ValueError as error:
        raise UserError(f"adapter.config={place} is no JSON ({error}): name a file such as PEFT's {FILE}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("peft_type"), str):
        raise UserError(f"adapter.config={place} names no peft_type: it is no config of a PEFT method")
    method = facts.pop("peft_type")
    return method.upper(), {name: value for name, value in facts.items() if name not in _OF_THE_SAVED}
