"""What a kind of data is: one class, whose fields are the config section ``data`` and whose methods are all the rest.

A file says ``@data_kind("name")`` above a dataclass that follows ``DataKind``; ``data.kind=name`` then chooses it.
Its file is imported to look at a config, so that what takes long to import is imported inside its methods.

Letters: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lora_exp.config import DataConfig, data_kinds
from lora_exp.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase

    from lora_exp.training.metrics import RowLosses

Batch = Mapping[str, "Tensor"]
Row = dict[str, "Tensor"]
Tokenizer = Callable[[], "PreTrainedTokenizerBase | None"]  # loads it; None for kinds of data that ask for none
Write = Callable[["nn.Module", "torch.device", Callable[[], object]], Mapping[str, float]]
Ask = Callable[[Sequence[dict[str, Any]]], tuple[str, str]]
_Kind = TypeVar("_Kind", bound="type[DataKind]")


@dataclass(frozen=True)
class Data:
    """Training, validation and test rows, which share nothing. ``rows`` says what one is.

    ``shape``: what the model must be made to fit, such as its number of classes; ``class_names``: those of a language
    model that is to have a head for them. ``test``: rows that nothing is chosen by, looked at once at the end.
    ``fingerprint``: the hash of all that the rows follow from, ``sources.fingerprint``. ``said``: what a person must
    hear of them, such as how many records are left out. ``example``: a row in words, dimmed where it is not learnt.
    ``written(model, device, between)``: metrics of what a model writes by itself for held-out rows, looked at before
    training and after; ``between`` is called now and then, and may end it by an exception. ``written_of(rows)``: the
    same of other rows.
    """

    train: Dataset[Row]
    validation: Dataset[Row]
    rows: str
    shape: Mapping[str, Any] = field(default_factory=dict)
    test: Dataset[Row] | None = None
    fingerprint: str = ""
    said: list[str] = field(default_factory=list)
    example: str = ""
    written: Write | None = None
    written_of: Callable[[Dataset[Row]], Write | None] = lambda rows: None


@dataclass
class DataKind(DataConfig):
    """A kind of data. A batch maps names to tensors whose first dimension is the rows'; ``labels`` is among them.

    ``learners``: the kinds of model that learn from it. ``unit``: what ``labels`` holds, for the speed of training.
    ``metrics``: of each evaluation, beside ``loss``. ``needs_tokenizer``: whether what is trained is saved with one.
    ``suffixes``: the files that it reads by ``data.sources``; empty where it finds its data by itself.
    ``length_field``: which of its fields says how many positions a row takes.
    """

    kind_name: ClassVar[str] = ""
    learners: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "rows"
    metrics: ClassVar[tuple[str, ...]] = ()
    needs_tokenizer: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = ()
    length_field: ClassVar[str] = "block_size"

    def __post_init__(self) -> None:
        self.kind = self.kind_name or self.kind

    # Before anything is loaded

    def problems(self, task: str) -> list[str]:
        """What can be seen to be wrong with the fields; ``task`` is train or plan."""
        return []

    @property
    def positions(self) -> int | None:
        """How many positions of a language model a row takes; None where it is none's."""
        return None

    @property
    def units(self) -> int:
        """How many of ``unit`` a row holds."""
        return 1

    @property
    def rows(self) -> str:
        """What rows are, such as "blocks of 128"."""
        return "rows"

    @property
    def remedies(self) -> list[str]:
        """What makes a row smaller, where memory is short."""
        return []

    def plan_shape(self) -> Mapping[str, Any]:
        """``Data.shape`` for a plan, which has no tokenizer; read from the data only where the model depends on it."""
        return {}

    def shape_of(self, class_names: Sequence[str]) -> Mapping[str, Any]:
        """``Data.shape`` of a finished run, from the names of its classes, where those are known."""
        return {} if self.positions is None else {self.length_field: self.positions}

    def row(self) -> Row:
        """A row as ``collate`` takes it, to plan with: its shapes and dtypes count, not its values."""
        raise UserError(f"data.kind={self.kind} has no row to plan with: train it (task=train), or give the kind one")

    # The data

    def load(self, tokenizer: Tokenizer) -> Data:
        """The rows; ``tokenizer()`` loads the model's. Raises UserError for data that cannot be had or used."""
        raise NotImplementedError

    def check_model(self, model: nn.Module, device: torch.device) -> None:
        """Raise UserError if a loaded model cannot learn from such rows, as only the model itself can tell."""

    def collate(self, rows: list[Row]) -> Batch:
        """Rows as one batch, stacked as they are."""
        import torch

        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def join(self, batches: Sequence[Batch]) -> Batch:
        """Batches of several lanes as one."""
        import torch

        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    # What a model is asked

    def asks(self, tokenizer: PreTrainedTokenizerBase) -> Ask | None:
        """How messages are put to a model that was trained on such data: they become the text that asks for an answer,
        and what ends that; None where rows are no conversations."""
        return None

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str] | None:
        """The layout of conversations as a chat template; None where rows are none, or no template says it."""
        return None

    def ending(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
        """What ends every text, as tokens, and how many special tokens come after it."""
        return [], 0

    def openings(self, rows: Dataset[Row], count: int) -> list[tuple[list[int], list[int]]]:
        """Of up to ``count`` rows the tokens that a model may be asked to go on from, and those that follow; [] where a
        row is nothing to be written."""
        return []

    # The objective

    def losses(self, model: nn.Module, batch: Batch) -> RowLosses:
        """What is minimised, a row at a time."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor:
        """How many predictions each row holds, (B,), told before the pass: one, unless said otherwise."""
        import torch

        return torch.ones(len(batch["labels"]), dtype=torch.long)


def data_kind(name: str) -> Callable[[_Kind], _Kind]:
    """Decorator: this dataclass is what ``data.kind=name`` means."""

    def register(kind: _Kind) -> _Kind:
        dataclass(kind)
        kind.kind_name = name
        return data_kinds.add(name)(kind)

    return register


def kind_of(section: DataConfig) -> DataKind:
    """The section as what it is: a kind of data. One that has no more than the common fields is made one."""
    if isinstance(section, DataKind):
        return section
    values = {each.name: getattr(section, each.name) for each in fields(section)}
    made = data_kinds[section.kind](**values)
    assert isinstance(made, DataKind)
    return made
