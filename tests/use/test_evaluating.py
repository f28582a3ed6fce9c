"""Base, adapters and merged models on one split: against transformers' own loss, and as the run itself found it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
Cli = Callable[..., Any]
Train = Callable[..., Path]
Use = Callable[..., Any]
Result = Callable[[Path], dict[str, Any]]


def peft_losses(base: Path, adapter: Path, rows: torch.Tensor) -> float:
    """The mean loss of ``rows`` (N, T) by PEFT on transformers' model."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def test_rows_of_other_data_are_what_peft_and_transformers_find(
    train: Train, use: Use, tiny_llama: Path, workplace: Path
) -> None:
    run = train("one")
    text = "the ox said unto the sea, go thou and sow. " * 40
    (workplace / "other.txt").write_text(text)
    used = use(
        "task=evaluate", f"run={run}", "tracking=none", "data=text", "data.path=other.txt", "data.label=other",
        "data.block_size=16", "data.val_fraction=0.5", "evaluate.rows=all",
    )  # fmt: skip
    from lora_exp.config import data_kinds
    from lora_exp.data.text import load_blocks

    section: Any = data_kinds["text"](label="other", path="other.txt", block_size=16, val_fraction=0.5)  # type: ignore[call-arg]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = torch.stack([row["input_ids"] for row in load_blocks(section, tokenizer).validation])
    adapted = used.lines["A", "adapted", "other"]
    assert adapted["loss"] == pytest.approx(peft_losses(tiny_llama, run / "adapter", rows), rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        assert used.lines["base", "base", "other"]["loss"] == pytest.approx(
            float(base(rows, labels=rows).loss), rel=1e-5
        )
    assert adapted["perplexity"] == pytest.approx(math.exp(adapted["loss"]))
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    nats = adapted["loss"] * rows[:, 1:].numel()
    assert adapted["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    assert "A was not trained on this very data" in used.out
    assert f"other, validation: {len(rows)} of {len(rows)} rows" in used.out


def test_the_table_fits_a_terminal_and_the_files_say_the_same(train: Train, use: Use) -> None:
    used = use("task=evaluate", f"run={train()}", "tracking=none")
    assert all(len(line) <= 80 for line in used.out.splitlines() if "│" in line or "━" in line)
    rows = list(csv.DictReader((used.folder / "evaluation.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == ["base", "adapted", "merged"]
    for row, figures in zip(rows, used.lines.values(), strict=True):
        assert {name: float(row[name]) for name in figures} == figures
    assert f"| A | {used.lines['A', 'adapted', 'text']['loss']:.4f} |" in (used.folder / "evaluation.md").read_text()
    assert used.found["merged"]["A"]["largest_row_difference"] < 1e-5
    result = json.loads((used.folder / "result.json").read_text())["result"]
    assert result["figures"]["loss"] == used.lines["A", "adapted", "text"]["loss"]


def test_several_adapters_share_one_pass_over_the_base(
    train: Train, use: Use, result_of: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = train("one"), train("other", "adapter=dora", "rank=4", "optimizer.lr=3e-2")
    from transformers.models.llama.modeling_llama import LlamaModel

    seen: list[int] = []
    forward = LlamaModel.forward

    def counted(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        seen.append(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    runs = [f"run={one}", f"run={other}"]
    together = use("task=evaluate", *runs, "tracking=none", "evaluate.merged=false")
    assert seen == [2 * 3, 2 * 3]  # 4 rows in micro batches of 2, for the base and both adapters at once
    seen.clear()
    apart = use("task=evaluate", *runs, "tracking=none", "evaluate.merged=false", "evaluate.together=false")
    assert seen == [2] * 2 * 3
    for letter, run in {"A": one, "B": other}.items():
        assert apart.lines[letter, "adapted", "text"]["loss"] == result_of(run)["eval_loss"]
        assert together.lines[letter, "adapted", "text"]["loss"] == pytest.approx(result_of(run)["eval_loss"], rel=1e-6)
    assert together.lines["base", "base", "text"]["loss"] == pytest.approx(result_of(one)["eval_loss_before"], rel=1e-6)
    assert result_of(one)["eval_loss"] != pytest.approx(result_of(other)["eval_loss"], rel=1e-3)


def test_routed_classes_are_counted_by_adapter(train: Train, use: Use, workplace: Path, tiny_llama: Path) -> None:
    file = workplace / "texts.jsonl"
    words = {"calm": "the sea rested", "loud": "the ox sang"}
    rows = [{"text": f"{words[name]} {i}", "label": name} for i in range(30) for name in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overriding = [
        "model=hf", f"model.path={tiny_llama}", "model.label=tiny", "data=text_classification", f"data.path={file}",
        "data.max_length=16", "data.val_fraction=0.25", "device=cpu", "train.warmup_steps=1", "train.eval_blocks=15",
        "train.micro_batch_size=6",
    ]  # fmt: skip
    runs = [train(f"{steps}", f"train.steps={steps}", overriding=overriding) for steps in (2, 30)]
    used = use("task=evaluate", *(f"run={run}" for run in runs), "tracking=none", "evaluate.merged=false")
    for letter, run in zip("AB", runs, strict=True):
        result = json.loads((run / "result.json").read_text())["result"]
        for name, value in result["metrics"].items():
            assert used.lines[letter, "adapted", "text_classification"][name] == pytest.approx(value)
    assert used.lines["B", "adapted", "text_classification"]["accuracy"] == 1.0


def test_a_merged_model_that_differs_is_told(train: Train, use: Use) -> None:
    used = use("task=evaluate", f"run={train('one', 'model.dtype=bfloat16')}", "tracking=none")
    found = used.found["merged"]["A"]
    assert found["largest_row_difference"] > 1e-4  # bfloat16 rounds the sum of base and update
    assert "A merged differs from A by" in used.out
    assert "as merged weights are rounded to bfloat16" in used.out.replace("\n", " ")


def test_the_test_split_is_looked_at_when_asked_alone(train: Train, use: Use, result_of: Result, cli: Cli) -> None:
    run = train("one", "data.test_fraction=0.1")
    assert {line["split"] for line in use("task=evaluate", f"run={run}", "tracking=none").found["lines"]} == {
        "validation"
    }
    used = use("task=evaluate", f"run={run}", "tracking=none", "evaluate.split=test")
    assert used.lines["A", "adapted", "text"]["loss"] == result_of(run)["test"]["loss"]
    done = cli("task=evaluate", f"run={train('other')}", "tracking=none", "evaluate.split=test")
    assert done.code == 1
    assert "has no test rows: name some by data.test_path=FILE" in done.err


def test_rows_that_a_run_may_have_learnt_are_told(train: Train, use: Use) -> None:
    run = train("one")
    used = use("task=evaluate", f"run={run}", "tracking=none", "evaluate.split=test", "data.test_fraction=0.2")
    assert any("may be among those it has learnt" in note for note in used.found["notes"])
    assert not use("task=evaluate", f"run={run}", "tracking=none", "evaluate.rows=2").found["notes"][1:]


def test_how_many_rows(train: Train, use: Use) -> None:
    run = train()
    counts = {}
    for rows in ("null", "3", "all"):
        used = use("task=evaluate", f"run={run}", "tracking=none", f"evaluate.rows={rows}", "evaluate.merged=false")
        (counts[rows],) = {(line["rows"], line["rows_of"]) for line in used.found["lines"]}
    total = counts["all"][1]
    assert counts == {"null": (4, total), "3": (3, total), "all": (total, total)}
    assert total > 4


def test_forgetting_is_the_loss_elsewhere_before_and_after(train: Train, use: Use, workplace: Path, cli: Cli) -> None:
    run = train("one", "train.steps=12")
    (workplace / "other.txt").write_text(
        "lambs and oxen rest upon the mountain, and the people sing to the king. " * 30
    )
    used = use("task=evaluate", f"run={run}", "tracking=none", "evaluate.forget=other.txt", "evaluate.rows=all")
    assert {key for key in used.lines if key[2] == "other"} == {("base", "base", "other"), ("A", "adapted", "other")}
    alone = use("task=evaluate", f"run={run}", "tracking=none", "data=text", "data.path=other.txt", "data.label=other",
        "data.block_size=16", "data.val_fraction=0.5", "evaluate.rows=all")  # fmt: skip
    rest = use("task=evaluate", f"run={run}", "tracking=none", "data=text", "data.path=other.txt", "data.label=other",
        "data.block_size=16", "data.val_fraction=0.5", "evaluate.rows=all", "evaluate.split=train")  # fmt: skip
    parts = [(each.lines["A", "adapted", "other"]["loss"], each.found["lines"][0]["rows"]) for each in (alone, rest)]
    whole = sum(loss * rows for loss, rows in parts) / sum(rows for _, rows in parts)
    assert used.lines["A", "adapted", "other"]["loss"] == pytest.approx(whole)
    done = cli("task=evaluate", f"run={run}", "tracking=none", "evaluate.forget=nowhere")
    assert done.code == 1
    assert "evaluate.forget=nowhere is neither a path nor a choice of data: use one of bbc_news" in done.err


def test_mlflow_is_told_and_the_run_stays_as_it_ended(
    train: Train, use: Use, result_of: Result, workplace: Path
) -> None:
    run = train("one", tracked=True)
    run_id = result_of(run)["run_id"]
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    before = client.get_run(run_id)
    used = use("task=evaluate", f"run={run_id}")
    after = client.get_run(run_id)
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
    assert len(client.search_runs(["1"])) == 1  # no run of its own
    assert after.data.metrics["evaluate/text/validation/loss"] == result_of(run)["eval_loss"]
    assert after.data.metrics["evaluate/text/validation/base_loss"] == result_of(run)["eval_loss_before"]
    assert "evaluate/text/validation/merged_perplexity" in after.data.metrics
    assert [file.path for file in client.list_artifacts(run_id, "evaluate")] == ["evaluate/evaluation.json"]
    again = use("task=evaluate", f"run={run_id}", "evaluate.rows=2", "evaluate.merged=false")
    shown = client.get_run(run_id).data.metrics["evaluate/text/validation/loss"]
    assert shown == again.lines["A", "adapted", "text"]["loss"] != used.lines["A", "adapted", "text"]["loss"]
    history = client.get_metric_history(run_id, "evaluate/text/validation/loss")
    assert [point.step for point in history] == [result_of(run)["step"]] * 2


def test_a_store_that_has_not_the_run_costs_a_line(train: Train, use: Use, workplace: Path) -> None:
    run = train("one", tracked=True)
    elsewhere = use("task=evaluate", f"run={run}", f"tracking.uri=sqlite:///{workplace}/none.db")
    assert "none.db is not here: nothing is told to MLflow" in elsewhere.out
    assert not (workplace / "none.db").exists()


def test_answers_are_written_and_judged(
    train: Train, use: Use, result_of: Result, tiny_llama: Path, workplace: Path
) -> None:
    rows = [{"prompt": f"what did the ox do {i}?", "completion": "the ox sang"} for i in range(40)]
    (workplace / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overriding = [
        "model=hf", f"model.path={tiny_llama}", "model.label=tiny", "data=chat", "data.path=chat.jsonl",
        "data.max_length=64", "data.val_fraction=0.2", "data.written=[exact_match]", "data.write_tokens=16",
        "train.steps=40", "train.warmup_steps=1", "train.eval_every=40", "train.eval_blocks=8",
        "train.micro_batch_size=4", "device=cpu",
    ]  # fmt: skip
    run = train(overriding=overriding)
    used, result = use("task=evaluate", f"run={run}", "tracking=none"), result_of(run)
    adapted = used.lines["A", "adapted", "chat"]
    assert (adapted["loss"], adapted["exact_match"]) == (result["eval_loss"], result["metrics"]["exact_match"])
    assert adapted["exact_match"] == used.lines["A", "merged", "chat"]["exact_match"] == 1.0
    assert used.lines["base", "base", "chat"]["exact_match"] == result["metrics"]["exact_match_before"] == 0.0


def test_the_base_alone(use: Use, tiny_overrides: list[str]) -> None:
    used = use("task=evaluate", *tiny_overrides, "tracking=none")
    assert list(used.lines) == [("base", "base", "text")]


def test_an_adapter_that_lies_alone_must_be_told_its_data(
    train: Train, use: Use, cli: Cli, workplace: Path, text_file: Path, tiny_llama: Path
) -> None:
    run = train()
    (run / "adapter").rename(workplace / "alone")
    model = ["model=hf", f"model.path={tiny_llama}", "device=cpu"]
    done = cli("task=evaluate", "run=alone", "tracking=none", *model)
    assert done.code == 1
    assert "is an adapter alone, which says no data: add data=NAME" in done.err
    used = use(
        "task=evaluate", "run=alone", "tracking=none", *model, "data=text", f"data.path={text_file}",
        "data.block_size=16", "train.eval_blocks=4", "train.micro_batch_size=2",
    )  # fmt: skip
    result = json.loads((run / "result.json").read_text())["result"]
    assert used.lines["A", "adapted", "text"]["loss"] == result["eval_loss"]


BAD = {
    "evaluate.split=dev": "evaluate.split=dev is not known: choose one of train, validation, test",
    "evaluate.rows=0": "evaluate.rows=0 is neither a number above 0 nor all",
    "evaluate.rows=some": "evaluate.rows=some is neither",
    "rank=0": "rank=0 is below 1",
    "data.path=nowhere.txt": "data.path=nowhere.txt does not exist",
    "evaluate.spilt=test": "did you mean evaluate.split?",
}


def test_bad_input(train: Train, cli: Cli) -> None:
    run = train()
    for override, said in BAD.items():
        done = cli("task=evaluate", f"run={run}", "tracking=none", override)
        assert done.code == 1
        assert said in done.err
        assert "Traceback" not in done.err


def test_a_store_that_goes_away_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from lora_exp.config import TrackingConfig
    from lora_exp.tracking import finished

    nowhere = TrackingConfig(uri="http://127.0.0.1:9")
    finished.log_figures(nowhere, "f" * 32, {"evaluate/text/validation/loss": 1.0}, 4, tmp_path / "evaluation.json")
    assert "MLflow lacks what was found" in caplog.text
    assert "evaluation.json" in caplog.text
