"""``task=verify``: an export as it is now, against what was written and what its run's model answered."""

from __future__ import annotations

import logging
from pathlib import Path

from lora_exp import models
from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.export import reference as references
from lora_exp.export.format import Tolerance, formats
from lora_exp.export.provenance import Facts, damage, read_provenance
from lora_exp.export.verifying import check_within, in_words, read_again
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.machine.place import resolve_device
from lora_exp.models.source import folder_of
from lora_exp.progress import Stages
from lora_exp.use.runs import names_of

log = logging.getLogger(__name__)


def run_verify(config: Config, job: Job) -> UseResult:
    """Each export that ``run`` names. Raises UserError for files that changed, or answers that are too far off."""
    figures: dict[str, float] = {}
    folders = [Path(name).expanduser() for name in names_of(config.run)]
    for folder in folders:
        with signals.at_once():
            found = _verified(folder, config)
        figures |= found if len(folders) == 1 else {f"{folder.name}/{key}": value for key, value in found.items()}
    return UseResult(figures, [str(folder) for folder in folders])


def _verified(folder: Path, config: Config) -> dict[str, float]:
    facts = read_provenance(folder)
    if broken := damage(folder, facts):
        raise UserError(f"{folder} is not what was exported: {'; '.join(broken)}. Export it anew")
    log.info(f"files  {len(facts['files'])} of {folder} are as they were written")
    name = str(facts["format"])
    kind, answers = formats[name](), references.read(folder / references.FILE)
    base = _base(config) if kind.needs_base else None
    device = str(resolve_device(config.device))
    with Stages() as stages, stages.stage(f"verify in {kind.runtime}"):
        figures = read_again(name, folder, answers, base, device, config.plugins)
    check_within(kind, figures, _tolerance(facts, config))
    log.info(f"verified in {kind.runtime}: {in_words(kind, figures)}")
    return figures.known


def _base(config: Config) -> Path:
    base = folder_of(models.find_source(config.model))
    if base is None:
        raise UserError(
            f"the base {config.model.label} is not here, and the export is an adapter alone: name a folder with it by "
            "model.path=FOLDER"
        )
    return base


def _tolerance(facts: Facts, config: Config) -> Tolerance:
    """What was let through when it was written, but where this command says otherwise."""
    known, section = facts.get("verification"), config.export
    own = Tolerance(**known["tolerance"]) if known else formats[facts["format"]]().tolerance(section)
    return own.unless(section)
