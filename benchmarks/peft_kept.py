"""Jobs with PEFT in one process on a base that is kept: add_adapter, train by transformers' Trainer, delete_adapter.

What an engineer writes who has seen that loading takes long. Every job is an MLflow run of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import mlflow
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from .peft_trainer import adapter_config, blocks_of, environment, trainer_of, training_options


def main(folder: str, store: str, model_folder: str, blocks_folder: str, dtype: str, asked: str) -> None:
    """`asked`: {"steps": ..., "rows": a micro batch's, "evaluated": blocks, "jobs": [[rank, lr], ...]} as JSON."""
    os.environ.update(environment(store))
    wanted = json.loads(asked)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    blocks, model = blocks_of(blocks_folder, wanted["evaluated"]), None
    for number, (rank, lr) in enumerate(wanted["jobs"]):
        torch.manual_seed(0)
        name, config = f"job{number}", adapter_config(rank)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        if number:  # PEFT cannot be left without an adapter
            model.delete_adapter(f"job{number - 1}")
        sizes = {"rows": wanted["rows"], "evaluated_rows": 16 if wanted["rows"] == 1 else 4}  # no tiny passes in vain
        options = training_options(f"{folder}/{number}", wanted["steps"], True, lr, run_name=name, **sizes)
        with mlflow.start_run(run_name=name):
            trainer_of(model, options, blocks).train()
        model.save_pretrained(str(Path(folder) / str(number) / "adapter"), selected_adapters=[name])


if __name__ == "__main__":
    main(*sys.argv[1:])
