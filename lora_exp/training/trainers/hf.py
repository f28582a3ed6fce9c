"""transformers' Trainer: its loop, on our adapters or PEFT's, over the native trainer's batches and objective."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from lora_exp.config import Config
from lora_exp.training.trainer import Trainer, Work, trainer

if TYPE_CHECKING:
    from lora_exp.training.reports import Reports
    from lora_exp.training.trainer import Keep


@trainer("hf")
class HuggingFace(Trainer):
    def problems(self, config: Config) -> list[str]:
        return [*missing(config, "hf", "accelerate"), *beyond_transformers(config)]

    def train(self, work: Work, keep: Keep) -> None:
        from lora_exp.training.hugging_face import train_by_trainer

        train_by_trainer(work, reports_of(work, keep))


def reports_of(work: Work, keep: Keep) -> Reports:
    """The native trainer's lane and objective, and who makes its records of another's loop."""
    from lora_exp.training.reports import Reports
    from lora_exp.training.trainers.native import forward_of, lane_of

    return Reports(forward_of(work), lane_of(work), keep)


def missing(config: Config, extra: str, *libraries: str) -> list[str]:
    """That libraries are not installed; looking is not importing."""
    absent = [name for name in libraries if importlib.util.find_spec(name) is None]
    if not absent or config.task != "train":
        return []
    named = f"trainer={config.trainer}: {' and '.join(absent)} not installed"
    return [f"{named}: pip install 'lora_exp[{extra}]', or use trainer=native"]


def beyond_transformers(config: Config) -> list[str]:
    """What a Trainer does not do here, though the native one does."""
    problems, chosen = [], f"trainer={config.trainer}"
    if config.model.dtype == "float16":
        problems.append(f"{chosen} does not scale losses, as model.dtype=float16 needs: use bfloat16 or trainer=native")
    if config.device.startswith("cuda:") and config.device != "cuda:0":
        number = config.device.removeprefix("cuda:")
        problems.append(
            f"{chosen} trains on the first GPU, not on device={config.device}: "
            f"set CUDA_VISIBLE_DEVICES={number} and device=cuda, or use trainer=native"
        )
    return problems
