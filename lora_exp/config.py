"""Every section of the config as a dataclass, and what follows from a config alone.

Imports nothing heavy, so that ``--help``, ``--cfg job`` and a config error answer at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import MISSING

from lora_exp.adapters.config import scaling_factor
from lora_exp.errors import UserError
from lora_exp.registry import Registry
from lora_exp.use_config import AnalyseConfig, BestConfig, EvaluateConfig, ExportConfig, GenerateConfig, ServeConfig

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes'
DEFAULT_STEPS, DEFAULT_WARMUP_STEPS = 24, 2


@dataclass
class LayerConfig:
    """Which ``types`` of layers are adapted, by the names that the library's layers have; ``[all]``: every type."""

    name: str = MISSING
    types: list[str] = MISSING


@dataclass
class AdapterConfig:
    """What is trained: an adapter of a ``variant`` with that variant's ``options``, or of PEFT's ``method`` with PEFT's
    (of both, ``config`` is a file in the form of its adapter_config.json); or weights of the base itself: those of
    ``model.modules_to_save`` (``trains=modules_to_save``) or all (``trains=weights``).
    """

    name: str = MISSING
    variant: str | None = None
    method: str | None = None
    config: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    trains: str = "adapter"

    @property
    def is_added(self) -> bool:
        """Whether something is added to the base, which stays as it is."""
        return self.trains == "adapter"

    @property
    def has_factors(self) -> bool:
        """Whether that is of a variant of ours, so that rank, alpha, scaling and start have a meaning."""
        return self.is_added and self.variant is not None


@dataclass
class StartConfig:
    """How an adapter's factors begin, with what that start alone can be told."""

    name: str = "default"
    options: dict[str, Any] = field(default_factory=dict)


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
    """A file that a Python package carries, or a folder: ``file`` is its path below site-packages.

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

    ``attention``: transformers' name of an implementation; ``auto`` is sdpa where the model has it, else eager.

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
    attention: str = "auto"
    trust_remote_code: bool = False
    cache_dir: str | None = None
    targets: dict[str, list[str]] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)


@dataclass
class DataConfig:
    """Data to train on, validate with and test with. A ``kind`` has fields of its own (``data/kinds/``).

    ``path``: a file or folder, a list of them, or {FILE: weight}: a training record occurs as often an epoch as its
    weight says, of a fraction those that ``sample_seed`` draws. ``name``: a dataset of the hub, or a folder in hub
    layout, with its ``subset``, ``revision`` and ``split`` (null: train). Each wins over ``packaged``.

    ``val_fraction`` and ``test_fraction`` are held out, unless a path or a split of its own is named.
    ``max_bad_fraction``: the largest share of broken records that is passed over.

    ``forget``: other data on which the loss is taken before training and after: the name of a file in ``conf/data``, a
    YAML file like those, or a path to text; ``train.eval_blocks`` rows of it.

    ``new_head``: whether a language model gets a new head for it, of an output a class.
    """

    new_head: ClassVar[bool] = False
    kind: str = "text"
    label: str = MISSING
    path: Any = None
    packaged: PackagedConfig | None = None
    name: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str | None = None
    validation_path: Any = None
    test_path: Any = None
    validation_split: str | None = None
    test_split: str | None = None
    val_fraction: float = 0.05
    test_fraction: float = 0.0
    max_bad_fraction: float = 0.0
    sample_seed: int = 0
    forget: str | None = None
    cache_dir: str | None = None


data_kinds: Registry[type[DataConfig]] = Registry("data.kind", "lora_exp.data.kinds")


@dataclass
class TrainConfig:
    """How long to train: ``steps`` (optimizer steps) or ``epochs``; neither: 24 steps. How, and what to keep.

    ``eval_every``, ``log_every`` and ``save_every`` are optimizer steps (12) or epochs ("0.5 epoch"); 0: never between
    the start and the end. Of the checkpoints the last ``keep_checkpoints`` and the best stay; 0: none is written.
    ``eval_blocks`` counts rows (blocks, images). ``drop_last``: of each epoch, a last micro batch that is not full.
    ``schedule_options``: a mapping of what the schedule can be told. ``warmup_steps`` or ``warmup_ratio``, of all
    steps; neither: 2 steps.

    ``keep``: the adapter of the ``last`` evaluation or of the ``best`` by ``best_metric``; null: the last, with early
    stopping the best. ``early_stopping``: after so many evaluations in a row that are not better by ``min_delta``.
    ``metrics``: of each evaluation, beside those that the kind of data has. ``test``: look at the test rows, once, at
    the end.
    """

    steps: int | None = field(default=None, metadata={"such_as": DEFAULT_STEPS})
    epochs: float | None = field(default=None, metadata={"such_as": 3})
    micro_batch_size: int = 4
    grad_accum_steps: int = 1
    drop_last: bool = False
    warmup_steps: int | None = field(default=None, metadata={"such_as": DEFAULT_WARMUP_STEPS})
    warmup_ratio: float | None = field(default=None, metadata={"such_as": 0.03})
    schedule: str = "cosine"
    schedule_options: Any = None
    max_grad_norm: float = 1.0
    eval_every: Any = 12
    eval_blocks: int = 32
    log_every: Any = 1
    save_every: Any = 12
    keep_checkpoints: int = 2
    best_metric: str = "eval/loss"
    keep: str | None = None
    early_stopping: int | None = field(default=None, metadata={"such_as": 3})
    min_delta: float = 0.0
    gradient_checkpointing: bool = False
    metrics: list[str] = field(default_factory=list)
    test: bool = True

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter that stays is the best evaluation's, not the last's."""
        return self.keep == "best" or (self.keep is None and self.early_stopping is not None)


