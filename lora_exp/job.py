"""One Hydra job as the runner sees it, and the ``result.json`` it leaves in its folder.

The file is the one record that a sweep's report reads, so that it does not matter in which process, or on
which machine, the job ran.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_exp.adapters.files.whole import write_text
from lora_exp.config import StudyConfig
from lora_exp.credentials import redacted
from lora_exp.task import tasks

RESULT_FILE = "result.json"
BEGUN_FILE = "begun.json"
METRICS_FILE = "metrics.jsonl"
IDENTITY_FILE = "identity.json"
IDENTITY_TAG = "job_identity"
TRACEBACK_FILE = "traceback.txt"
TEST_ROWS_FILE = "test_rows.json"  # what each test row came to
SWEPT_FILE = "swept.json"  # of a sweep's folder: the keys that differ between its jobs
STUDY_FILE = "study.json"  # of a sweep's folder: its section study
SWEEP_FILE = "sweep.json"  # of a sweep's folder: its parent run


@dataclass(frozen=True)
class Job:
    """``folder`` is the job's own. ``sweep_folder`` is None for a single run, ``swept`` are the keys that
    the sweep goes through. ``config_yaml`` is fully resolved. ``earlier``: how a job ended that was in the folder."""

    folder: Path
    number: int = 0
    overrides: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    config_yaml: str = ""
    sweep_folder: Path | None = None
    swept: tuple[str, ...] = ()
    earlier: Outcome | None = None


@dataclass(frozen=True)
class Result:
    """What a finished training found. Losses are in nats a prediction; ``adapter`` is the folder of the saved adapter.

    ``eval_loss`` and ``metrics``, what was found beside it, by name, are the saved adapter's, after optimizer step
    ``step``. ``best_loss`` and ``best_step``: of the best evaluation by ``train.best_metric``, whether it was saved or
    not. ``test``: what the saved adapter's test rows gave, if there are any. ``data_fingerprint``: ``Data``'s.
    ``pruned_at``: the optimizer step after which the sweep's pruner ended it.

    ``identity``: ``JobIdentity``'s digest. ``reused_from``: the MLflow run, or the folder, of the job that was run.
    """

    eval_loss: float
    eval_loss_before: float
    metrics: dict[str, float]
    trainable: int
    total: int
    adapter_bytes: int
    peak_memory_gib: float
    wall_s: float
    adapter: str
    run_id: str | None
    base_weight_bytes: int | None = None
    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    test: dict[str, float] = field(default_factory=dict)
    data_fingerprint: str = ""
    pruned_at: int | None = None
    adapter_sha256: str = ""
    identity: str = ""
    reused_from: str | None = None

    @property
    def objective(self) -> float:
        """What a sweeper minimises and a report sorts by."""
        return self.eval_loss


@dataclass(frozen=True)
class PlanResult:
    """What a plan found. ``adapter_bytes`` is the file's; the last three are None without ``plan.gpu_gib``."""

    trainable: int
    total: int
    adapter_bytes: int
    base_gib: float
    adapter_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    head_gib: float
    total_gib: float
    flops_per_step: int
    tokens_per_step: int
    fits: bool | None
    largest_batch: int | None
    largest_rank: int | None
    run_id: str | None

    @property
    def objective(self) -> float:
        """What a sweeper minimises and a report sorts by."""
        return self.total_gib


@dataclass(frozen=True)
class SyncResult:
    """What was delivered late: ``entries`` of ``runs`` runs. ``ended``: runs that were open and nobody's."""

    runs: int
    entries: int
    ended: int
    run_id: str | None = None

    @property
    def objective(self) -> float:
        """Nothing that is minimised; a job has one."""
        return 0.0


@dataclass(frozen=True)
class UseResult:
    """What came of a task on finished runs: ``figures`` by name, and the ``files`` or folders it left."""

    figures: dict[str, float] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    run_id: str | None = None

    @property
    def objective(self) -> float:
        """The loss, where one was taken."""
        return self.figures.get("loss", 0.0)


AnyResult = Result | PlanResult | SyncResult | UseResult


@dataclass(frozen=True)
class Outcome:
    """A job's end: ``status`` is FINISHED, FAILED or KILLED; ``values`` are its flat config values."""

    number: int
    status: str
    overrides: list[str]
    values: dict[str, object]
    result: AnyResult | None = None
    error: str | None = None

    @property
    def reused_from(self) -> str | None:
        """The MLflow run, or the folder, of the job that was run in its place, if one was."""
        return self.result.reused_from if isinstance(self.result, Result) else None


