"""The runner: one job from config to result."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from lora_exp import models
from lora_exp.backends import Adapted, Origin, adapt
from lora_exp.config import Config
from lora_exp.data import Data, Tokenizer, kind_of
from lora_exp.data.origin import record_data
from lora_exp.forgetting import Other, forgotten_data
from lora_exp.forgotten import look_at_forgotten
from lora_exp.identity import told_identity
from lora_exp.job import Job, Result, write_test_rows
from lora_exp.keeping import take_back_kept
from lora_exp.listed import flat_values
from lora_exp.machine import signals
from lora_exp.machine.distributed import World, joined
from lora_exp.machine.launch import one_fate
from lora_exp.machine.memory import reset_peak
from lora_exp.machine.place import Place, prepare_backends, resolve_device, resolve_place, set_seed
from lora_exp.machine.precision import Precision, take_precision
from lora_exp.machine.saving import recover
from lora_exp.models.dense_weights import DenseWeights
from lora_exp.packing.lanes import evaluation_rows, passes_of
from lora_exp.packing.resident import at_start, base_of, data_of, source_of
from lora_exp.parallel import loading_place, spread, world_tags
from lora_exp.plan.precheck import check_fits, memory_errors_explained
from lora_exp.pruning import refuse_several
from lora_exp.recording import Recorder, log_files
from lora_exp.results import hashes, log_result, report, saved_evaluation, say_if_stopped_early, summed_up
from lora_exp.resuming import Identity, Resumed, resumed_together
from lora_exp.suite_result import write_suite_result
from lora_exp.tracking import mlflow as tracking
from lora_exp.tracking.setup import log_setup, run_name, sweep_name
from lora_exp.training.batches import (
    check_evaluation,
    check_rows,
    evaluation_batches,
    timetable_of,
    training_batches,
)
from lora_exp.training.best import Best
from lora_exp.training.checkpoints import FOLDER as CHECKPOINTS
from lora_exp.training.checkpoints import Checkpoints
from lora_exp.training.loop import evaluate
from lora_exp.training.metrics import higher_is_better
from lora_exp.training.trainer import Work, trainers
from lora_exp.training.trainers.native import LANE, forward_of
from lora_exp.training.utilisation import Utilisation
from lora_exp.written import look_at_written

log = logging.getLogger(__name__)


def run(config: Config, job: Job) -> Result:
    """Seed, track, load, adapt, train, save. The adapter and every metric are on disk before this returns.

    Raises UserError for what the user can mend, with the next move in its message.
    """
    with joined(config.device) as world:
        result = _run(config, job, world)
    assert result is not None
    return result


def follow(config: Config, job: Job) -> None:
    """The same in a process that another one leads: nothing is written or tracked here."""
    with joined(config.device) as world:
        _run(config, job, world)


def _run(config: Config, job: Job, world: World) -> Result | None:
    started = time.monotonic()
    refuse_several(config.prune, world.size)
    with resumed_together(config, job, world) as resumed:
        precision, place = _placed(config, resumed, world)
        set_seed(config.seed)
        with signals.at_once():
            models.prepare_source(config.model)
        if world.leads:
            recover(job.folder / "adapter")
        names = run_name(config, job), job.sweep_folder, sweep_name(config, job)
        run_id = resumed.run_id(config)
        with (
            tracking.open_run(config.tracking, *names, folder=job.folder, run_id=run_id) as tracked,
            one_fate(),
        ):
            identity = Identity(config, resumed, precision.answers)
            identity.note("processes", str(world.size))
            if world.leads:
                log_setup(tracked, config, job, {"dtype": str(place.dtype), "device": str(place.device)})
                tracked.log_tags({**precision.tags(), **world_tags(config, world)})
            with memory_errors_explained(config, place):
                if config.parallel != "fsdp":  # plans are of one process
                    with signals.at_once():
                        check_fits(config, place)
                adapted, data, other = _prepare(tracked, config, place, identity, world)
                followed = None
                if world.leads:
                    with signals.at_once():  # now that the base is surely here
                        followed = told_identity(tracked, job, config, place, precision.answers, world.size)
                    resumed.take_up(job.folder)
                kept = _checkpoints(config, job, lambda: _facts(tracked, recorder, identity))
                work = replace(_work(adapted, data, config, place, world), checkpoints=kept, start=resumed.checkpoint)
                work = replace(work, at_start=at_start(config, adapted, place), passes=passes_of(config))
                work = replace(work, evaluation_rows=evaluation_rows(config))
                rate = precision.rate(place.autocast or place.dtype) * world.size
                share = Utilisation.of(adapted.model, rate, trains_base=not config.adapter.is_added)
                with Recorder(tracked, work, job, share, config.prune) as recorder, world.in_step():
                    _train(work, job, config, recorder, other)
            if not world.leads:
                return None
            records = recorder.records
            digests = hashes(job, work)
            result = summed_up(tracked, work, records, job, time.monotonic() - started, digests["adapter_sha256"])
            log_files(tracked, job, records)
            if followed is not None:
                result = replace(result, identity=followed.digest)
                tracked.log_artifact(followed.write(job.folder, asdict(result)))
            log_result(tracked, result, records, digests)
            if config.suite_experiment is not None:
                tracked.log_artifact(write_suite_result(config, job, work, records, result))
            tracked.log_model(f"{config.model.label}-{config.adapter.name}", flat_values(config), result.step)
    report(result, digests)
    return result


def _placed(config: Config, resumed: Resumed, world: World) -> tuple[Precision, Place]:
    """How this machine multiplies, as a run that goes on did before, and where the run computes."""
    device, is_quantised = world.device(config.device), config.quantization.name != "none"
    with signals.at_once(), world.turns("precision"):
        precision = take_precision(resumed.machine(config.machine), resolve_device(device))
    place = resolve_place(device, config.model.dtype, not config.adapter.is_added, is_quantised)
    prepare_backends(place)
    reset_peak(place.device)
    return precision, place


def _train(work: Work, job: Job, config: Config, recorder: Recorder, other: Other | None) -> None:
    look_at_forgotten(other, work, recorder)
    look_at_written(work, recorder)
    trainers[config.trainer]().train(work, recorder.keep)
    look_at_written(work, recorder, job)
    if work.world.leads:
        say_if_stopped_early(work, recorder.records)
    look_at_forgotten(other, work, recorder, job)
    _test(work, job, recorder)


def _checkpoints(config: Config, job: Job, facts: Callable[[], dict[str, Any]]) -> Checkpoints | None:
    most = config.train.keep_checkpoints
    return Checkpoints(job.folder / CHECKPOINTS, most, facts) if most else None


def _facts(tracked: tracking.Run, recorder: Recorder, identity: Identity) -> dict[str, Any]:
    """What a checkpoint says beside its state."""
    return {"run_id": tracked.run_id, "metrics": recorder.position(), **identity.facts}


def _prepare(
    tracked: tracking.Run, config: Config, place: Place, identity: Identity, world: World
) -> tuple[Adapted, Data, Other | None]:
    with signals.at_once(), world.turns("data"):
        source, tokenizer = source_of(config.model)
        data, other = data_of(config.data, config.model, tokenizer), forgotten_data(config, tokenizer)
    identity.note("data", data.fingerprint)
    if world.leads:
        record_data(tracked, kind_of(config.data), data)
    check_rows(data.train, config.train.micro_batch_size, world.size)
    check_evaluation(data.validation)
    said = timetable_of(data.train, config.train, world.size).in_words(config.train.micro_batch_size)
    log.info(f"train  {said}")
    _resume_collection()
    set_seed(config.seed)  # of a new head, which must not depend on what reading the data has drawn
    loading = loading_place(config, place)
    with signals.at_once(), world.turns("base"):
        found = base_of(config, source, loading, data.shape)
        base, digest = found.model, found.digest
    identity.note("base_files_sha256", digest)
    kind_of(config.data).check_model(base, loading.device)
    config = replace(config, model=models.with_new_modules(config.model, base))
    tracked.log_tags({"base_files_sha256": digest})
    dtype = str(place.dtype).removeprefix("torch.")
    stored = dtype if config.quantization.name == "none" else f"{config.quantization.name} and {dtype}"
    log.info(f"model  {config.model.label} in {stored} on {place.device}, base_files_sha256 {digest[:12]}")
    if config.train.gradient_checkpointing:
        models.checkpoint_layers(base)
    set_seed(config.seed)  # again: loading may have drawn numbers, and the adapter's first values must not depend on it
    origin = replace(_origin(config, digest, tokenizer), class_names=data.shape.get("class_names", ()))
    show = functools.partial(_show, data, config, loading)
    origin = replace(origin, dense_weights=DenseWeights(source, base), show=show, known=found.known)
    adapted = adapt(base, config, origin)
    share = 100 * adapted.trainable / adapted.total
    counts = {"trainable": adapted.trainable, "total": adapted.total, "trainable_percent": share}
    figures = {f"params/{name}": value for name, value in counts.items()}
    tracked.log_metrics({**figures, "base_weight_bytes": adapted.base_weight_bytes}, step=0)
    log.info(
        f"Initial Parameters : {adapted.base_parameters:,} || LoRA Parameters : {adapted.trainable:,} || "
        f"Trainable Proportion : {share:.3f}%"
    )
    with signals.at_once():
        spread(adapted, config, place, world)
    return adapted, data, other


def _work(adapted: Adapted, data: Data, config: Config, place: Place, world: World) -> Work:
    section = config.train
    best = Best(
        section.best_metric,
        higher_is_better(section.best_metric),
        section.early_stopping,
        section.min_delta,
    )
    timetable, kind = timetable_of(data.train, section, world.size), kind_of(config.data)
    return Work(adapted, data, kind, place, section, config.optimizer, config.seed, timetable, best, world)


def _test(work: Work, job: Job, recorder: Recorder) -> None:
    """Look at the test rows, once, with what is saved."""
    if work.data.test is None or not work.train.test:
        return
    if work.world.leads:
        take_back_kept(work, job.folder)
    work.world.lead_values(work.adapted.parameters)
    size, pin = work.train.micro_batch_size, work.place.device.type == "cuda"
    rows = len(work.data.test)  # type: ignore[arg-type]
    batches = evaluation_batches(work.data.test, size, rows, pin, work.kind.collate)
    by_row: list[dict[str, list[float]]] = []
    figures = evaluate(forward_of(work), batches, LANE, by_row)
    if work.world.leads:
        write_test_rows(job.folder, by_row)
    step = int(saved_evaluation(work, recorder.records)["step"]) if work.world.leads else 0
    recorder.keep({"lane": LANE, "step": step} | {f"test/{name}": value for name, value in figures.items()})


def _show(data: Data, config: Config, place: Place, model: nn.Module, rows: int) -> None:
    """Have ``model`` see the first ``rows`` training rows in the seed's order, as a start may ask."""
    kind, size, was_training = kind_of(config.data), config.train.micro_batch_size, model.training
    batches = training_batches(data.train, size, config.seed, False, kind.collate)
    model.eval()
    with place.compute():
        for batch in itertools.islice(batches, -(-rows // size)):
            signals.obey()
            kind.losses(model, {key: value.to(place.device) for key, value in batch.items()})
    model.train(was_training)


def _origin(config: Config, digest: str, tokenizer: Tokenizer) -> Origin:
    """A path of the user's own keeps its name; the cache's copy of a packaged model has the hub's."""
    name = None if config.model.path else config.model.name
    needed = tokenizer if kind_of(config.data).needs_tokenizer else None
    return Origin(name, None if digest == "unknown" else digest, needed)


def _resume_collection() -> None:
    """Look for garbage again (see ``__main__``), but, once a process, never among what was imported so far."""
    if not gc.get_freeze_count():
        gc.freeze()
    gc.enable()
