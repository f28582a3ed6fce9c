"""The optional package that llama.cpp comes in."""

from __future__ import annotations

import importlib
from types import ModuleType

from lora_exp.errors import UserError


def xllamacpp(what: str) -> ModuleType:
    """llama.cpp for Python. ``what``: what asks for it. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        raise UserError(
            f"{what} needs llama.cpp, of the package xllamacpp: pip install 'lora_exp[gguf]' (or "
            "export.verify=false to write f32, f16, bf16 or q8_0 without a look at the result)"
        ) from error
