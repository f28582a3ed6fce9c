"""A job of a PEFT suite written as that suite writes its results, for whatever reads those."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import itertools
import json
import math
import platform
from pathlib import Path
from typing import Any

from lora_exp.adapters.files.whole import write_text
from lora_exp.config import Config
from lora_exp.job import Job, Result
from lora_exp.method_file import FILE
from lora_exp.peft_suite import training_params
from lora_exp.training.loop import Record
from lora_exp.training.trainer import Work

FOLDER = "results"
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
_MEMORY = "accelerator_memory_* is the peak of all three: averages are not sampled here"
_MEMORY_CPU = "accelerator_memory_* is the peak of the process's memory on the CPU: there is no accelerator"


def write_suite_result(config: Config, job: Job, work: Work, records: list[Record], result: Result) -> Path:
    """Write ``results/METHOD--NAME.json`` into the sweep's folder, a single run's into its own. Returns the file.

    What the suite measures and a run here does not (accuracy without answers, a hub's digests) is null.
    """
    others = [key for key in job.swept if key != "suite_experiment"]  # such as the seed
    name = str(config.suite_experiment).replace("/", "--") + (f"--{job.number}" if others else "")
    file = (job.sweep_folder or job.folder) / FOLDER / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    found = {
        "run_info": _run_info(config, job, work, result),
        "train_info": _train_info(work, records, result),
        "meta_info": _meta_info(config, work, result),
    }
    write_text(file, json.dumps(_plain(found), indent=2) + "\n")
    return file


def _run_info(config: Config, job: Job, work: Work, result: Result) -> dict[str, Any]:
    started = dt.datetime.now(tz=dt.timezone.utc) - dt.timedelta(seconds=result.wall_s)
    adapter = job.folder / "adapter" / FILE
    return {
        "created_at": started.replace(microsecond=0).isoformat(),
        "total_time": result.wall_s,
        "experiment_name": config.suite_experiment,
        "peft_branch": f"v{importlib.metadata.version('peft')}",
        "peft_worktree_is_dirty": False,
        "train_config": _train_config(config, work),
        "peft_config": json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else None,
        "error_msg": "",
        "notes": [_MEMORY if work.place.device.type == "cuda" else _MEMORY_CPU],
    }


def _train_config(config: Config, work: Work) -> dict[str, Any]:
    """What the suite's files say, and over it what was done."""
    given = training_params(config.suite, str(config.suite_experiment)) if config.suite else {}
    section, optimizer = config.train, config.optimizer
    return given | {
        "model_id": config.model.name or config.model.label,
        "dtype": str(work.place.dtype).removeprefix("torch."),
        "batch_size": section.micro_batch_size * section.grad_accum_steps,
        "max_steps": work.timetable.steps,
        "eval_steps": section.eval_every,
        "seed": config.seed,
        "grad_norm_clip": section.max_grad_norm if math.isfinite(section.max_grad_norm) else 0,
        "use_gc": section.gradient_checkpointing,
        "optimizer_type": "AdamW" if optimizer.name == "adamw" else optimizer.name,
        "optimizer_kwargs": {
            "lr": optimizer.lr, "weight_decay": optimizer.weight_decay, "betas": list(optimizer.betas),
            "eps": optimizer.eps,
        },
        "lr_scheduler": section.schedule,
        "data": config.data.label,
    }  # fmt: skip


def _train_info(work: Work, records: list[Record], result: Result) -> dict[str, Any]:
    peak = round(result.peak_memory_gib * 2**30)
    return {
        "accelerator_memory_reserved_avg": peak,
        "accelerator_memory_max": peak,
        "accelerator_memory_reserved_99th": peak,
        "train_time": _train_time(work, records),
        "file_size": result.adapter_bytes,
        "num_trainable_params": result.trainable,
        "num_total_params": result.total,
        "status": "success",
        "metrics": [*_evaluations(work, records), _last(work, records, result)],
    }


def _evaluations(work: Work, records: list[Record]) -> list[dict[str, Any]]:
    found = []
    evaluated = [record for record in records if "eval/loss" in record]
    for before, record in itertools.pairwise(evaluated):
        named = {f"valid {key.removeprefix('eval/')}": record[key] for key in record if key.startswith("eval/")}
        loss = _mean(records, int(before["step"]), int(record["step"]))
        found.append({"step": record["step"], "valid accuracy": None, **named, "train loss": loss,
                      "train samples": record["step"] * _rows(work)})  # fmt: skip
    return found


def _last(work: Work, records: list[Record], result: Result) -> dict[str, Any]:
    step = max(int(record["step"]) for record in records)
    evaluated = [int(record["step"]) for record in records if "eval/loss" in record]
    since = max((each for each in evaluated if each < step), default=0)
    tested = {f"test {name}": value for name, value in result.test.items()}
    forgetting = {"forgetting": result.metrics["forgotten"]} if "forgotten" in result.metrics else {}
    return {
        "step": step,
        "test accuracy": None,
        **tested,
        "train loss": _mean(records, since, step),
        "train samples": step * _rows(work),
        "train total tokens": step * _rows(work) * work.kind.units,
        **forgetting,
    }


def _mean(records: list[Record], after: int, upto: int) -> float | None:
    losses = [float(each["train/loss"]) for each in records if "train/loss" in each and after < each["step"] <= upto]
    return sum(losses) / len(losses) if losses else None


def _train_time(work: Work, records: list[Record]) -> float:
    """Seconds of training steps, from their logged speeds: evaluations are not in it."""
    unit = f"train/{work.kind.unit}_per_s"
    logged = [record for record in records if unit in record]
    steps = [0, *(int(record["step"]) for record in logged)]
    done = [after - before for before, after in itertools.pairwise(steps)]
    per_step = _rows(work) * work.kind.units
    return sum(count * per_step / float(record[unit]) for count, record in zip(done, logged, strict=True))


def _rows(work: Work) -> int:
    """An optimizer step's."""
    return work.train.micro_batch_size * work.train.grad_accum_steps * work.world.size


def _meta_info(config: Config, work: Work, result: Result) -> dict[str, Any]:
    import torch

    machine = platform.uname()
    is_cuda = work.place.device.type == "cuda"
    packages = {f"{name}-version": _version(name) for name in _PACKAGES}
    return {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {config.data.label: {"sha": result.data_fingerprint, "created_at": None}},
        "package_info": packages | {f"{name}-commit-hash": None for name in _PACKAGES},
        "system_info": {
            "system": machine.system, "release": machine.release, "version": machine.version,
            "machine": machine.machine, "processor": machine.processor,
            "accelerator": torch.cuda.get_device_name() if is_cuda else "N/A",
        },
        "pytorch_info": torch.__config__.show(),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """Without infinities and NaNs, which are no JSON."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
