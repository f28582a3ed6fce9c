"""Text for causal language models, in blocks of tokens."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, ClassVar

from lora_exp.data.kind import Batch, Data, DataKind, Row, Tokenizer, data_kind
from lora_exp.inputs import RECORD_SUFFIXES, TEXT_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from lora_exp.training.metrics import RowLosses


@data_kind("text")
class Text(DataKind):
    """``text_field`` of each record is a document, or what neighbours of the same ``group_by`` fields
    have in it; a block is ``block_size`` tokens."""

    text_field: str = "text"
    group_by: list[str] = field(default_factory=list)
    block_size: int = 128

    learners: ClassVar[tuple[str, ...]] = ("causal_lm",)
    unit: ClassVar[str] = "tokens"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity",)
    needs_tokenizer: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = TEXT_SUFFIXES + RECORD_SUFFIXES

    def problems(self, task: str) -> list[str]:
        if self.block_size < 2:
            return [f"data.block_size={self.block_size} is below 2: a block needs a token to predict from"]
        return []

    @property
    def positions(self) -> int | None:
        return self.block_size

    @property
    def units(self) -> int:
        return self.block_size

    @property
    def rows(self) -> str:
        return f"blocks of {self.block_size}"

    @property
    def remedies(self) -> list[str]:
        return ["a smaller data.block_size"]

    def row(self) -> Row:
        import torch

        return {"input_ids": torch.zeros(self.block_size, dtype=torch.long)}

    def load(self, tokenizer: Tokenizer) -> Data:
        from lora_exp.data.text import example, load_blocks

        loaded = tokenizer()
        assert loaded is not None
        blocks = load_blocks(self, loaded)
        return Data(
            blocks.train,
            blocks.validation,
            f"{self.rows} tokens",
            {"block_size": self.block_size},
            test=blocks.test,
            fingerprint=blocks.fingerprint,
            said=blocks.said,
            example=example(blocks.train, loaded),
        )

    def openings(self, rows: Dataset[Row], count: int) -> list[tuple[list[int], list[int]]]:
        from lora_exp.data.text import openings

        return openings(rows, count)

    def collate(self, rows: list[Row]) -> Batch:
        from lora_exp.data.text import collate_blocks

        return collate_blocks(rows)

    def losses(self, model: nn.Module, batch: Batch) -> RowLosses:
        from lora_exp.training.objectives import causal_lm_losses

        return causal_lm_losses(model, batch)

    def count(self, batch: Batch) -> Tensor:
        from lora_exp.training.objectives import count_predictions

        return count_predictions(batch)
