"""How a tokenizer cuts a text before its merges apply, by llama.cpp's names.

llama.cpp's own converter looks at the hash of what a tokenizer makes of one text, which knows published vocabularies
alone. Here it is what the tokenizer says that it does, so that a vocabulary of one's own has a name as well.
"""

from __future__ import annotations

from typing import Any

from lora_exp.errors import UserError
from lora_exp.export.gguf.family import elsewhere

Json = dict[str, Any]  # a part of tokenizer.json
GPT2 = ("bytes, cut",)
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (what is done in turn, whether a piece that is a token is taken whole): llama.cpp's name
_NAMES = {
    (GPT2, False): "gpt-2",
    (("digits", *GPT2), False): "smollm",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_QWEN35, "bytes"), False): "qwen35",
    ((_TEKKEN, "bytes"), True): "tekken",
}


def pre_tokenizer(tokenizer: Json) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts. Raises UserError for a way that it has no name for."""
    steps = tuple(_step(part) for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    whole = bool(tokenizer["model"].get("ignore_merges"))
    if (name := _NAMES.get((steps, whole))) is None:
        raise UserError(
            f"the tokenizer cuts texts in a way that we know no name for in llama.cpp ({' | '.join(steps) or 'none'}; "
            f"ignore_merges={whole}), and a wrong one would change the model's answers: {elsewhere()}"
        )
    _check_normalizer(tokenizer.get("normalizer"))
    return name


def _check_normalizer(normalizer: Json | None) -> None:
    """llama.cpp takes texts as they come: NFC is left to whoever writes them, as its own converter does for Qwen."""
    kinds = [part["type"] for part in _parts(normalizer, "normalizers")]
    if other := [kind for kind in kinds if kind != "NFC"]:
        raise UserError(
            f"the tokenizer changes texts before it cuts them ({', '.join(other)}), which llama.cpp does not: "
            "serve it with transformers (task=serve)"
        )


def _parts(node: Json | None, key: str) -> list[Json]:
    """The steps of a normalizer or a pre-tokenizer, one after the other."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [part for inner in node[key] for part in _parts(inner, key)]
    return [node]


def _step(part: Json) -> str:
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return GPT2[0] if part.get("use_regex", True) else "bytes"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        pattern = part["pattern"]
        return str(pattern.get("Regex", pattern.get("String")))
    return str({key: value for key, value in part.items() if key != "trim_offsets"})