@dataclass(frozen=True)
class Begun:
    """What is known of a job from its beginning on: ``at`` is the time, ``steps`` how many optimizer steps it will
    make, as soon as that is known."""

    number: int
    overrides: list[str]
    at: float
    steps: int | None = None


def shown(metric: float) -> str:
    """A metric as a person reads it: a share to four places, what is larger to two."""
    return f"{metric:.{2 if metric > 1 else 4}f}"


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write ``result.json``, in which no login may stand."""
    text = json.dumps(asdict(outcome), indent=2)
    write_text(folder / RESULT_FILE, redacted(text) + "\n")


def write_begun(job: Job, steps: int | None = None) -> None:
    """Say that the job has begun, and later how long it will be. Nobody needs it to be said: a full disk is no end."""
    earlier = read_begun(job.folder) if steps else None
    begun = Begun(job.number, job.overrides, earlier.at if earlier else time.time(), steps)
    with contextlib.suppress(OSError):
        write_text(job.folder / BEGUN_FILE, redacted(json.dumps(asdict(begun))) + "\n")


def read_begun(folder: Path) -> Begun | None:
    """What the job in ``folder`` has said at its beginning; None if there is none."""
    try:
        return Begun(**json.loads((folder / BEGUN_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def job_folders(sweep: Path) -> list[Path]:
    """The folders below ``sweep`` in which a job has begun or ended; what is written there meanwhile is passed over."""
    found = []
    for place, below, files in os.walk(sweep):  # unlike a glob it minds no folder that goes away under its eyes
        if place != str(sweep) and not {BEGUN_FILE, RESULT_FILE}.isdisjoint(files):
            found.append(Path(place))
            below.clear()
    return sorted(found)


def filed(folder: Path, trace: str) -> str:
    """Keep a traceback in ``folder``. Returns the line that says where; none where it cannot be written."""
    try:
        (folder / TRACEBACK_FILE).write_text(redacted(trace))
    except OSError:
        return ""
    return f"\nThe traceback is in {folder / TRACEBACK_FILE}"


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome of the job in ``folder``; None if it left none."""
    file = folder / RESULT_FILE
    return parse_outcome(file.read_text()) if file.is_file() else None


def parse_outcome(text: str) -> Outcome:
    """What ``result.json`` says."""
    raw = json.loads(text)
    if "lr" in raw["values"]:  # as it was listed once
        raw["values"] = {"optimizer.lr" if key == "lr" else key: value for key, value in raw["values"].items()}
    result = raw.pop("result")
    kind = tasks[raw["values"].get("task", "train")].result
    if result and kind is Result and "metrics" not in result:  # as results were written once
        old = {name: result.pop(f"eval_{name}", None) for name in ("perplexity", "accuracy")}
        result["metrics"] = {name: value for name, value in old.items() if value is not None}
    return Outcome(**raw, result=kind(**result) if result else None)


def read_swept(sweep_folder: Path) -> tuple[str, ...]:
    """The keys that the sweep in ``sweep_folder`` goes through."""
    file = sweep_folder / SWEPT_FILE
    return tuple(json.loads(file.read_text())) if file.is_file() else ()


def write_test_rows(folder: Path, batches: list[dict[str, list[float]]]) -> None:
    """Keep what each test row came to, in their order: its ``loss`` (a sum), its ``count`` of predictions, …"""
    columns = {name: [value for batch in batches for value in batch[name]] for name in batches[0]}
    write_text(folder / TEST_ROWS_FILE, json.dumps(columns) + "\n")


def read_test_rows(folder: Path) -> dict[str, list[float]]:
    """The same; nothing where no test row was looked at."""
    file = folder / TEST_ROWS_FILE
    found: dict[str, list[float]] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def read_study(sweep_folder: Path) -> StudyConfig:
    """What the verdict on the sweep in ``sweep_folder`` is about."""
    file = sweep_folder / STUDY_FILE
    return StudyConfig(**json.loads(file.read_text())) if file.is_file() else StudyConfig()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The records of ``metrics.jsonl``; a line cut off by a crash is left out."""
    file = folder / METRICS_FILE
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
