"""Conversations for causal language models: instructions, prompts with completions, or messages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_exp.data.kind import Ask, Batch, Data, DataKind, Row, Tokenizer, data_kind
from lora_exp.errors import UserError
from lora_exp.inputs import RECORD_SUFFIXES
from lora_exp.registry import check_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase

    from lora_exp.training.metrics import RowLosses

LAYOUTS = ("auto", "template", "plain", "raw")


@data_kind("chat")
class Chat(DataKind):
    """``fields``: what a record's parts are called (``data/chat/conversations.py``), where not as everybody has them.

    ``layout``: by the tokenizer's chat ``template`` (a file: that one), ``plain`` (### Instruction: …), ``raw`` (as the
    texts are), or ``auto``: by the template, without one plain. ``template_options``: what the template reads beside
    the messages. ``system``: the first message, where a conversation has no such.

    ``learn``: the tokens of ``answers``, or ``all``. Rows are at most ``max_length`` tokens; ``overlong``: what is
    longer is cut (``cut``), or counts as ``broken``. ``packing``: several conversations a row, which do not see each
    other.

    ``source``: a data set with a reader of its own (``data/chat/sources/``), and its ``options``.

    ``written``: metrics of what the model writes for up to ``write_rows`` held-out questions, ``write_tokens`` at most.
    """

    fields: dict[str, str] = field(default_factory=dict)
    layout: str = "auto"
    template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    learn: str = "answers"
    max_length: int = 512
    overlong: str = "cut"
    packing: bool = True
    source: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    write_rows: int = 32
    write_tokens: int = 256

    learners: ClassVar[tuple[str, ...]] = ("causal_lm",)
    unit: ClassVar[str] = "tokens"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity",)
    length_field: ClassVar[str] = "max_length"
    needs_tokenizer: ClassVar[bool] = True

    @property
    def suffixes(self) -> tuple[str, ...]:  # type: ignore[override]
        """A ``source`` finds its records by itself."""
        return () if self.source else RECORD_SUFFIXES

    def problems(self, task: str) -> list[str]:
        choices = {"layout": LAYOUTS, "learn": ("answers", "all"), "overlong": ("cut", "broken")}
        found = [
            f"data.{name}={getattr(self, name)} is not known: choose one of {', '.join(known)}"
            for name, known in choices.items()
            if getattr(self, name) not in known
        ]
        if self.max_length < 2:
            found.append(f"data.max_length={self.max_length} is below 2: a row needs a token to predict from")
        if self.template and self.layout not in ("auto", "template"):
            found.append(f"data.template={self.template} has no meaning with data.layout={self.layout}: leave one out")
        if self.template and task == "train" and not Path(self.template).expanduser().is_file():
            found.append(f"data.template={self.template} is no file: name a Jinja file of a chat template")
        for name in ("write_rows", "write_tokens"):
            if getattr(self, name) < 1:
                found.append(
                    f"data.{name}={getattr(self, name)} is below 1: use data.written=[] to let nothing be written"
                )
        return [*found, *self._field_problems(), *self._source_problems(), *self._written_problems()]

    def _written_problems(self) -> list[str]:
        if not self.written:
            return []
        from lora_exp.data.chat.writing import judges

        return [problem for name in self.written if (problem := judges.problem(name))]

    def _field_problems(self) -> list[str]:
        from lora_exp.data.chat.conversations import Fields

        known = list(vars(Fields()))
        return [
            f"data.fields.{name} is none of a record's parts: choose among {', '.join(known)}"
            for name in self.fields
            if name not in known
        ]

    def _source_problems(self) -> list[str]:
        from lora_exp.data.chat.source import sources

        if self.source is None:
            return [f"data.options={self.options} are a data.source's: leave them out"] if self.options else []
        if problem := sources.problem(self.source):
            return [problem]
        try:
            check_options("data.options", self.source, sources[self.source], self.options)  # type: ignore[arg-type]
        except UserError as error:
            return [str(error)]
        return []

    @property
    def positions(self) -> int | None:
        return self.max_length

    @property
    def units(self) -> int:
        return self.max_length

    @property
    def rows(self) -> str:
        return f"rows of up to {self.max_length} tokens"

    @property
    def remedies(self) -> list[str]:
        return ["a smaller data.max_length"]

    def row(self) -> Row:
        import torch

        tokens = torch.zeros(self.max_length, dtype=torch.long)
        return {"input_ids": tokens, "labels": tokens}

    def load(self, tokenizer: Tokenizer) -> Data:
        from lora_exp.data.chat.loading import load_chat

        loaded = tokenizer()
        assert loaded is not None
        return load_chat(self, loaded)

    def check_model(self, model: nn.Module, device: torch.device) -> None:
        if self.packing:
            from lora_exp.data.chat.packing_check import check_keeps_apart

            check_keeps_apart(model, device)

    def asks(self, tokenizer: PreTrainedTokenizerBase) -> Ask | None:
        from lora_exp.data.chat.layouts import question
        from lora_exp.data.chat.loading import layout_of

        lay, _ = layout_of(self, tokenizer)
        return functools.partial(question, lay, self.system)

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str] | None:
        from lora_exp.data.chat.layouts import plain_template, read_template

        if self.template:
            return read_template(self.template)
        if self.layout == "plain" or (self.layout == "auto" and not tokenizer.chat_template):
            return plain_template(tokenizer)
        return None if self.layout == "raw" else tokenizer.chat_template

    def openings(self, rows: Dataset[Row], count: int) -> list[tuple[list[int], list[int]]]:
        from lora_exp.data.chat.writing import questions_of

        return [(each.prompt, each.answer) for each in questions_of(rows, count)]

    def collate(self, rows: list[Row]) -> Batch:
        from lora_exp.data.chat.packing import pad

        return pad(rows)

    def join(self, batches: Sequence[Batch]) -> Batch:
        from lora_exp.data.chat.packing import join

        return join(batches)

    def losses(self, model: nn.Module, batch: Batch) -> RowLosses:
        from lora_exp.training.objectives import causal_lm_losses

        return causal_lm_losses(model, batch)

    def count(self, batch: Batch) -> Tensor:
        from lora_exp.training.objectives import count_predictions

        return count_predictions(batch)
