"""Where the files of runs are that MLflow knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.adapters.files.whole import write_text
from lora_exp.config import TrackingConfig
from lora_exp.errors import UserError
from lora_exp.machine.cache import cache_root
from lora_exp.machine.saving import replace_folder
from lora_exp.tracking.client import checked_client, said_clearly, without_retries
from lora_exp.tracking.telling import is_missing

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_ENDED = "attributes.status = 'FINISHED'"
_NEEDED = ("config.yaml", "adapter")


def local_folder(section: TrackingConfig, run_id: str) -> Path:
    """The folder of a run: where it was written, or a copy of its artifacts where that is another machine's.

    Raises UserError for a run that the store has not, or that has no adapter there.
    """
    with said_clearly(section), without_retries():
        client = checked_client(section)
        run = _run(client, run_id)
        folder = Path(run.data.tags.get("folder", ""))
        if run.data.tags.get("folder") and folder.is_dir():
            return folder
        return _downloaded(client, run)


def folders(section: TrackingConfig, of: str) -> list[Path]:
    """Those of the finished runs of a sweep (its run's id) or of an experiment (its name)."""
    with said_clearly(section), without_retries():
        client = checked_client(section)
        if _RUN_ID.fullmatch(of):
            parent = _run(client, of)
            experiment, wanted = parent.info.experiment_id, f"{_ENDED} and tags.`mlflow.parentRunId` = '{of}'"
        else:
            found = client.get_experiment_by_name(of)
            if found is None:
                raise UserError(f"best.of={of} is no folder, no MLflow experiment and no run's id: mend it")
            experiment, wanted = found.experiment_id, _ENDED
        runs = _all(client, experiment, wanted)
    places = [Path(run.data.tags["folder"]) for run in runs if "folder" in run.data.tags]
    return [place for place in places if (place / "result.json").is_file()]


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
    folder: Path = cache_root(None) / "runs" / run_id
    if folder.is_dir():
        return folder
    if "adapter" not in {file.path for file in client.list_artifacts(run_id)}:
        raise UserError(f"run={run_id} has no adapter among its artifacts in MLflow, and its folder is not here")

    def fetch(partial: Path) -> None:
        partial.mkdir(parents=True)
        for name in _NEEDED:
            client.download_artifacts(run_id, name, str(partial))
        write_text(partial / "run_id", run_id)

    folder.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(folder, fetch)
    return folder
