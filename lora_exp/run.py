"""The runner: one job from config to result."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import time
from dataclasses import replace
from pathlib import Path

from torch import nn

from lora_exp import models
from lora_exp.backends import Adapted, Origin, adapt
from lora_exp.config import Config, TrainConfig, flat_values
from lora_exp.data import Data, Tokenizer, kind_of, load_data
from lora_exp.job import Job, Result, shown
from lora_exp.keeping import take_back_kept
from lora_exp.machine import signals
from lora_exp.machine.cache import file_sha256
from lora_exp.machine.memory import peak_gib, reset_peak
from lora_exp.machine.place import Place, prepare_backends, resolve_device, resolve_place, set_seed
from lora_exp.machine.precision import take_precision
from lora_exp.machine.saving import recover
from lora_exp.models.dense_weights import DenseWeights
from lora_exp.plan.precheck import check_fits, memory_errors_explained
from lora_exp.recording import Recorder, log_files
from lora_exp.tracking import mlflow as tracking
from lora_exp.tracking.lineage import data_facts
from lora_exp.tracking.setup import log_setup, run_name, sweep_name
from lora_exp.training.batches import check_evaluation, check_rows, evaluation_batches, training_batches
from lora_exp.training.best import Best
from lora_exp.training.loop import Record, evaluate
from lora_exp.training.metrics import higher_is_better
from lora_exp.training.timetable import Timetable, micro_batches_of
from lora_exp.training.trainer import Work, trainers
from lora_exp.training.trainers.native import LANE, forward_of
from lora_exp.training.utilisation import Utilisation

log = logging.getLogger(__name__)


def run(config: Config, job: Job) -> Result:
    """Seed, track, load, adapt, train, save. The adapter and every metric are on disk before this returns.

    Raises UserError for what the user can mend, with the next move in its message.
    """
    started = time.monotonic()
    is_quantised = config.quantization.name != "none"
    with signals.at_once():
        precision = take_precision(config.machine, resolve_device(config.device))
    place = resolve_place(config.device, config.model.dtype, not config.adapter.is_added, is_quantised)
    prepare_backends(place)
    reset_peak(place.device)
    set_seed(config.seed)
    with signals.at_once():
        models.prepare_source(config.model)
    recover(job.folder / "adapter")
    names = run_name(config, job), job.sweep_folder, sweep_name(config, job)
    result: Result | None = None
    try:
        with tracking.open_run(config.tracking, *names, folder=job.folder) as tracked:
            log_setup(tracked, config, job, {"dtype": str(place.dtype), "device": str(place.device)})
            tracked.log_tags(precision.tags())
            with memory_errors_explained(config, place):
                with signals.at_once():
                    check_fits(config, place)
                adapted, data = _prepare(tracked, config, place)
                work = _work(adapted, data, config, place)
                rate = precision.rate(place.autocast or place.dtype)
                share = Utilisation.of(adapted.model, rate, trains_base=not config.adapter.is_added)
                with Recorder(tracked, work, job, share) as recorder:
                    trainers[config.trainer]().train(work, recorder.keep)
                    _test(work, job, recorder)
            records = recorder.records
            result = _summarise(tracked, work, records, job, time.monotonic() - started)
            log_files(tracked, job, records)
            _log_result(tracked, result, records, job)
            tracked.log_model(f"{config.model.label}-{config.adapter.name}", flat_values(config), result.step)
    except tracking.TrackingError as error:
        error.result = result  # what was trained is trained, though the server did not take it
        raise
    _report(result)
    return result


def _prepare(tracked: tracking.Run, config: Config, place: Place) -> tuple[Adapted, Data]:
    with signals.at_once():
        source = models.find_source(config.model)
        tokenizer = functools.cache(lambda: models.load_tokenizer(source, config.model))
        data = load_data(config.data, tokenizer)
    train, validation = len(data.train), len(data.validation)  # type: ignore[arg-type]
    tracked.log_dataset(data_facts(config.data, {"training": train, "validation": validation}))
    log.info(f"data   {config.data.label}: {train:,} training and {validation:,} validation {data.rows}")
    check_rows(data.train, config.train.micro_batch_size)
    check_evaluation(data.validation)
    _resume_collection()
    set_seed(config.seed)  # of a new head, which must not depend on what reading the data has drawn
    with signals.at_once():
        base = models.load_base(source, config.model, place, data.shape, config.quantization)
        digest = models.base_files_sha256(base, source)
    kind_of(config.data).check_model(base, place.device)
    config = replace(config, model=models.with_new_modules(config.model, base))
    tracked.log_tags({"base_files_sha256": digest})
    dtype = str(place.dtype).removeprefix("torch.")
    stored = dtype if config.quantization.name == "none" else f"{config.quantization.name} and {dtype}"
    log.info(f"model  {config.model.label} in {stored} on {place.device}, SHA-256 {digest[:12]}")
    if config.train.gradient_checkpointing:
        models.checkpoint_layers(base)
    set_seed(config.seed)  # again: loading may have drawn numbers, and the adapter's first values must not depend on it
    origin = replace(_origin(config, digest, tokenizer), class_names=data.shape.get("class_names", ()))
    show = functools.partial(_show, data, config, place)
    origin = replace(origin, dense_weights=DenseWeights(source, base), show=show)
    adapted = adapt(base, config, origin)
    share = 100 * adapted.trainable / adapted.total
    counts = {"trainable": adapted.trainable, "total": adapted.total, "trainable_percent": share}
    figures = {f"params/{name}": value for name, value in counts.items()}
    tracked.log_metrics({**figures, "base_weight_bytes": adapted.base_weight_bytes}, step=0)
    log.info(
        f"Initial Parameters : {adapted.base_parameters:,} || LoRA Parameters : {adapted.trainable:,} || "
        f"Trainable Proportion : {share:.3f}%"
    )
    return adapted, data


def _work(adapted: Adapted, data: Data, config: Config, place: Place) -> Work:
    section = config.train
    best = Best(
        section.best_metric,
        higher_is_better(section.best_metric),
        section.early_stopping,
        section.min_delta,
    )
    timetable = _timetable(data, section)
    return Work(adapted, data, kind_of(config.data), place, section, config.optimizer, config.seed, timetable, best)


def _timetable(data: Data, section: TrainConfig) -> Timetable:
    """Streamed rows have no number."""
    rows = len(data.train) if hasattr(data.train, "__len__") else None
    known = None if rows is None else micro_batches_of(rows, section.micro_batch_size, section.drop_last)
    return Timetable.of(section, known)


def _test(work: Work, job: Job, recorder: Recorder) -> None:
    """Look at the test rows, once, with what is saved."""
    if work.data.test is None:
        return
    take_back_kept(work, job.folder)
    size, pin = work.train.micro_batch_size, work.place.device.type == "cuda"
    rows = len(work.data.test)  # type: ignore[arg-type]
    batches = evaluation_batches(work.data.test, size, rows, pin, work.kind.collate)
    figures = evaluate(forward_of(work), batches, LANE)
    step = int(_saved(work, recorder.records)["step"])
    recorder.keep({"lane": LANE, "step": step} | {f"test/{name}": value for name, value in figures.items()})


def _saved(work: Work, records: list[Record]) -> Record:
    """The evaluation whose adapter is in the job's folder."""
    evaluated = [record for record in records if "eval/loss" in record]
    best = _best(work, evaluated)
    return best if best is not None and work.train.keeps_best else evaluated[-1]


