"""MLflow models: a folder that ``mlflow.pyfunc`` loads and serves, and its place in MLflow's registry."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.config import TrackingConfig
from lora_exp.credentials import redacted
from lora_exp.errors import UserError
from lora_exp.tracking import artifacts
from lora_exp.tracking.client import (
    checked_client,
    environment,
    experiment_id,
    reason,
    said_clearly,
    set_defaults,
    tracking_uri,
)
from lora_exp.tracking.provenance import library_versions
from lora_exp.tracking.telling import is_missing

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient
    from torch import nn

log = logging.getLogger(__name__)
CODE = Path(__file__).with_name("answering.py")
FACTS = "facts.json"
_NEEDED = ("torch", "transformers", "mlflow")
_MODEL = "model"


def save_answering(
    folder: Path, write: Callable[[Path], object], facts: Mapping[str, Any], example: Mapping[str, Any]
) -> None:
    """Fill ``folder``, which is empty, with an MLflow model that answers by the transformers model that ``write`` puts
    into a folder of it. ``facts``: ``prompt``, how one is put to it (chat, text, classes). ``example``: an input."""
    set_defaults()
    import mlflow.pyfunc
    import pandas
    from mlflow.models import Model

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells each of its steps

    versions = library_versions()
    with tempfile.TemporaryDirectory() as temporary:  # MLflow copies what it is given, and weights are large
        stub = Path(temporary) / _MODEL
        stub.mkdir()
        (stub / FACTS).write_text("{}")
        mlflow.pyfunc.save_model(
            path=folder,
            python_model=str(CODE),
            artifacts={_MODEL: str(stub)},
            signature=_signature(facts["prompt"]),
            input_example=pandas.DataFrame([dict(example)]),
            pip_requirements=[f"{name}=={versions[name]}" for name in _NEEDED] + ["safetensors", "accelerate"],
            metadata={key: value for key, value in facts.items() if isinstance(value, str)},
        )
    place = folder / "artifacts" / _MODEL
    write(place)
    (place / FACTS).write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")
    described = Model.load(folder / "MLmodel")
    described.model_size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    described.save(folder / "MLmodel")


def answering_model(folder: Path) -> nn.Module:
    """What ``mlflow.pyfunc`` loads of ``folder``, once it has answered the model's own example."""
    set_defaults()
    import mlflow.pyfunc

    loaded = mlflow.pyfunc.load_model(str(folder))
    answers = loaded.predict(loaded.input_example, params={"max_new_tokens": 4})
    if not len(answers):
        raise UserError("mlflow.pyfunc gives no answer to the model's own example")
    model: nn.Module = loaded.unwrap_python_model().model
    return model


def register(section: TrackingConfig, name: str, folder: Path, facts: Mapping[str, Any]) -> str:
    """Make the MLflow model in ``folder`` the next version of ``name``. Returns its address (models:/NAME/VERSION).

    Its weights are stored once where MLflow's artifacts are on this machine. Raises TrackingError.
    """
    # The registry looks for the model in the store that the environment names, not in the client's.
    with said_clearly(section), environment({"MLFLOW_TRACKING_URI": tracking_uri(section)}):
        from mlflow.exceptions import MlflowException

        client = checked_client(section)
        run_id = _known_run(client, facts.get("run_id"))
        model_id = _logged(client, section, run_id, folder, facts)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {**_lineage(facts), **({"config": f"runs:/{run_id}/config.yaml"} if run_id else {})}
        made = client.create_model_version(name, f"models:/{model_id}", run_id=run_id, tags=tags)
    return f"models:/{name}/{made.version}"


def _logged(
    client: MlflowClient, section: TrackingConfig, run_id: str | None, folder: Path, facts: Mapping[str, Any]
) -> str:
    """The id of the logged model with the folder's files."""
    from mlflow.entities import LoggedModelOutput

    experiment = client.get_run(run_id).info.experiment_id if run_id else experiment_id(client, section)
    title = str(facts.get("title") or folder.name)
    model = client.create_logged_model(
        experiment, name=title, source_run_id=run_id, model_type="merged", tags=_lineage(facts)
    )
    try:
        if (local := artifacts.local_folder(model.artifact_location)) is not None:
            artifacts.store(folder, local)
        else:
            client.log_model_artifacts(model.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=int(facts.get("optimizer_step") or 0))])
    return str(model.model_id)


def _known_run(client: MlflowClient, run_id: str | None) -> str | None:
    """None where the store has not that run, such as another store's."""
    if run_id is None:
        return None
    try:
        client.get_run(run_id)
    except Exception as error:
        if not is_missing(error):
            raise
        log.warning("MLflow has no run %s (%s): the model is registered without it", run_id, reason(error)[:100])
        return None
    return run_id


def _lineage(facts: Mapping[str, Any]) -> dict[str, str]:
    named = ("base_model", "base_files_sha256", "base_values_sha256", "adapter_sha256", "data", "data_fingerprint")
    found = {key: facts.get(key) for key in (*named, "optimizer_step", "run", "run_id")}
    return {key: redacted(str(value))[:5000] for key, value in found.items() if value is not None}


def _signature(prompt: str) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    if prompt == "classes":
        answers = Schema([ColSpec(DataType.string, "label"), ColSpec(DataType.double, "score")])
        return ModelSignature(Schema([ColSpec(DataType.string, "text")]), answers)
    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    inputs: list[Any] = [
        ColSpec(DataType.string, "prompt", required=False),
        ColSpec(Array(message), "messages", required=False),
    ]
    params = [
        ParamSpec("max_new_tokens", DataType.long, 64),
        ParamSpec("temperature", DataType.double, 0.0),
        ParamSpec("top_p", DataType.double, 1.0),
    ]
    return ModelSignature(Schema(inputs), Schema([ColSpec(DataType.string, "answer")]), ParamSchema(params))
