"""What a trained model and its export are compared on: rows that the run did not learn from.

Letters: N texts, T tokens a text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_exp.data import DataKind, kind_of, load_data
from lora_exp.errors import UserError
from lora_exp.models.kind import model_kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.use.loading import Trained
    from lora_exp.use_config import ExportConfig

_SENTENCES = (
    "The ship left the harbour before the sun had risen, and nobody on the shore saw it go.",
    "Water boils at a lower temperature on a high mountain than it does beside the sea.",
    "She asked whether the train from the north would be late again, as it was every Monday.",
    "To add two fractions, bring them to a common denominator and then add what is above.",
    "In the old garden behind the church there were seven apple trees and a well.",
    "A compiler reads the text of a program and writes instructions for a machine.",
    "They had walked for two days when they came to the river, which was wide and slow.",
    "Please send me the report by Friday, so that we can talk about it next week.",
)


def held_out(trained: Trained, section: ExportConfig) -> tuple[Tensor, str]:
    """``section.texts`` × at most ``section.tokens`` (N, T), or images (N, C, S, S); and where they are from, in words.

    Validation rows of the run's data, spread evenly; sentences of ours where those cannot be had.
    """
    kind, run = kind_of(trained.config.data), next(iter(trained.runs.values()), None)
    if run is None or run.folder is None:
        return _sentences(trained, kind, section), "sentences of lora_exp's own, as the adapter lies without its run"
    try:
        return _validation_rows(trained, kind, section), f"validation rows of {trained.config.data.label}"
    except (UserError, OSError) as error:
        reason = str(error).splitlines()[0]
        return _sentences(
            trained, kind, section
        ), f"sentences of lora_exp's own, as the run's data cannot be had ({reason})"


def _validation_rows(trained: Trained, kind: DataKind, section: ExportConfig) -> Tensor:
    rows = load_data(trained.config.data, lambda: trained.tokenizer).validation
    length = len(rows)  # type: ignore[arg-type]
    chosen = [index * length // section.texts for index in range(min(section.texts, length))]
    batches = [kind.collate([rows[index]]) for index in chosen]
    if "input_ids" not in batches[0]:
        return torch.cat([batch["pixels"] for batch in batches])
    texts = [batch["input_ids"][0] for batch in batches]
    shortest = min(section.tokens, *map(len, texts))
    return torch.stack([text[:shortest] for text in texts])


def _sentences(trained: Trained, kind: DataKind, section: ExportConfig) -> Tensor:
    if model_kind_of(trained.config.model).tokenises:
        return sentences(trained.tokenizer, section.texts, section.tokens)
    size = getattr(kind, "image_size", 64)
    return torch.rand(section.texts, 3, size, size, generator=torch.Generator().manual_seed(0))


def sentences(tokenizer: PreTrainedTokenizerBase, texts: int, tokens: int) -> Tensor:
    """The same ``texts`` × ``tokens`` each time, (N, T) int64: each begins at another sentence."""
    found = []
    for start in range(texts):
        ids: list[int] = []
        while len(ids) < tokens:
            ids += tokenizer(_SENTENCES[start % len(_SENTENCES)] + " ", add_special_tokens=False)["input_ids"]
            start += 1
        found.append(ids[:tokens])
    return torch.tensor(found)
