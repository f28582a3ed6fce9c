"""An export's model card, in the hub's form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_exp.adapters.files.whole import write_text
from lora_exp.credentials import redacted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_exp.config import Config
    from lora_exp.export.format import Format

FILE = "README.md"
_HASHES = ("base_files_sha256", "base_values_sha256", "adapter_sha256", "data_fingerprint")


def write_card(
    folder: Path, kind: Format, config: Config, facts: Mapping[str, Any], usage: str, base: Path | None
) -> None:
    """``usage``: how it is used. ``base``: the base's own folder, whose card may name a license."""
    head = {name: value for name, value in _front_matter(kind, config, facts, base).items() if value}
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    title = f"{config.model.label} {config.adapter.name}, {facts['format']}"
    parts = [f"---\n{front}---\n", f"# {title}\n", _origin(config, facts), usage, _figures(facts), _identity(facts)]
    write_text(folder / FILE, redacted("\n".join(part.strip() + "\n" for part in parts if part)))


def _front_matter(kind: Format, config: Config, facts: Mapping[str, Any], base: Path | None) -> dict[str, Any]:
    """``base_model`` and ``datasets`` are names on the hub, which refuses others."""
    adapts = "adapter" if kind.needs_base else "quantized" if facts["export"]["quantise"] != "none" else "finetune"
    return {
        "base_model": None if config.model.path else config.model.name,
        "base_model_relation": None if config.model.path or not config.model.name else adapts,
        "library_name": kind.library,
        "license": _license(base),
        "pipeline_tag": _task(config),
        "tags": list(dict.fromkeys(["lora_exp", config.adapter.name, *kind.tags])),
        "datasets": [config.data.name] if config.data.name else None,
        "metrics": sorted({name.partition("/")[2] for name in facts["metrics"]} - {"loss"}),
    }


def _task(config: Config) -> str | None:
    from lora_exp.data import kind_of

    kind = kind_of(config.data)
    if kind.new_head:
        return "text-classification"
    return "text-generation" if kind.needs_tokenizer else "image-classification"


def _license(base: Path | None) -> str | None:
    """What the base's own card says."""
    file = base / FILE if base is not None else None
    if file is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return None
    try:
        head = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return None
    return str(head["license"]) if isinstance(head, dict) and head.get("license") else None


def _origin(config: Config, facts: Mapping[str, Any]) -> str:
    base = f"`{facts['base_model']}`" + (f" (revision `{facts['revision']}`)" if facts["revision"] else "")
    trained = f"{config.adapter.name} of rank {config.rank}" if config.adapter.has_factors else config.adapter.name
    step = f", optimizer step {facts['optimizer_step']}" if facts["optimizer_step"] is not None else ""
    metrics = "".join(f"\n- {name}: {value:.4f}" for name, value in facts["metrics"].items())
    run = f"Run `{facts['run_id'] or facts['run']}`{step}."
    return f"{base}, trained on {facts['data']} by lora_exp ({trained}). {run}\n{metrics}"


def _figures(facts: Mapping[str, Any]) -> str:
    checked = facts.get("verification")
    if not checked:
        return "It was not compared with the trained model (`export.verify=false`)."
    return (
        f"Compared with the trained model on {checked['texts']} × {checked['tokens']} tokens ({checked['source']}), "
        f"read by {checked['runtime']}: largest difference of {checked['compared']} {checked['max_logit']:.2g}, "
        f"mean KL {checked['mean_kl']:.2g} nats. `python -m lora_exp task=verify run=FOLDER` does it again."
    )


def _identity(facts: Mapping[str, Any]) -> str:
    lines = [f"- {name}: `{facts[name]}`" for name in _HASHES if facts[name]]
    return "## Identity\n\n" + "\n".join(lines) + "\n\nMore stands in `provenance.json`."
