"""Messages are laid out as the run's training had them, and end where its answers end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_exp.data.kinds.chat import Chat
from lora_exp.errors import UserError
from lora_exp.use.serving.prompts import Prompts, prompts_of

ASK = [{"role": "user", "content": "who"}]


@pytest.fixture
def tokenizer(base_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_folder)


def made(tokenizer: Any, **fields: Any) -> Prompts:
    section = Chat(label="x", **fields)
    return Prompts(tokenizer, section.asks(tokenizer), frozenset({2}), len(tokenizer))


def text(prompts: Prompts, messages: list[dict[str, Any]]) -> str:
    return str(prompts.tokenizer.decode(prompts.of_messages(messages)))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"layout": "plain"}, "### Instruction:\nwho\n\n### Response:\n"),
        ({"layout": "raw"}, "who"),
        ({"layout": "template"}, "<|user|>who</s><|assistant|>"),
        ({"layout": "template", "system": "Be brief"}, "<|system|>Be brief</s><|user|>who</s><|assistant|>"),
    ],
)
def test_each_layout_is_the_trainings(tokenizer: Any, fields: dict[str, Any], expected: str) -> None:
    prompts = made(tokenizer, **fields)
    assert text(prompts, ASK) == expected
    assert prompts.chat_ends == {2}


def test_the_prompt_is_what_the_training_had_before_the_answer(tokenizer: Any, tmp_path: Path) -> None:
    """Rows of the training itself are the oracle."""
    from lora_exp.data.chat.loading import load_chat

    questions = [f"who is {number}" for number in range(40)]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(f'{{"prompt": "{asked}", "completion": "the king"}}\n' for asked in questions))
    for layout in ("plain", "raw", "template"):
        section = Chat(label="x", path=str(file), layout=layout, packing=False, cache_dir=str(tmp_path / "cache"))
        prompts = Prompts(tokenizer, section.asks(tokenizer), frozenset({2}), len(tokenizer))
        ours = [prompts.of_messages([{"role": "user", "content": asked}]) for asked in questions]
        rows: Any = load_chat(section, tokenizer).train
        for row in rows:
            learnt = (row["labels"] != -100).tolist().index(True)
            assert row["input_ids"].tolist()[:learnt] in ours


def test_a_closing_token_of_the_template_ends_an_answer(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<|end|>")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for prompts in (made(tokenizer, layout="template"), Prompts(tokenizer, None, frozenset({2}), len(tokenizer))):
        assert prompts.chat_ends == {2, end}


def test_without_a_template_a_chat_is_refused_and_a_refusing_template_says_why(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        Prompts(tokenizer, None, frozenset(), 400).of_messages(ASK)
    with pytest.raises(UserError, match="roles must alternate"):
        made(tokenizer, layout="template").of_messages(ASK)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Prompts(tokenizer, None, frozenset(), 400).of_messages(ASK)


def test_a_token_that_the_model_has_not_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="the model has 5"):
        Prompts(tokenizer, None, frozenset(), 5).of_text("And the king")


def test_the_ends_are_the_tokenizers_and_the_generation_configs(tokenizer: Any) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=400))
    for named, ends in (([7, 8], {2, 7, 8}), (7, {2, 7}), (None, {2})):
        model = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=named))
        assert prompts_of(None, tokenizer, SimpleNamespace(model=model)).ends == ends  # type: ignore[arg-type]


def test_a_run_is_asked_as_its_own_config_says(tokenizer: Any, tmp_path: Path, cli: Callable[..., Any]) -> None:
    from lora_exp.use.runs import find_run
    from lora_exp.use_config import BestConfig

    file = tmp_path / "chat.jsonl"
    file.write_text("".join(f'{{"prompt": "who is {number}", "completion": "the king"}}\n' for number in range(40)))
    base = tokenizer.name_or_path
    done = cli(
        "model=hf", f"model.path={base}", "model.label=tiny", "data=chat", f"data.path={file}", "data.layout=plain",
        "data.system=Be brief", "device=cpu", "train.steps=1", "train.warmup_steps=0", "train.eval_every=1",
        "tracking=none", "hydra.run.dir=talk",
    )  # fmt: skip
    assert done.code == 0, done.err
    from lora_exp.config import TrackingConfig

    run = find_run("talk", BestConfig(), TrackingConfig(enabled=False))
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=400)))
    prompts = prompts_of(run, tokenizer, SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert text(prompts, ASK) == "Be brief\n\n### Instruction:\nwho\n\n### Response:\n"
