"""Runs that have ended, as MLflow knows them: where their files are, and what is found out about them later."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from lora_exp.adapters.files.whole import write_text
from lora_exp.config import TrackingConfig
from lora_exp.credentials import redacted
from lora_exp.errors import UserError
from lora_exp.job import IDENTITY_FILE, IDENTITY_TAG, METRICS_FILE, read_outcome
from lora_exp.machine.cache import cache_root, made_once
from lora_exp.tracking import database
from lora_exp.tracking.client import TrackingError, checked_client, said_clearly, tracking_uri, without_retries
from lora_exp.tracking.telling import is_missing

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_ENDED = "attributes.status = 'FINISHED'"
REUSED_TAG = "reused_from"  # the run, or the folder, of the job that did a run's work
PRUNED_TAG = "pruned_at"  # of a run that was ended before its last step, as it could not win
RUN_ID_FILE = "run_id"  # of a folder that was fetched
_CHUNK = 100  # points that MLflow takes in one call
_FETCHED = ("config.yaml", "adapter", METRICS_FILE, IDENTITY_FILE)


def same_jobs(section: TrackingConfig, identity: str) -> list[tuple[str, Path | None]]:
    """The finished runs of jobs with this identity that did the work themselves, the newest first: each run's id, and
    its folder where that is here. Raises TrackingError for a server that cannot be reached."""
    file = database.file_of(tracking_uri(section))
    if file is not None and not file.exists():
        return []
    with said_clearly(section), without_retries():
        client = checked_client(section)
        numbers = [experiment.experiment_id for experiment in client.search_experiments()]
        wanted = f"{_ENDED} and tags.{IDENTITY_TAG} = '{identity}'"
        runs = client.search_runs(numbers, wanted, max_results=100, order_by=["attributes.start_time DESC"])
    own = [run for run in runs if not {REUSED_TAG, PRUNED_TAG} & set(run.data.tags)]
    return [(run.info.run_id, _folder_here(run)) for run in own]


def has_run(section: TrackingConfig, run_id: str) -> bool:
    """Whether the store has the run. Raises TrackingError for a server that cannot be reached."""
    with said_clearly(section), without_retries():
        return _is_there(checked_client(section), run_id)


def local_folder(section: TrackingConfig, run_id: str) -> Path:
    """The folder of a run: where it was written, or a copy of its artifacts where that is another machine's.

    Raises UserError for a run that the store has not, or that has no adapter there.
    """
    with said_clearly(section), without_retries():
        client = checked_client(section)
        run = _run(client, run_id)
        return _folder_here(run) or _downloaded(client, run)


def folders(section: TrackingConfig, of: str) -> list[Path]:
    """Those of the finished runs of a sweep (its run's id), of one run (its id) or of an experiment (its name).

    Runs whose folders are not here are left out, which is said.
    """
    with said_clearly(section), without_retries():
        client = checked_client(section)
        if _RUN_ID.fullmatch(of):
            named = _run(client, of)
            children = f"{_ENDED} and tags.`mlflow.parentRunId` = '{of}'"
            runs = _all(client, named.info.experiment_id, children) or [named]
        else:
            found = client.get_experiment_by_name(of)
            if found is None:
                raise UserError(f"best.of={of} is no folder, no MLflow experiment and no run's id: mend it")
            runs = [run for run in _all(client, found.experiment_id, _ENDED) if _is_job(run)]
    places = [_folder_here(run) for run in runs]
    if missing := sum(place is None for place in places):
        log.warning(
            f"The folders of {missing} of {len(runs)} runs of {of} are not here, so that these are left out: "
            "one of them is named by its id, run=ID"
        )
    return list(dict.fromkeys(place for place in places if place is not None))


def _is_job(run: StoredRun) -> bool:
    return run.data.tags.get("lora_exp.kind") != "sweep"


def _folder_here(run: StoredRun) -> Path | None:
    """Where the run was written, unless that is another machine's, or a later run has taken its place."""
    tag = run.data.tags.get("folder")
    if not tag or not Path(tag).is_dir():
        return None
    outcome = read_outcome(Path(tag))
    result = outcome.result if outcome is not None else None
    is_anothers = result is not None and result.run_id not in (None, run.info.run_id)
    return None if is_anothers else Path(tag)


def _all(client: MlflowClient, experiment: str, wanted: str) -> list[StoredRun]:
    found: list[StoredRun] = []
    page = client.search_runs([experiment], wanted, max_results=1000)
    found += page
    while page.token:
        page = client.search_runs([experiment], wanted, max_results=1000, page_token=page.token)
        found += page
    return found


def _run(client: MlflowClient, run_id: str) -> StoredRun:
    try:
        return client.get_run(run_id)
    except Exception as error:
        if not is_missing(error):
            raise
        raise UserError(f"MLflow has no run {run_id}: mend tracking.uri, or name the run's folder") from error


def _downloaded(client: MlflowClient, run: StoredRun) -> Path:
    run_id = run.info.run_id
    stored = {file.path for file in client.list_artifacts(run_id)}
    origin = run.data.tags.get(REUSED_TAG, "")
    if "adapter" not in stored and _RUN_ID.fullmatch(origin) and origin != run_id:
        return _downloaded(client, _run(client, origin))
    if not {"adapter", "config.yaml"} <= stored:
        raise UserError(
            f"run={run_id}: its folder is not here, and MLflow has no adapter of it: name a run whose training came to "
            "an evaluation"
        )

    def fetch(partial: Path) -> None:
        for name in (name for name in _FETCHED if name in stored):
            client.download_artifacts(run_id, name, str(partial))
        write_text(partial / RUN_ID_FILE, run_id)

    return made_once(cache_root() / "runs" / run_id, fetch)


def known(section: TrackingConfig, run_ids: Sequence[str]) -> list[str]:
    """Those of the runs that the store has. Raises TrackingError for a server that cannot be reached."""
    file = database.file_of(tracking_uri(section))
    if file is not None and not file.exists():
        log.info(f"{file} is not here: nothing is told to MLflow")
        return []
    with said_clearly(section), without_retries():
        client = checked_client(section)
        found = [run_id for run_id in run_ids if _is_there(client, run_id)]
    if missing := len(run_ids) - len(found):
        log.info(f"MLflow at {redacted(tracking_uri(section))} has {missing} of the runs not: it is not told of them")
    return found


def log_figures(
    section: TrackingConfig, run_id: str, figures: Mapping[str, float], step: int, file: Path,
    folder: str | None = None, tags: Mapping[str, str] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Add figures to a run that has ended, which stays as it ended, and with ``folder`` the file that has them.

    What was found once more at the same step is told again: the later one is what MLflow shows. What fails costs a
    warning, as all of it is in the file.
    """
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    points = [Metric(name, value, now, step) for name, value in figures.items()]
    try:
        with said_clearly(section), without_retries():
            client = checked_client(section)
            for start in range(0, len(points), _CHUNK):
                client.log_batch(run_id, metrics=points[start : start + _CHUNK])
            client.log_batch(run_id, tags=[RunTag(key, redacted(value)) for key, value in tags.items()])
            if folder is not None:
                client.log_artifact(run_id, str(file), folder)
    except TrackingError as error:
        log.warning(f"MLflow lacks what was found ({error}): it is in {file}")


def _is_there(client: MlflowClient, run_id: str) -> bool:
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except Exception as error:
        if not is_missing(error):
            raise
        return False
