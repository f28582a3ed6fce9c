"""Conversations from a file to rows, and a run of them from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_exp.data.kind import Data
from lora_exp.data.kinds.chat import Chat
from lora_exp.errors import UserError
from lora_exp.training.objectives import IGNORED

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def written(folder: Path, records: list[Any], name: str = "chat.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return file


def asked(count: int, words: int = 3) -> list[dict[str, str]]:
    return [{"instruction": f"say {index} " * words, "output": f"here is {index}"} for index in range(count)]


def load(tokenizer: Any, tmp_path: Path, records: list[Any], **changes: Any) -> Data:
    given = {"max_length": 64, "val_fraction": 0.25, **changes}
    section = Chat(label="c", path=str(written(tmp_path, records)), cache_dir=str(tmp_path / "cache"), **given)
    assert section.problems("train") == []
    return section.load(lambda: tokenizer)


def texts(tokenizer: Any, rows: Any, learnt: bool = False) -> list[str]:
    found = []
    for index in range(len(rows)):
        row = rows[index]
        found.append(tokenizer.decode(row["input_ids"][row["labels"] != IGNORED] if learnt else row["input_ids"]))
    return found


def test_a_tokenizer_without_a_template_gets_the_plain_layout(tokenizer: Any, tmp_path: Path) -> None:
    data = load(tokenizer, tmp_path, asked(8, 1), packing=False)
    assert texts(tokenizer, data.train)[0] == "### Instruction:\nsay 0 \n\n### Response:\nhere is 0</s>"
    assert texts(tokenizer, data.train, learnt=True)[0] == "here is 0</s>"
    assert data.example == "\x1b[2m### Instruction:\nsay 0 \n\n### Response:\n\x1b[22mhere is 0</s>"


def test_a_given_template_wins(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    data = load(tokenizer, tmp_path, asked(8, 1), packing=False, template=str(file), max_length=128)
    assert texts(tokenizer, data.train, learnt=True)[0] == "here is 0<|im_end|>\n"


def test_all_is_learnt_but_the_first_token(tokenizer: Any, tmp_path: Path) -> None:
    data = load(tokenizer, tmp_path, asked(8, 1), packing=False, learn="all")
    assert texts(tokenizer, data.train, learnt=True) == texts(tokenizer, data.train)


def test_packing_changes_the_training_rows_alone(tokenizer: Any, tmp_path: Path) -> None:
    records = asked(40, 1)
    packed, padded = (load(tokenizer, tmp_path, records, packing=packing, max_length=128) for packing in (True, False))
    assert len(packed.train) < len(padded.train) == 30  # type: ignore[arg-type]
    assert texts(tokenizer, packed.validation) == texts(tokenizer, padded.validation)
    joined = "".join(texts(tokenizer, packed.train, learnt=True))
    assert all(joined.count(f"here is {index}</s>") == 1 for index in range(40) if index % 4 != 2)
    assert any("30 rows are packed into" in line for line in packed.said)
    assert packed.fingerprint == padded.fingerprint


def test_what_is_too_long_is_cut_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    records = [*asked(8, 1), {"instruction": "short", "output": "long " * 100}]
    data = load(tokenizer, tmp_path, records, packing=False)
    assert "1 rows are longer than data.max_length=64 and are cut there" in data.said
    assert max(data.train.lengths) == 64  # type: ignore[attr-defined]
    with pytest.raises(
        UserError, match=r"1 of 9 records cannot be used.*\n.*line 9: \d+ tokens, and data.max_length=64"
    ):
        load(tokenizer, tmp_path, records, overlong="broken")


def test_rows_without_a_learnt_token_are_counted_and_none_at_all_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    late = {"instruction": "on and on " * 60, "output": "end"}
    data = load(tokenizer, tmp_path, [*asked(8, 1), late], packing=False)
    assert "1 rows have no token to learn and are left out" in data.said
    lates = [{**late, "output": str(index)} for index in range(8)]
    with pytest.raises(UserError, match=r"Of 6 conversations to train on none has a token to learn .* raise it"):
        load(tokenizer, tmp_path, lates)


def test_bad_records_are_named_and_passed_over_up_to_a_share(tokenizer: Any, tmp_path: Path) -> None:
    records = [*asked(16, 1), {"instruction": "a", "output": ""}, '{"instruction": "a", "out', {"question": "b"}, "3"]
    with pytest.raises(UserError) as caught:
        load(tokenizer, tmp_path, records)
    said = str(caught.value)
    assert said.startswith("4 of 20 records cannot be used (20.00%)")
    assert "chat.jsonl, line 17: an answer is empty" in said
    assert "and 1 more" in said
    data = load(tokenizer, tmp_path, records, max_bad_fraction=0.2, packing=False)
    assert len(data.train) + len(data.validation) == 16  # type: ignore[arg-type]
    assert data.said[0].startswith("4 of 20 records cannot be used and are passed over")


def test_what_a_template_refuses_is_a_bad_record_also_from_the_cache(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "refusing.jinja"
    file.write_text("{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}" + CHATML)
    records = [*asked(9, 1), {"instruction": "no", "output": "yes"}]
    for _ in range(2):
        data = load(tokenizer, tmp_path, records, template=str(file), max_bad_fraction=0.1)
        assert "line 10: the chat template refuses it (TemplateError: never)" in data.said[0]


def test_answers_that_a_template_rewrites_are_said(tokenizer: Any, tmp_path: Path) -> None:
    file = Path(__file__).parent / "templates/qwen3.jinja"
    chats = [
        {"messages": [{"role": role, "content": f"a{index}"} for role in ("user", "assistant") * 2]}
        for index in range(8)
    ]
    data = load(tokenizer, tmp_path, chats, template=str(file), packing=False, max_length=200)
    assert any(line.startswith("8 conversations are several rows each") for line in data.said)
    assert len(data.train) == 12  # type: ignore[arg-type]


def test_rows_are_made_once_and_again_when_anything_changes(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    from lora_exp.data.chat import loading

    monkeypatch.setattr(
        loading._Maker, "make", lambda self, folder, make=loading._Maker.make: made.append(make(self, folder))
    )
    cases: list[tuple[list[Any], dict[str, Any]]] = [
        (asked(8), {}), (asked(9), {}), (asked(8), {"learn": "all"}), (asked(8), {"max_length": 50}),
        (asked(8), {"system": "s"}), (asked(8), {"layout": "raw"}),
    ]  # fmt: skip
    for _ in range(2):
        for records, changes in cases:
            load(tokenizer, tmp_path, records, **changes)
    assert len(made) == len(cases)
    load(tokenizer, tmp_path, asked(8), packing=False)
    assert len(made) == len(cases)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layout": "fancy"}, "data.layout=fancy is not known: choose one of auto, template, plain, raw"),
        ({"learn": "some"}, "data.learn=some is not known: choose one of answers, all"),
        ({"overlong": "x"}, "data.overlong=x is not known"),
        ({"max_length": 1}, "data.max_length=1 is below 2"),
        ({"template": "/no/such", "layout": "plain"}, "data.template=/no/such has no meaning with data.layout=plain"),
        ({"template": "/no/such"}, "data.template=/no/such is no file"),
        ({"fields": {"question": "q"}}, "data.fields.question is none of a record's parts: choose among instruction"),
        ({"source": "nowhere"}, "data.source=nowhere is not known"),
        ({"options": {"a": 1}}, "are a data.source's: leave them out"),
    ],
)
def test_problems_are_seen_before_anything_is_read(changes: dict[str, Any], problem: str) -> None:
    assert any(problem in found for found in Chat(label="c", path="x", **changes).problems("train"))


def test_a_layout_by_template_needs_one(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.layout=template, and the model's tokenizer has no chat template"):
        load(tokenizer, tmp_path, asked(8), layout="template")


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_run(
    cli: Callable[..., Any], tiny_overrides: list[str], workplace: Path, packing: str, checkpointing: str
) -> None:
    file = written(workplace, asked(60, 1))
    kept = [each for each in tiny_overrides if not each.startswith(("data=", "data.path", "data.block"))]
    chosen = ["data=chat", f"data.path={file}", "data.max_length=64", f"data.packing={packing}"]
    done = cli(*kept, *chosen, f"train.gradient_checkpointing={checkpointing}", "train.grad_accum_steps=2")
    assert done.code == 0, done.err
    assert "validation loss" in done.out


def test_a_run_writes_before_and_after(cli: Callable[..., Any], tiny_overrides: list[str], workplace: Path) -> None:
    file = written(workplace, asked(60, 1))
    kept = [each for each in tiny_overrides if not each.startswith(("data=", "data.path", "data.block"))]
    chosen = ["data=chat", f"data.path={file}", "data.max_length=64", "train.keep=best"]
    done = cli(*kept, *chosen, "data.written=[exact_match]", "data.write_rows=3", "data.write_tokens=4")
    assert done.code == 0, done.err
    (folder,) = (workplace / "outputs/runs").glob("*/*")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    said = [record for record in records if "written/exact_match" in record]
    assert [record["step"] for record in said] == [0, max(said[-1]["step"], 1)]
    result = json.loads((folder / "result.json").read_text())
    assert {"exact_match", "exact_match_before"} <= set(result["result"]["metrics"])


def test_a_plan(cli: Callable[..., Any], tiny_overrides: list[str], workplace: Path) -> None:
    kept = [each for each in tiny_overrides if not each.startswith(("data=", "data.path", "data.block"))]
    done = cli(*kept, "task=plan", "data=chat", f"data.path={written(workplace, asked(9))}", "data.max_length=64")
    assert done.code == 0, done.err
    assert "rows of up to 64" in done.out
