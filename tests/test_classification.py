"""Text classification through the command line: a causal model and an encoder, each tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WORDS = {"calm": "the sea rested", "loud": "the ox sang", "odd": "lambs build mountains"}


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny_bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *{word for text in WORDS.values() for word in text.split()}]
    BertTokenizer(vocab={word: index for index, word in enumerate(sorted(words))}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=24, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    names = list(WORDS)
    rows = [{"text": f"{WORDS[names[i % 3]]} {i}", "label": names[i % 3]} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(params=["hf", "encoder"])
def overrides(request: pytest.FixtureRequest, tiny_llama: Path, tiny_bert: Path, texts: Path) -> list[str]:
    folder = tiny_llama if request.param == "hf" else tiny_bert
    return [
        f"model={request.param}", f"model.path={folder}", "model.label=tiny", "data=text_classification",
        f"data.path={texts}", "data.max_length=16", "data.val_fraction=0.25", "device=cpu", "train.steps=30",
        "train.warmup_steps=1", "train.eval_every=30", "train.eval_blocks=15", "train.micro_batch_size=6",
        "train.log_every=5", "optimizer.lr=1e-2",
    ]  # fmt: skip


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_a_run_learns_and_leaves_the_classes_beside_the_adapter(
    cli: Callable[..., Any], overrides: list[str], workplace: Path
) -> None:
    done = cli(*overrides, f"hydra.run.dir={workplace / 'run'}")
    assert done.code == 0, done.err
    result = read(workplace / "run/result.json")["result"]
    assert result["eval_loss"] < 0.7 * result["eval_loss_before"]
    assert 0.5 < result["metrics"]["accuracy"] <= 1
    assert 0.4 < result["metrics"]["macro_f1"] <= 1
    assert read(workplace / "run/adapter/config.json")["id2label"] == {"0": "calm", "1": "loud", "2": "odd"}
    assert {"tokenizer.json", "adapter_model.safetensors"} <= {
        file.name for file in (workplace / "run/adapter").iterdir()
    }
    records = [json.loads(line) for line in (workplace / "run/metrics.jsonl").read_text().splitlines()]
    assert "train/texts_per_s" in records[1]


def test_the_same_seed_makes_the_same_values(cli: Callable[..., Any], overrides: list[str], workplace: Path) -> None:
    files = []
    for name in ("one", "two"):
        done = cli(*overrides, "train.steps=2", "tracking=none", f"hydra.run.dir={workplace / name}")
        assert done.code == 0, done.err
        files.append(load_file(workplace / name / "adapter/adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_sweep_compares_the_head_alone_with_adapters(
    cli: Callable[..., Any], overrides: list[str], workplace: Path
) -> None:
    done = cli("-m", *overrides, "adapter=head,lora,full", "tracking=none", "optimizer.lr=1e-3")
    assert done.code == 0, done.err
    sweep = next((workplace / "outputs" / "sweeps").glob("*/*"))
    assert {"adapter", "eval/loss", "accuracy", "macro_f1"} <= set(
        (sweep / "comparison.csv").read_text().split("\n")[0].split(",")
    )
    trainable = [read(sweep / str(job) / "result.json")["result"]["trainable"] for job in range(3)]
    assert trainable[0] in (32 * 3, 32 * 3 + 3)
    assert trainable[0] < trainable[1] < trainable[2]


def test_a_plan_counts_what_the_run_trains(cli: Callable[..., Any], overrides: list[str], workplace: Path) -> None:
    planned = cli(*overrides, "task=plan", "tracking=none", f"hydra.run.dir={workplace / 'plan'}")
    assert planned.code == 0, planned.err
    trained = cli(
        *overrides, "train.steps=1", "train.eval_every=1", "tracking=none", f"hydra.run.dir={workplace / 'run'}"
    )
    assert trained.code == 0, trained.err
    plan, result = read(workplace / "plan/plan.json"), read(workplace / "run/result.json")["result"]
    assert (plan["trainable"], plan["total"], plan["unit"]) == (result["trainable"], result["total"], "texts")
    assert 0 < plan["activation_bytes"] < plan["total_bytes"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data=text"], "does not learn from data=text (text): choose a model of kind causal_lm"),
        (["data.max_length=25"], "data.max_length=25 is more than the 24 positions of model=tiny"),
        (["data.max_length=1"], "data.max_length=1 is below 3"),
        (["data.label_field=text"], "data.label_field=text is a text's field as well"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    changes: list[str], says: str, cli: Callable[..., Any], tiny_bert: Path, texts: Path
) -> None:
    base = ["model=encoder", f"model.path={tiny_bert}", "model.label=tiny", "data=text_classification"]
    done = cli(*base, f"data.path={texts}", *changes, "device=cpu", "tracking=none")
    assert done.code == 1
    assert says in done.err


def test_the_wrong_field_is_said_with_those_that_are_there(cli: Callable[..., Any], overrides: list[str]) -> None:
    done = cli(*overrides, "data.label_field=category", "tracking=none")
    assert done.code == 1
    assert "it lacks category (it has text, label)" in done.err
