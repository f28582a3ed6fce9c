"""MLflow models of finished runs: they answer prompts, and lead back to where they came from."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

Cli = Callable[..., Any]
Finished = Callable[..., Path]
TARGET = Path("outputs/exports/day-run-mlflow")
PROMPT = "And the king said"
pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own, of which there are many


def greedy(folder: Path, text: str, tokens: int) -> str:
    """What plain transformers writes."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    asked = tokenizer(text, return_tensors="pt")["input_ids"]
    found = model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=tokens, do_sample=False, pad_token_id=2
    )
    return str(tokenizer.decode(found[0, asked.shape[1] :], skip_special_tokens=True))


@pytest.fixture
def exported(cli: Cli, finished: Finished) -> tuple[Path, str]:
    """The folder, and what the merged model writes to the prompt."""
    run = finished()
    for kind in ("mlflow", "merged"):
        done = cli("task=export", f"run={run}", f"export={kind}", "tracking=none")
        assert done.code == 0, done.err
    return TARGET, greedy(Path("outputs/exports/day-run-merged"), PROMPT, 8)


def test_pyfunc_answers_as_the_merged_model_does(exported: tuple[Path, str]) -> None:
    import mlflow.pyfunc

    folder, expected = exported
    loaded = mlflow.pyfunc.load_model(str(folder))
    found = loaded.predict([{"prompt": PROMPT}, {"prompt": PROMPT}], params={"max_new_tokens": 8})
    assert list(found["answer"]) == [expected, expected]
    assert loaded.metadata.signature.inputs.input_names() == ["prompt", "messages"]
    assert loaded.input_example["prompt"][0] == "In the beginning"
    assert json.loads((folder / "artifacts/model/facts.json").read_text())["prompt"] == "text"
    assert b"lora_exp" not in (folder / "requirements.txt").read_bytes()
    assert not list(folder.rglob("*.pkl"))  # nothing that runs code when it is read
    with pytest.raises(Exception, match="give each row a prompt"):
        loaded.predict([{"messages": None}])


def test_mlflow_serves_it(exported: tuple[Path, str]) -> None:
    folder, expected = exported
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local"]
    # It calls uvicorn by name, as it is found where an environment is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PATH": path},
    )
    try:
        asked = {"inputs": [{"prompt": PROMPT}], "params": {"max_new_tokens": 8}}
        assert _posted(f"http://127.0.0.1:{port}/invocations", asked)["predictions"] == [{"answer": expected}]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _posted(address: str, body: dict[str, Any]) -> Any:
    due = time.monotonic() + 180
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except OSError:
            if time.monotonic() > due:
                raise
            time.sleep(0.5)


def test_a_version_leads_back_to_run_config_data_and_base(
    cli: Cli, tiny_overrides: list[str], workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow.pyfunc
    from mlflow.tracking import MlflowClient

    done = cli(*tiny_overrides, "tracking.register=verses", "hydra.run.dir=outputs/runs/day/run")
    assert done.code == 0, done.err
    assert "models:/verses/1" in done.out
    again = cli(
        "task=export", "run=outputs/runs/day/run", "export=mlflow", "tracking.register=verses", "export.overwrite=true"
    )
    assert again.code == 0, again.err
    assert "models:/verses/2" in again.out
    address = f"sqlite:///{workplace}/outputs/mlflow.db"
    client = MlflowClient(address)
    version = client.get_model_version("verses", "1")
    run = client.get_run(version.run_id)
    for name in ("base_files_sha256", "base_values_sha256", "adapter_sha256", "data_fingerprint"):
        assert version.tags[name] == run.data.tags[name]
    assert version.tags["config"] == f"runs:/{run.info.run_id}/config.yaml"
    assert version.tags["optimizer_step"] == "4"
    assert run.data.metrics["export/mlflow/max_logit"] <= 1e-3
    assert run.data.tags["export.mlflow"] == str((workplace / TARGET).resolve())
    assert version.source in {f"models:/{each.model_id}" for each in run.outputs.model_outputs}
    mlflow.set_tracking_uri(address)
    try:
        found = mlflow.pyfunc.load_model("models:/verses/2").predict([{"prompt": PROMPT}], params={"max_new_tokens": 8})
    finally:
        mlflow.set_tracking_uri(None)
    assert found["answer"][0] == greedy(TARGET / "artifacts/model", PROMPT, 8)
    (weights,) = (TARGET / "artifacts/model").glob("*.safetensors")
    assert weights.stat().st_nlink == 2  # the registry's file is another name of it


def test_a_store_that_is_away_is_said_and_the_export_stays(cli: Cli, finished: Finished) -> None:
    command = ["task=export", f"run={finished()}", "export=mlflow", "tracking.register=verses"]
    done = cli(*command, "tracking=mlflow", "tracking.uri=http://127.0.0.1:9")
    assert done.code == 1
    assert "127.0.0.1:9 cannot be reached" in done.err
    assert (TARGET / "MLmodel").is_file()


@pytest.mark.parametrize("suffix", ["", " was"])
def test_a_classifier_answers_with_a_class(suffix: str, cli: Cli, workplace: Path, tiny_llama: Path) -> None:
    import mlflow.pyfunc

    words = ["ox", "king", "sea"]
    rows = [{"text": f"the {word} is here {number}", "label": word} for word in words for number in range(12)]
    (workplace / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = cli(
        "model=hf", f"model.path={tiny_llama}", "model.label=tiny", "data=text_classification", "device=cpu",
        f"data.path={workplace}/rows.jsonl", "data.val_fraction=0.3", "data.max_length=8", "train.steps=30",
        "train.warmup_steps=1", "optimizer.lr=2e-2", "tracking=none", "hydra.run.dir=outputs/runs/day/run",
        f"data.suffix='{suffix}'",
    )  # fmt: skip
    assert done.code == 0, done.err
    done = cli("task=export", "run=outputs/runs/day/run", "export=mlflow", "tracking=none")
    assert done.code == 0, done.err
    found = mlflow.pyfunc.load_model(str(TARGET)).predict([{"text": f"the {word} is here 3"} for word in words])
    assert list(found["label"]) == words
    model = AutoModelForSequenceClassification.from_pretrained(TARGET / "artifacts/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(TARGET / "artifacts/model")
    ending = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    for word, score in zip(words, found["score"], strict=True):
        ids = tokenizer(f"the {word} is here 3")["input_ids"][: 8 - len(ending)] + ending
        assert score == pytest.approx(model(torch.tensor([ids])).logits.softmax(-1).max().item(), abs=1e-5)
