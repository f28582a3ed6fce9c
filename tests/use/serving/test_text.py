"""Pieces of text are never taken back, and together they are what the tokens decode to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.use.serving.text import Writer


def of_bytes(tokens: list[int]) -> str:
    """A vocabulary of single bytes, by which any character of more than ASCII comes in parts."""
    return bytes(tokens).decode("utf-8", "replace")


def pieces(text: bytes, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    writer, found = Writer(of_bytes, stop), []
    for token in text:
        found.append(writer.add(token))
        if writer.is_stopped:
            break
    return [*found, writer.rest()], writer.is_stopped


letters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")


@given(st.text(letters, max_size=40), st.lists(st.text(letters, min_size=1, max_size=4), max_size=3))
def test_what_is_written_ends_before_the_first_stop(text: str, stop: list[str]) -> None:
    found, is_stopped = pieces(text.encode(), stop)
    ends = [text.index(each) for each in stop if each in text]
    assert is_stopped == bool(ends)
    # The earliest stop to be complete ends it: a later, longer one may have begun before.
    first_complete = (
        min((text.index(each) + len(each), text.index(each)) for each in stop if each in text) if ends else None
    )
    assert "".join(found) == (text if first_complete is None else text[: first_complete[1]])


@given(st.binary(max_size=30))
def test_broken_characters_are_as_the_decoder_has_them(text: bytes) -> None:
    assert "".join(pieces(text)[0]) == text.decode("utf-8", "replace")


def test_no_piece_shows_half_a_character_or_half_a_stop() -> None:
    assert pieces("aé!".encode())[0] == ["a", "", "é", "!", ""]
    assert pieces(b"a<en<end>b", ["<end>"])[0] == ["a", "", "", "", "<en", "", "", "", "", ""]
    assert pieces(b"a<en", ["<end>"])[0] == ["a", "", "", "", "<en"]


@pytest.mark.parametrize("text", ["And the king", "ox and ox", "é ü 漢字 🙂"])
def test_a_real_tokenizer_begins_behind_the_prompt(tiny_llama: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompt, answer = tokenizer("said")["input_ids"], tokenizer(text)["input_ids"]
    writer = Writer(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), prompt=prompt)
    assert "".join([writer.add(token) for token in answer] + [writer.rest()]) == text


def test_a_tokenizer_that_drops_the_first_space_keeps_it_within_a_text() -> None:
    """As sentencepiece's: "▁b" is " b" behind a word, and "b" at the beginning."""

    def decode(tokens: list[int]) -> str:
        return "".join({1: " a", 2: " b"}[token] for token in tokens).lstrip(" ")

    assert Writer(decode, prompt=[1]).add(2) == " b"
    assert Writer(decode).add(2) == "b"
