"""What MLflow lists a run by: who ran what from where, on which data, and the adapter that came of it."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.tracking.provenance import git_facts, redacted

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient


def origin_tags() -> dict[str, str]:
    """The tags behind MLflow's columns Source, User and Version."""
    name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else ""
    source = "python -m lora_exp" if name in ("", "-c", "-m", "__main__.py") else name
    tags = {"mlflow.source.name": source, "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    git = {f"mlflow.source.git.{name}": value for name, value in git_facts().items()}
    return {key: redacted(value) for key, value in (tags | git).items() if value}


def log_dataset(client: MlflowClient, run_id: str, facts: Mapping[str, str]) -> None:
    """Fill the run's Dataset column; ``context`` among ``facts`` is training, validation or test."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    tag = InputTag("mlflow.data.context", facts["context"])
    known = {name: redacted(value) for name, value in facts.items() if name != "context"}
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
    """List the data and the model of ``best`` for another run, too, unless it has them."""
    own = client.get_run(run_id)
    listed = {_what(each) for each in own.inputs.dataset_inputs} if own.inputs else set()
    named = {each.model_id for each in own.outputs.model_outputs} if own.outputs else set()
    data = [each for each in best.inputs.dataset_inputs if _what(each) not in listed] if best.inputs else []
    models = [each for each in best.outputs.model_outputs if each.model_id not in named] if best.outputs else []
    if data:
        client.log_inputs(run_id, data)
    if models:
        client.log_outputs(run_id, models)


def _what(data: DatasetInput) -> tuple[object, ...]:
    return data.dataset.name, data.dataset.digest


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no name for this user id, as in some containers
        return ""
