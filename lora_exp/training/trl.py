"""TRL's SFTTrainer in this harness.

Its loss comes from the last hidden states and the head's weight, by a forward that it puts in the model's place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from lora_exp.errors import UserError
from lora_exp.training.hugging_face import Harnessed, arguments_of, run, shared, transformers_model

if TYPE_CHECKING:
    from lora_exp.training.reports import Reports
    from lora_exp.training.trainer import Work

_METRICS = ("entropy", "mean_token_accuracy")


class _Sft(Harnessed, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer over batches of tokens that are made already."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if "attention_mask" not in inputs and "position_ids" not in inputs:  # it counts tokens by one of them
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return super().training_step(model, inputs, num_items_in_batch)

    def means(self) -> dict[str, float]:
        """TRL's own metrics since the last call, by our names."""
        found = self._metrics["train"]
        means = {f"train/{name}": sum(found[name]) / len(found[name]) for name in _METRICS if found[name]}
        found.clear()
        return means

    def _send_telemetry(self) -> None:
        """What is trained here is nobody else's business."""


def train_by_sft_trainer(work: Work, reports: Reports) -> None:
    """Train with TRL's SFTTrainer."""
    model: Any = work.adapted.model
    inner = cast(PreTrainedModel, transformers_model(model))
    _check_head(inner)

    def make(folder: str) -> _Sft:
        arguments = arguments_of(work, folder, SFTConfig, dataset_kwargs={"skip_prepare_dataset": True})
        rows = datasets.Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})  # it looks at one
        given: dict[str, Any] = {"train_dataset": rows, "processing_class": _no_tokenizer(), "data_collator": list}
        with _kept(work.adapted.parameters):
            made = _Sft(model, arguments, **given, **shared(reports))
        made.processing_class = None  # or it would set the model's special tokens to this tokenizer's
        _fuse_head(model, inner)
        reports.more = made.means
        return made

    run(make, work, reports)


def _check_head(model: PreTrainedModel) -> None:
    """Raise UserError for a head that is more than its weight, which is all that TRL's loss multiplies with."""
    head = model.get_output_embeddings()
    is_plain = type(head) is nn.Linear and "forward" not in vars(head)
    is_pefts = type(head).__name__ == "ModulesToSaveWrapper"
    if not (is_plain or is_pefts) or head._forward_hooks or head._forward_pre_hooks:
        raise UserError(
            f"trainer=trl_sft computes its loss from the output head's weight alone, and this head is an adapted or "
            f"special {type(head).__name__}: leave the head out of the targets, or use trainer=hf or trainer=native"
        )


def _fuse_head(model: nn.Module, inner: PreTrainedModel) -> None:
    """TRL's forward belongs to transformers' model: around ours it would pass by what begins a pass of adapters."""
    if model is not inner and "forward" in vars(model):
        del model.forward
        add_fused_lm_head(inner, outputs=("log_probs", "entropy", "is_top1"))


@contextlib.contextmanager
def _kept(parameters: list[nn.Parameter]) -> Iterator[None]:
    """TRL rounds what is trained over a quantised base to bfloat16; here it stays in float32."""
    before = [parameter.data for parameter in parameters]
    yield
    for parameter, data in zip(parameters, before, strict=True):
        parameter.data = data


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants one even where there is nothing to tokenise."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"": 0}, unk_token="")))
