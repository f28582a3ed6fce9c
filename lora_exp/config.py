"""Every section of the config as a dataclass, and the checks that need nothing but the config.

Imports nothing heavy, so that ``--help``, ``--cfg job`` and a config error answer at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

TASKS = ("train", "plan")
QUANTIZATIONS = ("none", "nf4", "fp4", "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes'
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
BACKENDS = ("native", "peft")
LAYERS = ("linear", "embedding", "conv2d", "all")
ADAPTERS = ("lora", "dora", "head", "full")
KNOBS = ("rank", "alpha", "scale", "dropout", "bias")  # of the factors: without them they have no meaning
BIASES = ("none", "all", "lora_only")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "linear", "constant")
# A kind is a file in data/ or models/; each kind of data with the kinds of model that learn from it.
DATA_KINDS = {"text": ("causal_lm",), "images": ("efficientnet_lite",)}
MODEL_KINDS = tuple(kind for kinds in DATA_KINDS.values() for kind in kinds)


@dataclass
class LayerConfig:
    """Which layer type is adapted: ``linear``, ``embedding``, ``conv2d`` or ``all``."""

    name: str = MISSING


@dataclass
class AdapterConfig:
    """What is trained: ``lora`` or ``dora`` factors, a new ``head`` alone, or the weights themselves (``full``)."""

    name: str = MISSING


@dataclass
class ScalingConfig:
    """``standard``: scale = alpha / rank. ``rslora``: scale = alpha / sqrt(rank)."""

    name: str = MISSING


@dataclass
class QuantizationConfig:
    """How the frozen base weights are stored.

    A block of ``block_size`` weights shares a constant; ``double_quant`` quantises those constants too (4 bit
    only). ``skip_modules``: dotted suffixes of layers that stay as they are, beside the output head.
    """

    name: str = MISSING
    double_quant: bool = False
    block_size: int = 64
    compute_dtype: str = "auto"
    skip_modules: list[str] | None = None


@dataclass
class PackagedConfig:
    """A file that a Python package carries: ``file`` is its path below site-packages.

    ``extra`` names the extra of this package that installs it, if one does.
    """

    distribution: str = MISSING
    version: str = MISSING
    file: str = MISSING
    sha256: str = MISSING
    extra: str | None = None


@dataclass
class ModelConfig:
    """The frozen base. ``path`` (a folder in hub layout) wins over ``packaged``, that over the hub's ``name``.

    ``architecture``: the facts of the published config.json that ``task=plan`` builds the model from.

    ``targets`` are its default targets by layer type; ``modules_to_save`` (a new head) are trained in full
    beside the adapter.
    """

    kind: str = "causal_lm"
    label: str | None = None
    name: str | None = None
    path: str | None = None
    revision: str | None = None
    packaged: PackagedConfig | None = None
    dtype: str = "auto"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    cache_dir: str | None = None
    targets: dict[str, list[str]] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)


@dataclass
class DataConfig:
    """Data to train on; ``val_fraction`` of it is held out.

    ``kind=text``: a block is ``block_size`` tokens. ``kind=images``: S × S pixels, S = ``image_size``;
    ``train_images`` of those not held out (null: all of them).
    """

    kind: str = "text"
    label: str = MISSING
    path: str | None = None
    packaged: PackagedConfig | None = None
    text_field: str = "text"
    group_by: list[str] = field(default_factory=list)
    block_size: int = 128
    val_fraction: float = 0.05
    image_size: int = 64
    train_images: int | None = None
    cache_dir: str | None = None


@dataclass
class TrainConfig:
    """``steps``, ``eval_every`` and ``log_every`` count optimizer steps, ``eval_blocks`` rows (blocks, images)."""

    steps: int = 24
    micro_batch_size: int = 4
    grad_accum_steps: int = 1
    warmup_steps: int = 2
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    eval_every: int = 12
    eval_blocks: int = 32
    log_every: int = 1
    gradient_checkpointing: bool = False


@dataclass
class PlanConfig:
    """``gpu_gib``: the memory to fit into; ``reserve_gib`` of it is for the CUDA context and fragmentation.

    ``check``: let ``task=train`` look first whether it will fit; ``strict``: refuse to train if not.
    """

    gpu_gib: float | None = None
    reserve_gib: float = 1.0
    check: bool = True
    strict: bool = False


@dataclass
class OptimizerConfig:
    """AdamW (arXiv:1711.05101); its states in 8 bits with ``adamw_8bit`` and ``paged_adamw_8bit``."""

    name: str = MISSING
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8


@dataclass
class TrackingConfig:
    """Where MLflow runs go. ``uri`` null: MLFLOW_TRACKING_URI, else ``outputs/mlflow.db``."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "lora_exp"
    run_name: str | None = None


