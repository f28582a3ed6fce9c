"""What a tokenizer makes of texts that are hard to cut, kept beside an export, for llama.cpp to be compared with."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "tokenization.json"
TEXTS = (
    "Hello, world!",
    " leading and trailing ",
    "two  three   four    spaces\t\ttabs\n\n\nlines\r\n end",
    "it's we'll I'VE they'd O'Neill",
    "1 12 123 1234567890 3.14159 1,000,000 x2y3 ٣٤ ²½",
    "naïve café Ångström ÀÉÎ größe İstanbul",
    "Привет, мир! Γειά σου שלום مرحبا नमस्ते สวัสดี",
    "你好，世界。日本語テスト 한국어",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b \ufeff \u00a0.",
    "def f(x):\n\treturn {'a': [1, 2], \"b\": x**2}  # done!!!\n",
    "https://example.org/a_b?c=d&e=%20#f <b>bold</b> $5.00 100% a@b.c",
    "CamelCase snake_case kebab-case ALLCAPS aaaaaaaaaaaaaaaaaaaaaaaa ------====....",
)


def save(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the texts, also with special tokens in them, and their tokens, into ``FILE``.

    In NFC, which some tokenizers make of any text and llama.cpp does not.
    """
    special = "".join(f"{token}a {token} b" for token in dict.fromkeys(tokenizer.all_special_tokens))
    texts = [unicodedata.normalize("NFC", text) for text in (*TEXTS, special)]
    found = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
    (folder / FILE).write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def check(folder: Path, tokenize: Callable[[str], list[int]]) -> None:
    """Raise UserError for a text that ``tokenize`` cuts otherwise."""
    for text, expected in json.loads((folder / FILE).read_text(encoding="utf-8")).items():
        if (found := tokenize(text)) != expected:
            raise UserError(
                f"llama.cpp cuts {text!r} into other tokens than the tokenizer of the run, {found} for {expected}, and "
                "would answer such texts otherwise: use export=merged, or export.verify=false where none comes"
            )
