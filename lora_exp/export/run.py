"""``task=export``: a finished run's model in a format, compared with the trained model before it has its name."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor, nn

from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.export import reference as references
from lora_exp.export.answers import logits_of
from lora_exp.export.card import write_card
from lora_exp.export.format import Format, Tolerance, Wish, formats
from lora_exp.export.provenance import facts_of, read_provenance, write_provenance
from lora_exp.export.reference import Figures, Reference, reference_of, shortened
from lora_exp.export.texts import held_out
from lora_exp.export.verifying import check_within, compared, in_words, read_again
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.machine.cache import cache_root
from lora_exp.machine.saving import open_as_umask_says, recover, replace_folder
from lora_exp.models.source import folder_of
from lora_exp.progress import Stages
from lora_exp.tracking import finished
from lora_exp.use.loading import load_trained
from lora_exp.use.runs import PROVENANCE, FoundRun, find_run, names_of

log = logging.getLogger(__name__)
EXPORTS = Path("outputs/exports")


def run_export(config: Config, job: Job) -> UseResult:
    """Load, write, verify, and only then give the folder its name.

    Raises UserError for what the user can mend; then, as after any other end, nothing new stands under that name.
    """
    kind, section = formats[config.export.format](), config.export
    target = target_of(config, _only_run(config))
    with _alone(target), signals.while_closing():
        recover(target)
        check_target(target, section.overwrite)
        with signals.at_once():
            trained = load_trained(_exact(config), only=1)
            wish = Wish(trained, next(iter(trained.runs)), section, lambda share: None)
            kind.check(wish)
            wish = replace(wish, section=kind.resolved(wish))
            answers, source = reference_for(wish)
        check_room(target, kind.needed_bytes(wish))
        maker = _Maker(kind, wish, answers, source, job)
        replace_folder(target, maker.fill)
    return _told(config, maker, target)


def target_of(config: Config, run: FoundRun) -> Path:
    """The folder that is written."""
    if config.export.path:
        return Path(config.export.path).expanduser()
    return EXPORTS / f"{run.slug}-{config.export.format}"


def check_target(target: Path, overwrite: bool) -> None:
    """Raise UserError for one that is there and must stay."""
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target} is there already: add export.overwrite=true, or name another one by export.path")
    if not (target / PROVENANCE).is_file():
        raise UserError(f"{target} is no export, and is not replaced by one: name another folder by export.path")


def check_room(target: Path, needed: int) -> None:
    """Say how much will be written. Raises UserError if the disk has not as much."""
    place = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    log.info(f"write  about {_size(needed)} to {target}, where {_size(free)} are free")
    if needed > free:
        raise UserError(
            f"{target} takes about {_size(needed)}, and its disk has {_size(free)}: make room, or name a folder on "
            "another disk by export.path"
        )


def reference_for(wish: Wish) -> tuple[Reference, str]:
    """What the trained model answers to held-out tokens, and where those are from."""
    trained = wish.trained
    tokens, source = held_out(trained, wish.section)
    with trained.using(wish.name) as model, trained.place.compute():
        logits = logits_of(model, tokens.to(trained.place.device))
    return reference_of(tokens, logits), source


@dataclass
class _Maker:
    """Fills the folder. ``figures`` and ``facts`` are known once it has."""

    kind: Format
    wish: Wish
    answers: Reference
    source: str
    job: Job
    figures: Figures | None = None

    def fill(self, folder: Path) -> None:
        wish, trained, name = self.wish, self.wish.trained, self.wish.section.format
        base = folder_of(trained.source, trained.model)
        folder.mkdir(parents=True)
        with signals.at_once(), Stages() as stages:
            facts = facts_of(wish, self.job.config_yaml)
            usage = self.kind.usage(wish, folder.name.removeprefix(".").removesuffix(".writing"))
            with stages.stage(f"write {name}", folder, self.kind.needed_bytes(wish)) as say:
                facts |= dict(self.kind.write(replace(wish, say=say), folder) or {})
            place, config = trained.place, trained.config
            trained.model = nn.Module()  # its memory is what the other process needs
            gc.collect()
            references.save(shortened(self.answers), folder / references.FILE)
            write_provenance(folder, facts)  # for the runtime, which may need to know how the base was stored
            if wish.section.verify:
                with stages.stage(f"verify in {self.kind.runtime}"):
                    known = base if self.kind.needs_base else None
                    device = str(place.device)
                    self.figures = read_again(name, folder, self.answers, known, device, config.plugins, within=folder)
                tolerance = self.kind.tolerance(wish.section).unless(wish.section)
                check_within(self.kind, self.figures, tolerance)
                facts["verification"] = self._checked(self.figures, tolerance)
            write_card(folder, self.kind, config, facts, usage, base)
            write_provenance(folder, facts)
            open_as_umask_says(folder)

    def _checked(self, figures: Figures, tolerance: Tolerance) -> Mapping[str, Any]:
        tokens: Tensor = self.answers.tokens
        return {
            "runtime": self.kind.runtime,
            "compared": compared(self.kind),
            **figures.known,
            "texts": tokens.shape[0],
            "tokens": tokens.shape[1],
            "source": self.source,
            "tolerance": vars(tolerance),
        }


def _only_run(config: Config) -> FoundRun:
    names = names_of(config.run)
    if len(names) != 1:
        raise UserError(f"task=export is about 1 run, and {len(names)} are named: such as run=best")
    return find_run(names[0], config.best, config.tracking)


def _exact(config: Config) -> Config:
    """In float32 where the run has not said otherwise, so that rounding in products hides no mistake."""
    if config.model.dtype != "auto":
        return config
    return replace(config, model=replace(config.model, dtype="float32"))


def _told(config: Config, maker: _Maker, target: Path) -> UseResult:
    run, name = maker.wish.trained.runs[maker.wish.name], config.export.format
    figures = maker.figures.known if maker.figures is not None else {}
    if maker.figures is not None:
        log.info(f"verified in {maker.kind.runtime}: {in_words(maker.kind, maker.figures)} ({maker.source})")
    log.info(f"export {target} ({_size(sum(f.stat().st_size for f in target.rglob('*') if f.is_file()))})")
    if run.run_id is not None and config.tracking.enabled:
        named = {f"export/{name}/{key}": value for key, value in figures.items()}
        tags = {f"export.{name}": str(target.resolve())}
        finished.log_figures(config.tracking, run.run_id, named, 0, target / PROVENANCE, tags=tags)
    if config.tracking.register is not None:
        with signals.at_once():
            from lora_exp.tracking.models import register

            address = register(config.tracking, config.tracking.register, target, read_provenance(target))
        log.info(f"MLflow {address}")
    return UseResult(dict(figures), [str(target)], run.run_id)


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Two exports into one folder would remove each other's."""
    digest = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:20]
    place = cache_root() / "locks"
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / f"export-{digest}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process exports to {target}: wait for it, or name another folder by export.path"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
