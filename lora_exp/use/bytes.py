"""How many bytes of text a model predicted, so that losses of different tokenizers compare as bits a byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lora_exp.training.metrics import Sums
from lora_exp.training.objectives import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def bits_per_byte(sums: Sums, size: int) -> float:
    """Of the summed loss (nats) over ``size`` bytes; nan of none."""
    return sums.loss / math.log(2) / size if size else math.nan


def predicted_bytes(batches: Iterable[Batch], tokenizer: PreTrainedTokenizerBase) -> int:
    """How long the text of all predicted tokens is in UTF-8; a special token, which is no text, has none."""
    length = _token_lengths(tokenizer) if _is_of_bytes(tokenizer) else None
    total = 0
    for batch in batches:
        rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        for ids, labels in rows:
            for before, stretch in _predicted(ids, labels):
                total += sum(map(length, stretch)) if length else _text_length(before, stretch, tokenizer)
    return total


def _predicted(ids: list[int], labels: list[int]) -> Iterable[tuple[int, list[int]]]:
    """Each stretch of predicted tokens, with the token before it."""
    start = None
    for place in range(1, len(ids) + 1):
        is_predicted = place < len(ids) and labels[place] != IGNORED
        if is_predicted and start is None:
            start = place
        elif not is_predicted and start is not None:
            yield ids[start - 1], ids[start:place]
            start = None


def _is_of_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether each character of a token stands for a byte, as in GPT-2's tokenizer and most since."""
    from tokenizers.decoders import ByteLevel

    fast = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    return fast is not None and isinstance(fast.decoder, ByteLevel)


def _token_lengths(tokenizer: PreTrainedTokenizerBase):  # type: ignore[no-untyped-def]
    special, added, known = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder, dict[int, int]()

    def length(token: int) -> int:
        if token not in known:
            text = str(tokenizer.convert_ids_to_tokens(token))
            known[token] = 0 if token in special else len(text.encode()) if token in added else len(text)
        return known[token]

    return length


def _text_length(before: int, stretch: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """By decoding with and without it: a beginning alone may lose its space."""
    whole, head = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in ([before, *stretch], [before]))
    return len(whole.encode()) - len(head.encode())
