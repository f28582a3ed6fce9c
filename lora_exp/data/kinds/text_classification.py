"""Texts and their classes, for encoders and causal language models with a new head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lora_exp.data.kind import Batch, Data, DataKind, Row, Tokenizer, data_kind
from lora_exp.inputs import RECORD_SUFFIXES, source_problems, without_class_folders

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lora_exp.training.metrics import RowLosses


@data_kind("text_classification")
class TextClassification(DataKind):
    """``text_field`` of each record, with ``pair_field`` two texts, and its class, ``label_field``; or a folder of a
    folder a class, a text a file. What is longer than ``max_length`` tokens is cut. ``suffix`` ends every text, also
    one that was cut: a causal model's head reads the last token, which is the same everywhere then."""

    text_field: str = "text"
    pair_field: str | None = None
    label_field: str = "label"
    max_length: int = 256
    suffix: str = ""

    learners: ClassVar[tuple[str, ...]] = ("encoder", "causal_lm")
    unit: ClassVar[str] = "texts"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")
    needs_tokenizer: ClassVar[bool] = True
    new_head: ClassVar[bool] = True
    length_field: ClassVar[str] = "max_length"

    def problems(self, task: str) -> list[str]:
        found = source_problems(without_class_folders(self), RECORD_SUFFIXES, task == "train")
        if self.max_length < 3:
            found.append(f"data.max_length={self.max_length} is below 3: 128 to 512 tokens are common")
        if self.pair_field is not None and self.pair_field == self.text_field:
            found.append(f"data.pair_field={self.pair_field} is data.text_field as well: name the other text's field")
        if self.label_field in (self.text_field, self.pair_field):
            found.append(f"data.label_field={self.label_field} is a text's field as well: name the field of the class")
        return found

    @property
    def positions(self) -> int | None:
        return self.max_length

    @property
    def rows(self) -> str:
        return f"texts of up to {self.max_length} tokens"

    @property
    def remedies(self) -> list[str]:
        return ["a smaller data.max_length"]

    def plan_shape(self) -> Mapping[str, Any]:
        from lora_exp.data.labelled_text import class_names, examples

        return {"class_names": class_names(examples(self)[0], self), "max_length": self.max_length}

    def shape_of(self, class_names: Sequence[str]) -> Mapping[str, Any]:
        return {"class_names": tuple(class_names), "max_length": self.max_length}

    def row(self) -> Row:
        import torch

        zero = torch.zeros((), dtype=torch.long)
        return {"input_ids": torch.zeros(self.max_length, dtype=torch.long), "labels": zero, "padding": zero}

    def ending(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
        from lora_exp.data.labelled_text import ending

        return ending(self.suffix, tokenizer)

    def load(self, tokenizer: Tokenizer) -> Data:
        from lora_exp.data.labelled_text import load_texts

        loaded = tokenizer()
        assert loaded is not None
        return load_texts(self, loaded)

    def collate(self, rows: list[Row]) -> Batch:
        from lora_exp.data.labelled_text import collate_texts

        return collate_texts(rows)

    def losses(self, model: nn.Module, batch: Batch) -> RowLosses:
        from lora_exp.data.labelled_text import text_losses

        return text_losses(model, batch)
