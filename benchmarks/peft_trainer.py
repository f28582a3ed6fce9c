"""The other side of the job and start-up benchmarks: PEFT + Trainer on the default job's model and data, into MLflow.

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
EVALUATED = 32  # blocks, spread over the validation split as ours are


class Mark(TrainerCallback):
    """Leaves a file behind when the first step and its logging are done."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, *args: object, **kwargs: object) -> None:
        self.file.touch()


def main(
    folder: str, store: str, model_folder: str, blocks_folder: str, dtype: str = "float32", steps: str = ""
) -> None:
    """Without `steps` one step and no evaluation, which is the start-up benchmark's."""
    os.environ.update(MLFLOW_TRACKING_URI=store, MLFLOW_EXPERIMENT_NAME="lora_exp", HF_MLFLOW_LOG_ARTIFACTS="1")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=TARGETS, task_type="CAUSAL_LM")
    blocks = datasets.load_from_disk(blocks_folder)
    held_out = blocks["validation"]
    held_out = held_out.select([i * len(held_out) // EVALUATED for i in range(EVALUATED)])
    trainer = Trainer(
        get_peft_model(base, config),
        _options(folder, int(steps or 1), bool(steps)),
        train_dataset=blocks["train"],
        eval_dataset=held_out,
        data_collator=_collate,
        callbacks=[Mark(Path(folder) / "first_step")],
    )
    trainer.train()


def _options(folder: str, steps: int, evaluates: bool) -> TrainingArguments:
    every = max(1, steps // 2)
    wanted: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": 4, "logging_steps": 1}
    wanted |= {"save_steps": every, "save_only_model": True, "report_to": ["mlflow"], "use_cpu": True, "seed": 0}
    if evaluates:
        wanted |= {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": True}
        wanted |= {"per_device_eval_batch_size": 4, "prediction_loss_only": True}
        wanted |= {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": min(2, steps)}
    return TrainingArguments(folder, disable_tqdm=True, **wanted)


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


if __name__ == "__main__":
    main(*sys.argv[1:])