@dataclass
class Config:
    """One experiment."""

    layer: LayerConfig = field(default_factory=LayerConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    task: str = "train"
    rank: int = 8
    alpha: Any = 16
    dropout: float = 0.0
    bias: str = "none"
    targets: Any = None
    seed: int = 0
    backend: str = "native"
    device: str = "auto"


class ConfigError(ValueError):
    """Every problem of one config, all at once."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        head = "The config has a problem:" if len(problems) == 1 else f"The config has {len(problems)} problems:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in problems)]))


def register() -> None:
    """Put the schema where the defaults list of ``conf/config.yaml`` finds it."""
    ConfigStore.instance().store(name="schema", node=Config)


def conf_folder() -> Path:
    """The folder of YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def to_config(composed: DictConfig) -> Config:
    """Turn what Hydra composed into dataclasses, once. Raises ``ConfigError`` for values that are not set."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError([f"{key} is not set: add {key}=VALUE" for key in missing])
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    model = config.model
    model.label = model.label or model.name or (Path(model.path).name if model.path else None)
    return config


def check(config: Config) -> None:
    """Raise ``ConfigError`` with every problem that can be seen before anything is loaded."""
    problems = [*_adapter_problems(config), *_place_problems(config), *_number_problems(config)]
    if problems:
        raise ConfigError(problems)


def resolve_alpha(alpha: Any, rank: int) -> float:
    """Alpha as a number: 16 → 16.0, ``"2r"`` → 2 · rank. Raises ValueError for anything else."""
    multiple = re.fullmatch(r"\s*(\d+(?:\.\d+)?)?\s*r\s*", str(alpha))
    try:
        value = float(multiple[1] or 1) * rank if multiple else float(alpha)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(alpha, bool) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"alpha={alpha} is neither a positive number nor a multiple of the rank: try 16 or 2r")
    return value


def uses_factors(config: Config) -> bool:
    """Whether LoRA's factors are what is trained, so that rank, alpha, scaling and layer have a meaning."""
    return config.adapter.name in ("lora", "dora")


def default_targets(config: Config) -> list[str]:
    """The model's own targets for the layer type; of all types for ``layer=all``; [] if it names none."""
    named = config.model.targets
    if config.layer.name == "all":
        return list(dict.fromkeys(target for targets in named.values() for target in targets))
    return list(named.get(config.layer.name, []))


def scale_of(config: Config) -> float:
    """The factor in front of AB: alpha / rank, or alpha / sqrt(rank)."""
    alpha = resolve_alpha(config.alpha, config.rank)
    return alpha / (math.sqrt(config.rank) if config.scaling.name == "rslora" else config.rank)


def flat_values(config: Config) -> dict[str, Any]:
    """The config as short names and plain values: what a run is listed and compared by.

    A group stands under its own name (``model``, ``adapter``, …), its other fields as ``group.field``.
    """
    sections = asdict(config)
    values = {key: value for key, value in sections.items() if not isinstance(value, dict)}
    for key, value in sections.items():
        if isinstance(value, dict):
            values |= _flat_section(key, value)
    values["lr"] = values.pop("optimizer.lr")
    if not uses_factors(config):  # LoRA's knobs have no meaning there, and would group unlike runs
        return {key: value for key, value in values.items() if key not in KNOBS}
    with contextlib.suppress(ValueError, ZeroDivisionError):  # a config that check() refuses is listed as it is
        values |= {"alpha": resolve_alpha(config.alpha, config.rank), "scale": scale_of(config)}
    return values


# Fields of the data section that are another kind's.
_OTHER_KIND = {
    "text": ("image_size", "train_images"),
    "images": ("text_field", "group_by", "block_size"),
}


def _flat_section(group: str, section: dict[str, Any]) -> dict[str, Any]:
    if group == "tracking":
        return {}
    if group == "plan":
        return {"plan.gpu_gib": section["gpu_gib"]} if section["gpu_gib"] else {}
    title = "label" if section.get("label") else "name"
    values = {group: section[title]} if title in section else {}
    if group == "quantization":  # what is at its default is left out, as none has no use for it
        section = {name: value for name, value in section.items() if value != getattr(QuantizationConfig, name, None)}
    skipped = {
        title,
        "kind",
        "packaged",
        "cache_dir",
        "targets",
        "architecture",
        *_OTHER_KIND.get(section.get("kind", ""), ()),
    }
    rest = {f"{group}.{name}": value for name, value in section.items() if name not in skipped}
    return values | {key: value for key, value in rest.items() if value not in (None, {}, [])}


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
    problems += _not_among("backend", config.backend, BACKENDS)
    if not uses_factors(config) and config.backend == "peft":
        problems.append(
            f"backend=peft has no adapter={config.adapter.name}: use backend=native, which trains weights themselves"
        )
    problems += _not_among("layer.name", config.layer.name, LAYERS)
    return problems + _not_among("adapter.name", config.adapter.name, ADAPTERS) + _target_problems(config)


def _target_problems(config: Config) -> list[str]:
    model, label = config.model, config.model.label or config.model.name
    if config.adapter.name == "head" and not model.modules_to_save:
        return [f"adapter=head trains model.modules_to_save alone, and model={label} has none: name them, or use lora"]
    if config.adapter.name == "head" and config.targets is not None:
        return [f"targets={config.targets} has no meaning with adapter=head: leave it out, or use adapter=lora"]
    if uses_factors(config) and config.targets is None and model.targets and not default_targets(config):
        return [
            f"layer={config.layer.name}: model={label} names targets for {', '.join(model.targets)} alone: "
            f"choose one of them, or name yours, such as targets=[NAME]"
        ]
    return []


def _place_problems(config: Config) -> list[str]:
    problems = _not_among("task", config.task, TASKS)
    problems += _not_among("model.dtype", config.model.dtype, DTYPES)
    if not (config.model.name or config.model.path or config.model.packaged):
        problems.append("no model is named: add model.name=ORG/NAME (hub) or model.path=FOLDER (hub layout)")
    problems += _kind_problems(config)
    problems += _quantization_problems(config)
    if not (config.data.path or config.data.packaged):
        problems.append(f"data={config.data.label} names no files: add data.path=FILE_OR_FOLDER")
    if config.tracking.uri and urlsplit(config.tracking.uri).password:
        problems.append(
            "tracking.uri holds a password, which would be written to disk: put the address in MLFLOW_TRACKING_URI, "
            "or the login in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return problems


def _kind_problems(config: Config) -> list[str]:
    model, data = config.model, config.data
    problems = _not_among("model.kind", model.kind, MODEL_KINDS) + _not_among("data.kind", data.kind, tuple(DATA_KINDS))
    if not problems and model.kind not in DATA_KINDS[data.kind]:
        problems.append(
            f"model={model.label or model.name} ({model.kind}) does not learn from data={data.label} ({data.kind}): "
            f"choose a model of kind {' or '.join(DATA_KINDS[data.kind])}, or other data"
        )
    return problems


def _quantization_problems(config: Config) -> list[str]:
    section = config.quantization
    problems = _not_among("quantization", section.name, QUANTIZATIONS)
    problems += _not_among("quantization.compute_dtype", section.compute_dtype, DTYPES)
    if section.block_size not in BLOCK_SIZES:
        listed = ", ".join(map(str, BLOCK_SIZES))
        problems.append(f"quantization.block_size={section.block_size} is not a block size: use one of {listed}")
    if section.name == "int8" and (section.double_quant or section.block_size != QuantizationConfig.block_size):
        problems.append("quantization=int8 has one constant a row: leave double_quant and block_size to nf4 and fp4")
    if section.name != "none" and config.model.kind != "causal_lm":
        problems.append(f"quantization={section.name} is for language models: use quantization=none")
    if section.name != "none" and config.adapter.name == "full":
        problems.append(f"quantization={section.name} freezes what adapter=full would train: use adapter=lora")
    return problems + _not_among("optimizer", config.optimizer.name, OPTIMIZERS) + _missing_library(config)


def _missing_library(config: Config) -> list[str]:
    """bitsandbytes, and what transformers quantises with, are an extra; looking is not importing."""
    wishes = {f"quantization={config.quantization.name}": config.quantization.name != "none"}
    wishes[f"optimizer={config.optimizer.name}"] = config.optimizer.name != "adamw"
    needing = [wish for wish, is_wished in wishes.items() if is_wished and config.task == "train"]
    absent = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if not needing or not absent:
        return []
    needed = f"{' and '.join(needing)}: {' and '.join(absent)} not installed"
    return [f"{needed}: pip install 'lora_exp[qlora]', or use quantization=none optimizer=adamw"]


def _number_problems(config: Config) -> list[str]:
    train, data, optimizer = config.train, config.data, config.optimizer
    at_least_one = {
        "train.steps": train.steps,
        "train.micro_batch_size": train.micro_batch_size,
        "train.grad_accum_steps": train.grad_accum_steps,
        "train.eval_every": train.eval_every,
        "train.eval_blocks": train.eval_blocks,
        "train.log_every": train.log_every,
    }
    problems = [f"{key}={value} is below 1" for key, value in at_least_one.items() if value < 1]
    if not 0 <= train.warmup_steps <= train.steps:
        problems.append(f"train.warmup_steps={train.warmup_steps} is outside [0, train.steps={train.steps}]")
    if not train.max_grad_norm > 0:
        problems.append(f"train.max_grad_norm={train.max_grad_norm} must be above 0: use inf to switch clipping off")
    if data.block_size < 2:
        problems.append(f"data.block_size={data.block_size} is below 2: a block needs a token to predict from")
    if data.image_size < 8:
        problems.append(f"data.image_size={data.image_size} is below 8: 64 is fast, 224 what most bases know")
    if data.train_images is not None and data.train_images < 1:
        problems.append(f"data.train_images={data.train_images} is below 1: leave it out to train on all")
    if not 0 < data.val_fraction < 1:
        problems.append(f"data.val_fraction={data.val_fraction} is outside (0, 1)")
    if not (optimizer.lr > 0 and math.isfinite(optimizer.lr)):
        problems.append(f"optimizer.lr={optimizer.lr} must be a finite number above 0")
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
    return problems + _not_among("train.schedule", train.schedule, SCHEDULES)


def _not_among(key: str, value: str, choices: tuple[str, ...]) -> list[str]:
    return [] if value in choices else [f"{key}={value} is not known: choose one of {', '.join(choices)}"]


def _is_names(targets: Any) -> bool:
    if isinstance(targets, str):
        return bool(targets)
    return isinstance(targets, list) and bool(targets) and all(isinstance(name, str) and name for name in targets)
