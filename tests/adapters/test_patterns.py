"""Regular expressions: what `re` says, in bounded time."""

import json
import random
import re
import sys
import time

import pytest
import torch

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.adapters.patterns import full_match, prefix_match, suffix_match

NAMES = [
    "", "a", "aaab", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.experts.3.down_proj",
    "visual.blocks.1.qkv",
    "lm_head", "q_proj", "Model.Layers.0.Q_PROJ", "a.b.a.b", "layers.1.q_proj.lora_A", "0.1.2", "x" * 60,
]  # fmt: skip
PATTERNS = [
    r".*_proj", r"model\.layers\.\d+\.(self_attn|mlp)\..*", r"^(?!.*visual).*(q_proj|qkv)$", r"(\w+\.)+q_proj",
    r"(?:model\.)?layers\.(?:[0-9]|1[01])\..*", r"(a|b|\.)*", r"(a+)+b", r"((a*)*)*b", r"(?i)model\.layers\.0\.q_proj",
    r"(?i:Q)_proj", r".*(?<!down)_proj", r".*(?<=self_attn\.)q_proj", r"(\w{1,3}\.?){2,}", r"[^.]+(\.[^.]+){3,5}",
    r"\bq_proj\b", r"(x?){60}", r"(x{1,3}){20,30}", r"(?=(a+)+b)a.*", r"(?!(a+)+b).*", r"()*a*b", r"(|a)+b", r"",
    r"(.*\.)?(layers\.(.*\.)?q_proj)", r"(?P<name>a|\.b\.?)+", r"(?:(?=a)|a)*b", r"(?s:.)*(\.)+.*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_says_what_re_says(pattern):
    for name in NAMES:
        if len(name) < 30 or "+)+" not in pattern:
            assert full_match(pattern, name) == (re.fullmatch(pattern, name) is not None), name
            if not pattern.startswith("(?i)"):
                theirs = re.match(rf"(.*\.)?({pattern})$", name)
                assert suffix_match(pattern, name) == (theirs is not None), name


def test_says_what_re_says_of_random_expressions():
    draw = random.Random(0)

    def expression(depth):
        if depth == 0:
            return draw.choice(["a", "b", ".", r"\.", "[ab]", r"\w", "^", "$", ""])
        one, other = expression(depth - 1), expression(depth - 1)
        return draw.choice(
            [
                one + other,
                f"(?:{one}|{other})",
                f"(?:{one})*",
                f"(?:{one})+?",
                f"({one})?",
                f"(?={one})",
                f"(?:{one}){{1,3}}",
            ]
        )

    for _ in range(400):
        pattern = expression(draw.randrange(1, 5))
        for name in ("", "a", "b", "ab.a", "aabb", "b.b.b"):
            assert full_match(pattern, name) == (re.fullmatch(pattern, name) is not None), (pattern, name)


@pytest.mark.parametrize(
    "pattern", [r"(a+)+", r"(a|a)*b", r"(.*)*b", r"(a|aa)+b", r"(.*a){25}", r".*.*.*.*.*.*.*.*b",
                r"(?=(a+)+b).*", r"((a?){50}){50}b"]
)  # fmt: skip
def test_no_expression_takes_long(pattern):
    started = time.perf_counter()
    try:
        for index in range(300):
            full_match(pattern, f"{'a' * 80}.{index}")
    except ValueError as error:
        assert pattern in str(error)  # noqa: PT017
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_folder_cannot_hang_loading(field, make_tiny, tmp_path):
    long = "q" * 26  # each letter more doubles what `re` takes: half a minute for these

    def base():
        model = make_tiny()
        model.add_module(long, torch.nn.Linear(2, 2))
        return model

    LoraModel(base(), LoraConfig(rank=2, target_modules=["q_proj", long]), verbose=False).save_pretrained(tmp_path)
    path, bad = tmp_path / "adapter_config.json", "(q+)+!"
    stored = json.loads(path.read_text())
    stored[field] = {bad: 3} if field.endswith("pattern") else bad
    path.write_text(json.dumps(stored))
    started = time.perf_counter()
    if field == "target_modules":
        with pytest.raises(ValueError, match=r"\(q\+\)\+!"):
            LoraModel.from_pretrained(base(), tmp_path, verbose=False)
    else:  # as in PEFT, what names nothing is passed over
        LoraModel.from_pretrained(base(), tmp_path, verbose=False)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("(", "not a regular expression"),
        (r"(a+)+\1", "groupref"),
        ("a" * 30_000, "30000 characters"),
        ("(" * 9000, "regular"),
    ],
)
def test_what_cannot_be_read_is_refused(pattern, match):
    with pytest.raises(ValueError, match=match):
        full_match(pattern, "aaa")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 only warns")
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_are_checked_as_they_are_used(field):
    """With something in front of them, where a flag for the whole expression may not stand."""
    with pytest.raises(ValueError, match=f"{field}.*not a regular expression"):
        LoraConfig(**{field: {"(?i)q_proj": 3}})


def test_prefix_match_takes_simple_ones_alone():
    assert prefix_match(r".*?layers\.(\d+)\.", "model.layers.3.q")[1] == "3"
    with pytest.raises(ValueError, match="for ever"):
        prefix_match(r"(a+)+", "aaa")
