"""TRL's SFTTrainer: its loss and its metrics, on our adapters or PEFT's, over rows that are tokenised already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_exp.config import Config, data_kinds
from lora_exp.training.trainer import Trainer, Work, trainer
from lora_exp.training.trainers.hf import beyond_transformers, missing, reports_of

if TYPE_CHECKING:
    from lora_exp.training.trainer import Keep


@trainer("trl_sft")
class TrlSft(Trainer):
    def problems(self, config: Config) -> list[str]:
        found = [*missing(config, "trl", "trl", "accelerate"), *beyond_transformers(config)]
        if getattr(data_kinds[config.data.kind], "unit", None) != "tokens":
            found.append(
                f"trainer=trl_sft learns to predict tokens, which data={config.data.label} ({config.data.kind}) does "
                "not: use trainer=hf or trainer=native"
            )
        return found

    def train(self, work: Work, keep: Keep) -> None:
        from lora_exp.training.trl import train_by_sft_trainer

        train_by_sft_trainer(work, reports_of(work, keep))
