"""Each variant that is a file of its own, trained from the command line."""

import json

import pytest

VARIANTS = ("lora_fa", "lora_fb", "vera")


@pytest.mark.parametrize("adapter", VARIANTS)
def test_its_loss_falls_and_its_folder_is_written(adapter, cli, tiny_overrides, workplace):
    done = cli(
        *tiny_overrides,
        f"adapter={adapter}",
        "tracking=none",
        "optimizer.lr=2e-2",
        "train.steps=12",
        "hydra.run.dir=run",
    )
    assert done.code == 0, done.err
    records = [json.loads(line) for line in (workplace / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["eval/loss"] for record in records if "eval/loss" in record]
    assert losses[-1] < losses[0] - 0.05
    assert (workplace / "run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("adapter", VARIANTS)
def test_peft_as_backend_is_refused_by_name(adapter, cli, tiny_overrides):
    done = cli(*tiny_overrides, f"adapter={adapter}", "backend=peft", "tracking=none")
    assert done.code
    assert f"backend=peft does not train adapter={adapter} here" in done.err
