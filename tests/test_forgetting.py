"""`data.forget`: transformers' own loss on the other data before, the saved adapter's after, in metrics and table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
Cli = Callable[..., Any]
PROMPT = ["backend=peft", "adapter=peft_method", "adapter.method=PROMPT_TUNING", "adapter.options.num_virtual_tokens=3"]


@pytest.mark.parametrize("given", [["rank=4"], ["adapter=full"], PROMPT], ids=["lora", "full", "prompt"])
def test_the_loss_elsewhere_before_and_after(
    given: list[str], cli: Cli, tiny_overrides: list[str], tiny_llama: Path, workplace: Path
) -> None:
    text = "the ox said unto the sea, go thou and sow. " * 40
    (workplace / "other.txt").write_text(text)
    folder = workplace / "run"
    done = cli(*tiny_overrides, *given, "data.forget=other.txt", "optimizer.lr=3e-2", "train.eval_blocks=1000",
               "tracking=none", f"hydra.run.dir={folder}")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((folder / "result.json").read_text())["result"]["metrics"]
    tokens = AutoTokenizer.from_pretrained(tiny_llama)(text)["input_ids"]
    rows = torch.tensor(tokens[: len(tokens) // 16 * 16]).view(-1, 16)
    with torch.no_grad():  # of the base, also where an untrained adapter would change it
        loss = float(AutoModelForCausalLM.from_pretrained(tiny_llama)(input_ids=rows, labels=rows).loss)
    assert found["forget_loss_before"] == pytest.approx(loss, rel=2e-2)
    assert found["forgotten"] == pytest.approx(found["forget_loss"] - found["forget_loss_before"])
    assert abs(found["forgotten"]) > 1e-3
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "forget/loss" in record] == [0, 4]
    if given == ["rank=4"]:
        asked = ["task=evaluate", f"run={folder}", "tracking=none", "evaluate.forget=other.txt", "evaluate.rows=all"]
        used = cli(*asked, f"hydra.run.dir={workplace / 'used'}")
        assert used.code == 0, used.err
        lines = json.loads((workplace / "used/evaluation.json").read_text())["lines"]
        losses = {line["way"]: line["figures"]["loss"] for line in lines if line["data"] == "other"}
        assert losses["base"] == pytest.approx(found["forget_loss_before"], abs=1e-5)
        assert losses["adapted"] == pytest.approx(found["forget_loss"], abs=1e-5)


def test_a_sweep_shows_it(cli: Cli, tiny_overrides: list[str], workplace: Path, text_file: Path) -> None:
    done = cli("-m", *tiny_overrides, "rank=2,4", f"data.forget={text_file}", f"hydra.sweep.dir={workplace / 's'}")
    assert done.code == 0, done.err
    assert "forgotten" in (workplace / "s/comparison.csv").read_text().splitlines()[0]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{workplace / 'outputs/mlflow.db'}")
    run_id = json.loads((workplace / "s/0/result.json").read_text())["result"]["run_id"]
    assert [point.step for point in client.get_metric_history(run_id, "forget/loss")] == [0, 4]
    assert "forgotten" in client.get_run(run_id).data.metrics


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["data.forget=nowhere"], "data.forget=nowhere is neither a path nor a choice of data: use one of bbc_news"),
        (["data.forget=mnist5k"], "data.forget=mnist5k (images) is not for a run on data=text"),
    ],
)
def test_what_cannot_be_forgotten_is_said_at_once(
    given: list[str], says: str, cli: Cli, tiny_overrides: list[str]
) -> None:
    done = cli(*tiny_overrides, *given, "tracking=none")
    assert done.code == 1
    assert says in done.err
