"""Bits a byte: how long the text of predicted tokens is, by whatever tokenizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_exp.training.metrics import Sums
from lora_exp.training.objectives import IGNORED
from lora_exp.use.bytes import bits_per_byte, predicted_bytes

TEXTS = ["the sea, and the ox", "größer – 永遠 🐑 sheep", "  two  spaces\n\nand lines"]


def batch(ids: list[int], labels: list[int] | None = None) -> dict[str, Any]:
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels or ids])}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_bytes_has_its_own_length(text: str, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for cut in range(1, len(ids)):  # characters may be cut in the middle
        found = predicted_bytes([batch(ids[: cut + 1]), batch(ids[cut:])], tokenizer)
        first = predicted_bytes([batch([ids[-1], ids[0]])], tokenizer)
        assert found + first == len(text.encode())


def test_special_tokens_have_none_and_what_is_not_learnt_does_not_count(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer("the sea and the ox", add_special_tokens=False)["input_ids"]
    whole = [*ids, tokenizer.eos_token_id, *ids]
    assert predicted_bytes([batch([tokenizer.bos_token_id, *whole])], tokenizer) == 2 * len("the sea and the ox")
    labels = [IGNORED] * len(ids) + whole[len(ids) :]
    assert predicted_bytes([batch(whole, labels)], tokenizer) == len("the sea and the ox")
    assert predicted_bytes([batch(whole, [IGNORED] * len(whole))], tokenizer) == 0


def test_tokens_of_pieces_keep_their_spaces() -> None:
    words = {"<unk>": 0, "▁the": 1, "▁sea": 2, "s": 3, "▁größer": 4}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert predicted_bytes([batch([1, 2, 3, 4])], tokenizer) == len(" seas größer".encode())


def test_bits_are_nats_by_ln_2() -> None:
    assert bits_per_byte(Sums(loss=math.log(2) * 12, count=5), 4) == pytest.approx(3.0)
    assert math.isnan(bits_per_byte(Sums(), 0))
