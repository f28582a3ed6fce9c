"""What can be seen to be wrong with a config before anything is loaded; every problem of it at once."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict

from lora_exp import parallel, pruning
from lora_exp.backends import backends, trained
from lora_exp.config import BLOCK_SIZES, Config, ConfigError, DataConfig, QuantizationConfig, resolve_alpha
from lora_exp.credentials import login_problems
from lora_exp.data import kind_of
from lora_exp.forgetting import forget_problems
from lora_exp.inputs import model_path_problem, source_problems
from lora_exp.models.kind import model_kind_of, model_kinds
from lora_exp.task import tasks
from lora_exp.training.checks import train_problems
from lora_exp.training.metrics import metrics
from lora_exp.training.trainer import trainers

QUANTIZATIONS = ("none", "nf4", "fp4", "int8")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
BIASES = ("none", "all", "lora_only")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check(config: Config) -> None:
    """Raise ``ConfigError`` with every problem that can be seen before anything is loaded."""
    problems = [*_adapter_problems(config), *_place_problems(config), *_number_problems(config)]
    problems += [*_resume_problems(config), *pruning.problems(config)]
    problems += [*_task_problems(config), *_study_problems(config)]
    problems += [*_kind_problems(config), *_quantization_problems(config)]
    if problems:
        raise ConfigError(problems)


def _adapter_problems(config: Config) -> list[str]:
    problems = []
    if config.rank < 1:
        problems.append(f"rank={config.rank} is below 1: a LoRA needs a rank of at least 1, such as 8")
    else:
        try:
            resolve_alpha(config.alpha, config.rank)
        except ValueError as error:
            problems.append(str(error))
    if not 0 <= config.dropout < 1:
        problems.append(f"dropout={config.dropout} is outside [0, 1): use 0.0 to switch it off, 0.05 is common")
    if config.targets is not None and not _is_names(config.targets):
        problems.append(f"targets={config.targets} must be a list of names, a regular expression or all-linear")
    problems += _not_among("bias", config.bias, BIASES)
    chosen = (backends, config.backend), (trained, config.adapter.trains), (trainers, config.trainer)
    for registry, name in chosen:
        problem = registry.problem(name)
        problems += [problem] if problem else registry[name]().problems(config)
    if not trainers.problem(config.trainer):
        problems += parallel.problems(config, trainers[config.trainer].is_parallel)
    if config.start.name != "default" and not config.adapter.has_factors:
        start, name = config.start.name, config.adapter.name
        problems.append(f"start={start} has no meaning with adapter={name}, which has no factors: leave start out")
    return problems


def _task_problems(config: Config) -> list[str]:
    if problem := tasks.problem(config.task):
        return [problem]
    kind = tasks[config.task]
    found = kind().problems(config)
    if config.run is None or kind.of_runs or kind.of_exports or kind.of_folder:
        return found
    about = ", ".join(name for name in tasks.names() if tasks[name].of_runs)
    return [*found, f"run={config.run} names finished runs, which task={config.task} is not about: use task={about}"]


def _study_problems(config: Config) -> list[str]:
    study, of_kind = config.study, kind_of(config.data).metrics
    known = dict.fromkeys(("loss", *of_kind, *config.train.metrics))
    problems = [f"{key}={value} is below {least}" for key, value, least in (
        ("study.replicates", study.replicates, 1), ("study.tune_replicates", study.tune_replicates, 1),
        ("study.widen", study.widen, 0)) if value is not None and value < least]  # fmt: skip
    if not (study.margin >= 0 and math.isfinite(study.margin)):
        problems.append(f"study.margin={study.margin} must be a finite number, 0 or above, such as 0.01")
    if study.metric not in known:
        more = f"; train.metrics=[{study.metric}] adds it" if not metrics.problem(study.metric) else ""
        problems.append(f"study.metric={study.metric} is not measured: use one of {', '.join(known)}{more}")
    return problems


def _resume_problems(config: Config) -> list[str]:
    if config.resume is None or config.task != "train" or trainers.problem(config.trainer):
        return []
    if not trainers[config.trainer].resumes:
        return [f"resume={config.resume} is not for trainer={config.trainer}, which keeps no checkpoints: leave it out"]
    if not config.train.keep_checkpoints:
        return [f"resume={config.resume} needs checkpoints: leave train.keep_checkpoints=0 out"]
    return []


def _place_problems(config: Config) -> list[str]:
    problems = _not_among("model.dtype", config.model.dtype, DTYPES)
    if not (config.model.name or config.model.path or config.model.packaged):
        problems.append("no model is named: add model.name=ORG/NAME (hub) or model.path=FOLDER (hub layout)")
    problems += _not_among("machine.bf16", config.machine.bf16, ("auto", "native", "float32", "float32_few"))
    problems += _not_among("machine.float32", config.machine.float32, ("auto", "blas", "onednn"))
    if config.model.path and (problem := model_path_problem(config.model.path, config.task == "plan")):
        problems.append(problem)
    if not (config.data.path or config.data.name or config.data.packaged):
        problems.append(f"data={config.data.label} names no files: add data.path=FILE_OR_FOLDER")
    problems += login_problems(asdict(config))
    return problems


def _kind_problems(config: Config) -> list[str]:
    """What the kinds of model and data see in the config, and whether they go together."""
    model, data, reads = config.model, kind_of(config.data), _reads_data(config)
    sources = source_problems(config.data, data.suffixes, reads) if data.suffixes else []
    trains = not tasks.problem(config.task) and tasks[config.task].trains
    problems = [*(forget_problems(config) if trains else []), *sources, *data.problems("train" if reads else "plan")]
    if problem := model_kinds.problem(model.kind):
        return [*problems, problem]
    if model.kind not in data.learners:
        problems.append(
            f"model={model.label or model.name} ({model.kind}) does not learn from data={data.label} ({data.kind}): "
            f"choose a model of kind {' or '.join(data.learners)}, or other data"
        )
    return problems + model_kind_of(model).problems(model, data.positions, data.length_field)


def _reads_data(config: Config) -> bool:
    """Whether the task needs the files of ``data``."""
    if tasks.problem(config.task):
        return False
    return tasks[config.task].trains or tasks[config.task].reads_data


def _quantization_problems(config: Config) -> list[str]:
    section = config.quantization
    problems = _not_among("quantization", section.name, QUANTIZATIONS)
    problems += _not_among("quantization.compute_dtype", section.compute_dtype, DTYPES)
    if section.block_size not in BLOCK_SIZES:
        listed = ", ".join(map(str, BLOCK_SIZES))
        problems.append(f"quantization.block_size={section.block_size} is not a block size: use one of {listed}")
    if section.name == "int8" and (section.double_quant or section.block_size != QuantizationConfig.block_size):
        problems.append("quantization=int8 has one constant a row: leave double_quant and block_size to nf4 and fp4")
    is_known = model_kinds.problem(config.model.kind) is None
    if section.name != "none" and is_known and not model_kind_of(config.model).quantises:
        problems.append(f"quantization={section.name} is for language models: use quantization=none")
    return problems + _not_among("optimizer", config.optimizer.name, OPTIMIZERS) + _missing_library(config)


def _missing_library(config: Config) -> list[str]:
    """bitsandbytes, and what transformers quantises with, are an extra; looking is not importing."""
    if tasks.problem(config.task):
        return []
    trains, of_runs = tasks[config.task].trains, tasks[config.task].of_runs
    wishes = {f"quantization={config.quantization.name}": config.quantization.name != "none" and (trains or of_runs)}
    wishes[f"optimizer={config.optimizer.name}"] = config.optimizer.name != "adamw" and trains
    needing = [wish for wish, is_wished in wishes.items() if is_wished]
    absent = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if not needing or not absent:
        return []
    needed = f"{' and '.join(needing)}: {' and '.join(absent)} not installed"
    return [f"{needed}: pip install 'lora_exp[qlora]', or use quantization=none optimizer=adamw"]


def _number_problems(config: Config) -> list[str]:
    data, optimizer = config.data, config.optimizer
    problems = train_problems(config.train, kind_of(data).metrics)
    problems += _fraction_problems(data)
    if not (optimizer.lr > 0 and math.isfinite(optimizer.lr)):
        problems.append(f"optimizer.lr={optimizer.lr} must be a finite number above 0")
    problems += _lora_plus_problems(config)
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        problems.append(f"optimizer.betas={optimizer.betas} must be two numbers in [0, 1)")
    if optimizer.weight_decay < 0:
        problems.append(f"optimizer.weight_decay={optimizer.weight_decay} is below 0")
    if not 0 <= config.seed < 2**32:
        problems.append(f"seed={config.seed} is outside [0, 2**32)")
    if config.plan.gpu_gib is not None and not config.plan.gpu_gib > config.plan.reserve_gib:
        problems.append(
            f"plan.gpu_gib={config.plan.gpu_gib} must be above plan.reserve_gib={config.plan.reserve_gib}: such as 24"
        )
    if not config.plan.reserve_gib >= 0:
        problems.append(f"plan.reserve_gib={config.plan.reserve_gib} is below 0")
    return problems


def _fraction_problems(data: DataConfig) -> list[str]:
    problems = []
    if not 0 < data.val_fraction < 1:
        problems.append(f"data.val_fraction={data.val_fraction} is outside (0, 1)")
    if not 0 <= data.test_fraction < 1:
        problems.append(f"data.test_fraction={data.test_fraction} is outside [0, 1)")
    elif 0 < data.val_fraction < 1 <= data.val_fraction + data.test_fraction:
        both = f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction}"
        problems.append(f"{both} leave nothing to train on: lower one")
    if not 0 <= data.max_bad_fraction <= 1:
        problems.append(f"data.max_bad_fraction={data.max_bad_fraction} is outside [0, 1]")
    return problems


def _lora_plus_problems(config: Config) -> list[str]:
    ratio = config.optimizer.lora_plus_ratio
    if ratio is None:
        return []
    if not config.adapter.has_factors:
        return [f"optimizer.lora_plus_ratio={ratio} is for a factor B, which adapter={config.adapter.name} has not"]
    if not (ratio > 0 and math.isfinite(ratio)):
        return [f"optimizer.lora_plus_ratio={ratio} must be a finite number above 0, such as 16; null: as A's"]
    return []


def _not_among(key: str, value: str, choices: tuple[str, ...]) -> list[str]:
    return [] if value in choices else [f"{key}={value} is not known: choose one of {', '.join(choices)}"]


def _is_names(targets: object) -> bool:
    if isinstance(targets, str):
        return bool(targets)
    return isinstance(targets, list) and bool(targets) and all(isinstance(name, str) and name for name in targets)
