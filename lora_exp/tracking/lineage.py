"""What MLflow lists a run by: who ran what from where, on which data, and the adapter that came of it."""

from __future__ import annotations

import getpass
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.config import DataConfig
from lora_exp.machine.cache import file_sha256
from lora_exp.tracking.provenance import git_facts, redacted

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

_DIGEST = 16  # MLflow takes 36 characters


def origin_tags() -> dict[str, str]:
    """The tags behind MLflow's columns Source, User and Version."""
    name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else ""
    source = "python -m lora_exp" if name in ("", "-c", "-m", "__main__.py") else name
    tags = {"mlflow.source.name": source, "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    git = {f"mlflow.source.git.{name}": value for name, value in git_facts().items()}
    return {key: redacted(value) for key, value in (tags | git).items() if value}


def data_facts(section: DataConfig, rows: Mapping[str, int]) -> dict[str, str]:
    """A dataset as MLflow lists it: its name, the hash of its files, where they come from, how many rows it has."""
    packaged = section.packaged
    if isinstance(section.path, str):
        digest, source = _digest_of(Path(section.path).expanduser()), {"path": section.path}
    elif packaged:
        digest = packaged.sha256[:_DIGEST]
        source = {"package": f"{packaged.distribution}=={packaged.version}", "file": packaged.file}
    else:
        digest, source = hashlib.sha256(section.label.encode()).hexdigest()[:_DIGEST], {}
    kind = "local" if section.path else "package"
    return {
        "name": section.label,
        "digest": digest,
        "source_type": kind,
        "source": json.dumps(source),
        "profile": json.dumps(dict(rows)),
    }


def log_dataset(client: MlflowClient, run_id: str, facts: Mapping[str, str]) -> None:
    """Fill the run's Dataset column."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    tag = InputTag("mlflow.data.context", "training")
    known = {name: redacted(value) for name, value in facts.items()}
    client.log_inputs(run_id, [DatasetInput(Dataset(**known), [tag])])


def log_model(client: MlflowClient, run_id: str, name: str, params: Mapping[str, object], step: int) -> None:
    """Fill the run's Model column. Its files are the run's own artifacts, which are not stored a second time."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    if run.outputs and run.outputs.model_outputs:  # told before
        return
    listed = {key: redacted(str(value))[:500] for key, value in params.items()}
    tags = {"files": f"{run.info.artifact_uri}/adapter"}
    experiment = run.info.experiment_id
    model = client.create_logged_model(
        experiment, name=name, source_run_id=run_id, params=listed, model_type="adapter", tags=tags
    )
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])


def take_over(client: MlflowClient, run_id: str, best: StoredRun) -> None:
    """List the data and the model of ``best`` for another run, too."""
    if best.inputs and best.inputs.dataset_inputs:
        client.log_inputs(run_id, best.inputs.dataset_inputs)
    if best.outputs and best.outputs.model_outputs:
        client.log_outputs(run_id, best.outputs.model_outputs)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no name for this user id, as in some containers
        return ""


def _digest_of(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    parts = [(file.name if file == path else str(file.relative_to(path)), file_sha256(file)) for file in files]
    whole = parts[0][1] if path.is_file() else hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return whole[:_DIGEST]
