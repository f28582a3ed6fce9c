"""The other side of the start-up benchmark: PEFT + Trainer on the default job's model and data, logging to MLflow.

What one writes without a harness; model folder and tokenised blocks come ready from the default job's cache.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Mark(TrainerCallback):
    """Leaves a file behind when the first step and its logging are done."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.file.touch()


def main(folder: str, store: str, model_folder: str, blocks_folder: str) -> None:
    os.environ.update(MLFLOW_TRACKING_URI=store, MLFLOW_EXPERIMENT_NAME="lora_exp")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=TARGETS, task_type="CAUSAL_LM")
    blocks = datasets.load_from_disk(blocks_folder)["train"]
    wanted: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 1}
    options = TrainingArguments(folder, report_to=["mlflow"], use_cpu=True, disable_tqdm=True, seed=0, **wanted)
    trainer = Trainer(
        get_peft_model(base, config),
        options,
        train_dataset=blocks,
        data_collator=_collate,
        callbacks=[Mark(Path(folder) / "first_step")],
    )
    trainer.train()


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


if __name__ == "__main__":
    main(*sys.argv[1:])