@dataclass
class MachineConfig:
    """What this machine is fast in: ``auto`` measures it once (see ``machine/precision.py``).

    ``bf16``: bfloat16 products on a CPU as they are (``native``), in ``float32`` inside where there are many rows, or
    in ``float32_few`` also where there are few; which also decides what ``model.dtype=auto`` is there. ``float32``:
    such products by ``blas`` or ``onednn``.
    """

    bf16: str = "auto"
    float32: str = "auto"


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
    """AdamW (arXiv:1711.05101); its states in 8 bits with ``adamw_8bit`` and ``paged_adamw_8bit``.

    ``lora_plus_ratio``: how many times ``lr`` B's learning rate is (LoRA+, arXiv:2402.12354); null: as A's.
    """

    name: str = MISSING
    lr: float = 1e-3
    lora_plus_ratio: float | None = None
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8


@dataclass
class PruneConfig:
    """Whether a sweep's jobs end early: ``pruner``, a class of ``optuna.pruners`` with its ``options``, or null.

    ``keep``: keys such as ``rank``; of the jobs that have the same value of one, the last is never cut.
    """

    name: str = "none"
    pruner: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    keep: list[str] = field(default_factory=list)


@dataclass
class TrackingConfig:
    """Where MLflow runs go. ``uri`` null: MLFLOW_TRACKING_URI, else ``outputs/mlflow.db``.

    ``system_metrics``: what the machine does meanwhile, under ``system/``; null: as
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING says, and else it is logged. ``register``: the name in MLflow's registry that
    the result is a version of, as a model that answers prompts; after training, or of ``task=export export=mlflow``.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "lora_exp"
    run_name: str | None = None
    system_metrics: bool | None = None
    register: str | None = None


@dataclass
class StudyConfig:
    """What a sweep's verdict is about.

    ``tune``: the swept keys of which each arm gets its best value, by validation. ``replicates``: how many seeds each
    arm is trained with, from ``seed`` on; null: one, or as many as ``seed`` is swept, and five with
    hydra/sweeper=study. That one tunes with ``tune_replicates`` seeds of their own, and adds up to ``widen`` values
    where a best one lies on its grid's edge.

    ``metric``: what arms are compared by. ``margin``: the difference in it below which nobody would care.
    """

    tune: list[str] = field(default_factory=list)
    replicates: int | None = field(default=None, metadata={"such_as": 5})
    tune_replicates: int = 2
    widen: int = 2
    metric: str = "loss"
    margin: float = 0.01


@dataclass
class SweepConfig:
    """``reuse``: a job that has finished before with the same identity is not run again, and one that was interrupted
    goes on; null: in sweeps (``-m``), and not in single runs.
    """

    reuse: bool | None = field(default=None, metadata={"such_as": True})


@dataclass
class Config:
    """One experiment. ``plugins``: modules of the user's own, imported before the config is checked.

    ``resume``: what to go on from: ``auto`` (the job's own folder, if it holds a checkpoint), another run's folder, or
    the id of its MLflow run; null: begin anew.

    ``run``: what tasks on finished runs are about: an MLflow run's id, a run's or an adapter's folder, ``best``, or a
    list of them; of ``task=sync`` the folder that is looked into.

    ``suite``: a folder in the form of PEFT's method_comparison, and which of its experiments (METHOD/NAME) this is.
    """

    layer: LayerConfig = field(default_factory=LayerConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    start: StartConfig = field(default_factory=StartConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    best: BestConfig = field(default_factory=BestConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    analyse: AnalyseConfig = field(default_factory=AnalyseConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    task: str = "train"
    run: Any = None
    rank: int = 8
    alpha: Any = 16
    dropout: float = 0.0
    bias: str = "none"
    targets: Any = None
    seed: int = 0
    backend: str = "native"
    trainer: str = "native"
    parallel: str = "auto"
    device: str = "auto"
    resume: str | None = None
    plugins: list[str] = field(default_factory=list)
    suite: str | None = None
    suite_experiment: str | None = None


class ConfigError(UserError):
    """Every problem of one config, all at once."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        head = "The config has a problem:" if len(problems) == 1 else f"The config has {len(problems)} problems:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in problems)]))


def conf_folder() -> Path:
    """The folder of YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def resolve_alpha(alpha: object, rank: int) -> float:
    """Alpha as a number: 16 → 16.0, ``"2r"`` → 2 · rank. Raises UserError for anything else."""
    multiple = re.fullmatch(r"\s*(\d+(?:\.\d+)?)?\s*r\s*", str(alpha))
    try:
        value = float(multiple[1] or 1) * rank if multiple else float(str(alpha))
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(alpha, bool) or not math.isfinite(value) or value <= 0:
        raise UserError(f"alpha={alpha} is neither a positive number nor a multiple of the rank: try 16 or 2r")
    return value


def default_targets(config: Config) -> list[str]:
    """The model's own targets for the layer type; of all types for ``layer=all``; [] if it names none."""
    named = config.model.targets
    kinds = list(named) if config.layer.types == ["all"] else config.layer.types
    return list(dict.fromkeys(target for kind in kinds for target in named.get(kind, [])))


def scale_of(config: Config) -> float:
    """The factor in front of AB, by the library's rule."""
    alpha = resolve_alpha(config.alpha, config.rank)
    return scaling_factor(config.rank, alpha, uses_rslora(config))


def uses_rslora(config: Config) -> bool:
    """Whether the scaling's rule is rank-stabilised."""
    return config.scaling.name == "rslora"
