"""A transformers tokenizer as llama.cpp has it: tokens, their kinds, merges or scores, special ones, chat template.

Letters: V entries of the vocabulary, as many as the embedding has rows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType

from lora_exp.errors import UserError
from lora_exp.export.gguf.family import Config, elsewhere
from lora_exp.export.gguf.pretokenizers import Json, pre_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"  # what sentencepiece writes for a space
_NEVER = -1e9  # the score of a token that no merge makes
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class Vocabulary:
    """``tokens`` and ``kinds``: V each. ``model``: llama.cpp's name of the algorithm. ``pre``: how a text is cut first.

    ``merges``: of a byte-level tokenizer; ``scores``: of one after sentencepiece, whose texts begin with a space where
    ``leading_space``.
    """

    model: str
    tokens: list[str]
    kinds: list[TokenType]
    pre: str = "default"
    merges: list[str] | None = None
    scores: list[float] | None = None
    leading_space: bool | None = None


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """``rows``: V. Raises UserError for a tokenizer that llama.cpp would follow otherwise."""
    facts = _facts(tokenizer)
    tokens, kinds = _tokens(tokenizer, facts, rows)
    if facts["model"].get("byte_fallback"):
        scores = _scores(facts["model"], tokens)
        space = _leading_space(facts)
        return Vocabulary("llama", tokens, kinds, scores=scores, leading_space=space)
    merges = [" ".join(pair) for pair in _merges(facts["model"])]
    return Vocabulary("gpt2", tokens, kinds, pre_tokenizer(facts), merges)


def describe(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: Config, rows: int) -> None:
    """Add all that a file says of a tokenizer."""
    found = vocabulary(tokenizer, rows)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.leading_space is not None:
        writer.add_add_space_prefix(found.leading_space)
    _describe_special(writer, tokenizer, config)
    if tokenizer.chat_template:
        writer.add_chat_template(_templates(tokenizer.chat_template))


def check(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise UserError, with the next move, for a tokenizer that cannot be written."""
    vocabulary(tokenizer, rows)
    _around(tokenizer)


def _facts(tokenizer: PreTrainedTokenizerBase) -> Json:
    """What tokenizer.json says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts: Json = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    if (kind := facts["model"]["type"]) != "BPE":
        raise UserError(f"export=gguf writes tokenizers of byte pairs, and this is one of {kind}: {elsewhere()}")
    return facts


def _tokens(tokenizer: PreTrainedTokenizerBase, facts: Json, rows: int) -> tuple[list[str], list[TokenType]]:
    """V tokens and their kinds; rows of the embedding that no token has are said to be unused."""
    known = {number: text for text, number in tokenizer.get_vocab().items()}
    if (beyond := max(known, default=0)) >= rows:
        raise UserError(
            f"the tokenizer has a token {beyond} ({known[beyond]!r}), and the model's embedding {rows} rows: take a "
            "tokenizer that fits the model"
        )
    added = {token["id"]: token for token in facts.get("added_tokens", [])}
    unknown = facts["model"].get("unk_token")
    texts, kinds = [], []
    for number in range(rows):
        text = known.get(number)
        texts.append(f"[PAD{number}]" if text is None else text)
        kinds.append(_kind(text, added.get(number), unknown))
    return texts, kinds


def _kind(text: str | None, added: Json | None, unknown: str | None) -> TokenType:
    if text is None:
        return TokenType.UNUSED
    if added is not None:
        if text == unknown:
            return TokenType.UNKNOWN
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL


def _merges(model: Json) -> list[tuple[str, str]]:
    """In their order, also of an older file that writes a pair as one text."""
    return [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]


def _scores(model: Json, tokens: list[str]) -> list[float]:
    """llama.cpp merges the neighbours whose joint token has the highest score: the earliest merge's."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        first.setdefault(left + right, rank)
    return [float(-first[token]) if token in first else _NEVER for token in tokens]


def _leading_space(facts: Json) -> bool:
    """Whether a space is put before a text, of a tokenizer after sentencepiece. Raises UserError for other ways."""
    parts = [*_flat(facts.get("normalizer"), "normalizers"), *_flat(facts.get("pre_tokenizer"), "pretokenizers")]
    found = replaced = False
    for part in parts:
        kind = part["type"]
        if kind == "Prepend" and part["prepend"] == _SPACE:
            found = True
        elif kind == "Metaspace" and part["replacement"] == _SPACE and not part.get("split", True):
            found, replaced = found or part.get("prepend_scheme", "always") != "never", True
        elif kind == "Replace" and part["pattern"] == {"String": " "} and part["content"] == _SPACE:
            replaced = True
        elif not (kind == "Split" and part["pattern"] == {"String": " "} and replaced):  # then there is none left
            raise UserError(f"the tokenizer's step {kind} is none that llama.cpp's has: {elsewhere()}")
    if not replaced:
        raise UserError(f"the tokenizer falls back on bytes, but does not write spaces as {_SPACE}: {elsewhere()}")
    return found


def _flat(node: Json | None, key: str) -> list[Json]:
    if node is None:
        return []
    return [part for inner in node[key] for part in _flat(inner, key)] if node["type"] == "Sequence" else [node]


def _describe_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    for name in _NAMED:
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is None and name in ("bos", "eos"):
            number = _first(getattr(config, f"{name}_token_id", None))
        if number is not None:
            getattr(writer, f"add_{name}_token_id", lambda _: None)(int(number))
    before, after = _around(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text gets a bos and an eos. Raises UserError for a tokenizer that adds others."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before in (False, True):
        for after in (False, True):
            if whole == [bos] * before + plain + [eos] * after:
                return before, after
    raise UserError(
        f"the tokenizer writes {tokenizer.convert_ids_to_tokens(whole)} for 'a', and llama.cpp adds a bos and an eos "
        f"alone: {elsewhere()}"
    )


def _templates(template: Any) -> Any:
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def _first(number: Any) -> int | None:
    return number[0] if isinstance(number, list) and number else number