def _best(work: Work, records: list[Record]) -> Record | None:
    return next((each for each in records if work.best.metric in each and each["step"] == work.best.step), None)


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


def _summarise(tracked: tracking.Run, work: Work, records: list[Record], job: Job, wall_s: float) -> Result:
    evaluated = [record for record in records if "eval/loss" in record]
    saved, best = _saved(work, records), _best(work, records) or evaluated[-1]
    adapted = work.adapted
    return Result(
        eval_loss=float(saved["eval/loss"]),
        eval_loss_before=float(evaluated[0]["eval/loss"]),
        metrics=_beside_loss(saved),
        trainable=adapted.trainable,
        total=adapted.total,
        adapter_bytes=sum(file.stat().st_size for file in _weights(job)),
        peak_memory_gib=peak_gib(work.place.device),
        wall_s=wall_s,
        adapter=str(job.folder / "adapter"),
        run_id=tracked.run_id,
        base_weight_bytes=adapted.base_weight_bytes,
        step=int(saved["step"]),
        best_loss=float(best["eval/loss"]),
        best_step=int(best["step"]),
        test={name: value for record in records for name, value in _below("test/", record).items()},
    )


def _beside_loss(record: Record) -> dict[str, float]:
    return {name: value for name, value in _below("eval/", record).items() if name != "loss"}


def _below(prefix: str, record: Record) -> dict[str, float]:
    return {name.removeprefix(prefix): float(record[name]) for name in record if name.startswith(prefix)}


def _log_result(tracked: tracking.Run, result: Result, records: list[Record], job: Job) -> None:
    sizes = {name: getattr(result, name) for name in ("adapter_bytes", "peak_memory_gib", "wall_s")}
    best = next(each for each in reversed(records) if "eval/loss" in each and each["step"] == result.best_step)
    figures = {f"best/{name}": value for name, value in _below("eval/", best).items()}
    sizes |= {**figures, "best/step": float(result.best_step or 0)}
    tracked.log_metrics(sizes, step=int(records[-1]["step"]))
    tracked.log_tags({"adapter_sha256": ",".join(file_sha256(file) for file in _weights(job))})


def _weights(job: Job) -> list[Path]:
    return sorted((job.folder / "adapter").glob("*.safetensors"))


def _report(result: Result) -> None:
    others = "".join(f"{name} {shown(value)}, " for name, value in result.metrics.items())
    log.info(
        f"validation loss {result.eval_loss_before:.4f} → {result.eval_loss:.4f}, {others}"
        f"{result.wall_s:.0f} s, peak memory {result.peak_memory_gib:.2f} GiB"
    )
    if result.best_step != result.step:
        log.info(
            f"best    validation loss {result.best_loss:.4f} at step {result.best_step}: keep that with train.keep=best"
        )
    if result.test:
        log.info("test " + ", ".join(f"{name} {shown(value)}" for name, value in result.test.items()))
    log.info(f"adapter {result.adapter} (step {result.step}, {result.adapter_bytes / 1e6:.1f} MB)")
