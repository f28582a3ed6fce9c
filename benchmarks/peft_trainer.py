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
    folder: str, store: str, model_folder: str, blocks_folder: str, dtype: str = "float32", steps: str = "",
    rank: str = "8", lr: str = "1e-3",
) -> None:  # fmt: skip
    """Without `steps` one step and no evaluation, which is the start-up benchmark's."""
    os.environ.update(environment(store))
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    model = get_peft_model(base, adapter_config(int(rank)))
    options = training_options(folder, int(steps or 1), bool(steps), float(lr))
    trainer_of(model, options, blocks_of(blocks_folder), callbacks=[Mark(Path(folder) / "first_step")]).train()


def environment(store: str) -> dict[str, str]:
    """Where transformers logs to."""
    return {"MLFLOW_TRACKING_URI": store, "MLFLOW_EXPERIMENT_NAME": "lora_exp", "HF_MLFLOW_LOG_ARTIFACTS": "1"}


def adapter_config(rank: int) -> LoraConfig:
    """The default job's."""
    return LoraConfig(r=rank, lora_alpha=16, use_rslora=True, target_modules=TARGETS, task_type="CAUSAL_LM")


def blocks_of(folder: str, evaluated: int = EVALUATED) -> dict[str, datasets.Dataset]:
    """Training blocks, and those that ours evaluate on."""
    found = {name: datasets.Dataset.from_file(f"{folder}/{name}.arrow") for name in ("train", "validation")}
    held_out = found["validation"]
    found["validation"] = held_out.select([i * len(held_out) // evaluated for i in range(evaluated)])
    return found


def trainer_of(
    model: Any, options: TrainingArguments, blocks: dict[str, datasets.Dataset], **more: Any
) -> Trainer:  # fmt: skip
    """transformers' Trainer on such blocks."""
    rows = {"train_dataset": blocks["train"], "eval_dataset": blocks["validation"]}
    return Trainer(model, options, data_collator=_collate, **rows, **more)


def training_options(
    folder: str, steps: int, evaluates: bool, lr: float = 1e-3, rows: int = 4, evaluated_rows: int = 4, **more: Any
) -> TrainingArguments:
    """The default job's."""
    every = max(1, steps // 2)
    wanted: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": rows, "logging_steps": 1}
    wanted |= {"save_steps": every, "save_only_model": True, "report_to": ["mlflow"], "use_cpu": True, "seed": 0}
    if evaluates:
        wanted |= {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": True}
        wanted |= {"per_device_eval_batch_size": max(rows, evaluated_rows), "prediction_loss_only": True}
        wanted |= {"learning_rate": lr, "lr_scheduler_type": "cosine", "warmup_steps": min(2, steps)}
    return TrainingArguments(folder, disable_tqdm=True, **wanted, **more)


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


if __name__ == "__main__":
    main(*sys.argv[1:])
