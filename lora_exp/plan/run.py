"""``task=plan``: one configuration's figures, printed, written to ``plan.json`` and tracked."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from lora_exp.config import Config
from lora_exp.errors import UserError, is_bug
from lora_exp.job import Job, PlanResult
from lora_exp.machine import signals
from lora_exp.machine.precision import take_precision
from lora_exp.plan.estimate import GIB, Plan, Planner
from lora_exp.plan.fit import Fit, fit
from lora_exp.plan.show import show
from lora_exp.tracking import mlflow as tracking
from lora_exp.tracking.setup import log_setup, run_name, sweep_name

log = logging.getLogger(__name__)
PLAN_FILE = "plan.json"


def run_plan(config: Config, job: Job) -> PlanResult:
    """Plan, show, write, track. Raises ValueError for an architecture that cannot be had or a target without match."""
    if config.device == "cpu":
        with signals.at_once():
            take_precision(config.machine, torch.device("cpu"))
    names = f"plan {run_name(config, job)}", job.sweep_folder, f"plan {sweep_name(config, job) or 'sweep'}"
    with tracking.open_run(config.tracking, *names, folder=job.folder) as tracked:
        with signals.at_once(), _methods_explained(config):
            planner = Planner(config)
            plan = planner.plan()
            found = fit(planner, plan, config)
        result = _result(plan, found, tracked.run_id)
        tracked.log_tags({"lora_exp.kind": "plan"})
        log_setup(tracked, config, job, {"dtype": plan.dtype, "device": plan.device_type})
        tracked.log_metrics(_metrics(result), step=0)
        tracked.log_artifact(_write(job.folder / PLAN_FILE, plan, found))
    if job.sweep_folder is None:
        show(plan, found, config)
    else:
        log.info(f"{config.model.label} rank {config.rank} {config.quantization.name}: {result.total_gib:.2f} GiB")
    return result


@contextlib.contextmanager
def _methods_explained(config: Config) -> Iterator[None]:
    """A method of PEFT's may be made from the weights' values, which a plan does not load."""
    try:
        yield
    except Exception as error:
        if config.adapter.has_factors or not config.adapter.is_added or is_bug(error) or not _wants_values(error):
            raise
        method = config.adapter.method
        raise UserError(
            f"adapter.method={method} cannot be planned: PEFT makes it from the base's values, which a plan does not "
            "load: train a step instead (train.steps=1)"
        ) from error


def _wants_values(error: Exception) -> bool:
    """Whether something failed for the meta device: what PEFT's own checks of the values find there, too."""
    return not isinstance(error, UserError) or "meta" in str(error)


def _result(plan: Plan, found: Fit | None, run_id: str | None) -> PlanResult:
    return PlanResult(
        trainable=plan.trainable,
        total=plan.total,
        adapter_bytes=plan.adapter_file_bytes,
        base_gib=sum(plan.base_bytes.values()) / GIB,
        adapter_gib=plan.adapter_bytes / GIB,
        gradients_gib=plan.gradient_bytes / GIB,
        optimizer_gib=plan.optimizer_bytes / GIB,
        activations_gib=plan.activation_bytes / GIB,
        head_gib=plan.head_bytes / GIB,
        total_gib=plan.total_bytes / GIB,
        flops_per_step=plan.flops_per_step,
        tokens_per_step=plan.tokens_per_step,
        fits=found.fits if found else None,
        largest_batch=found.largest_batch if found else None,
        largest_rank=found.largest_rank if found else None,
        run_id=run_id,
    )


def _metrics(result: PlanResult) -> dict[str, float]:
    values = {name: value for name, value in asdict(result).items() if name not in ("run_id", "trainable", "total")}
    planned = {f"plan/{name}": float(value) for name, value in values.items() if value is not None}
    return planned | {"params/trainable": float(result.trainable), "params/total": float(result.total)}


def _write(path: Path, plan: Plan, found: Fit | None) -> Path:
    figures = {**asdict(plan), "total_bytes": plan.total_bytes, "fit": asdict(found) if found else None}
    path.write_text(json.dumps(figures, indent=2) + "\n")
    return path
