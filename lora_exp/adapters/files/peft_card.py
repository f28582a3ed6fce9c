"""The README.md of an adapter's folder: what it is, and how to load it on the base it was trained on."""

from __future__ import annotations

from lora_exp.adapters.config import Json
from lora_exp.adapters.variants.registry import variant_named

_CARD = """---
{base_line}library_name: peft
tags: [lora]
---

# {kind} adapter of rank {rank}

Trained on {base}. Load it with PEFT (`PeftModel.from_pretrained(base, folder)`) or lora_exp
(`LoraModel.from_pretrained(base, folder)`), in float32 or bfloat16.

{identity}"""


def card(stored: Json, notes: Json) -> str:
    """stored: the adapter's config in PEFT's words; notes: ours on its base."""
    name, revision = stored["base_model_name_or_path"], stored["revision"]
    kind = variant_named(notes["variant"]).title
    base = f"`{notes['base']}`" + (f" (revision `{revision}`)" if revision else "")
    base_line = f"base_model: {name}\n" if name else ""
    return _CARD.format(base_line=base_line, kind=kind, rank=stored["r"], base=base, identity=_identity(notes))


def _identity(notes: Json) -> str:
    files, values = notes["base_files_sha256"], notes["base_values_sha256"]
    lines = [f"- base_files_sha256 (of the base's weight files): `{files}`"] if files else []
    if values:
        lines.append(f"- base_values_sha256 (of the values of its weights in bfloat16): `{values}`")
    return "\n".join(lines) + "\n"
