"""What base and adapters write: against transformers' and PEFT's own ``generate``, and as a person sees it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_exp.adapters import LoraModel

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
Cli = Callable[..., Any]
Train = Callable[..., Path]
Use = Callable[..., Any]
PROMPTS = ["And the king said", "the sea, and (the ox)", "lamb"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def greedy(model: Any, tokenizer: Any, text: str, count: int, **options: Any) -> str:
    """transformers' own greedy continuation."""
    asked = tokenizer(text, return_tensors="pt", **options)
    found = model.generate(**asked, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(found[0, asked.input_ids.shape[1] :], skip_special_tokens=True))


def test_the_likeliest_text_is_transformers_of_the_merged_model_and_peft_s(
    train: Train, use: Use, tiny_llama: Path
) -> None:
    from peft import PeftModel

    run = train("one", "train.steps=30", "bias=all")
    listed = "[" + ",".join(f"'{prompt}'" for prompt in PROMPTS) + "]"
    used = use(
        "task=generate", f"run={run}", f"generate.prompt={listed}", "generate.max_new_tokens=12", "tracking=none"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(run / "adapter"))
    made = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), run / "adapter", verbose=False)
    merged = made.merge_and_unload()
    assert [answer["prompt"] for answer in used.answers] == PROMPTS
    for answer in used.answers:
        expected = greedy(merged, tokenizer, answer["prompt"], 12)
        assert answer["texts"]["day-one"] == expected == greedy(theirs, tokenizer, answer["prompt"], 12)
        assert answer["texts"]["base"] == greedy(base, tokenizer, answer["prompt"], 12) != expected
        assert answer["tokens"] == {"base": 12, "day-one": 12}
    assert not [line for line in used.out.splitlines() if len(line) > 80 and not line.startswith(("run", "3 prompts"))]


def test_together_they_are_answered_alike(train: Train, use: Use) -> None:
    run = train("one", "train.steps=30")
    listed = "[" + ",".join(f"'{prompt}'" for prompt in PROMPTS) + "]"
    asked = ["task=generate", f"run={run}", f"generate.prompt={listed}", "generate.max_new_tokens=12", "tracking=none"]
    assert use(*asked).answers == use(*asked, "generate.batch=2").answers


@pytest.mark.parametrize("adapter", ["full", "dora"])
def test_others_than_plain_lora(adapter: str, train: Train, use: Use, tiny_llama: Path) -> None:
    run = train("one", f"adapter={adapter}", "train.steps=20")
    used = use("task=generate", f"run={run}", "generate.prompt=the sea", "tracking=none", "generate.max_new_tokens=8")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    if adapter == "full":
        model: Any = AutoModelForCausalLM.from_pretrained(run / "adapter")
    else:
        model = LoraModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_llama), run / "adapter", verbose=False
        )
    (answer,) = used.answers
    assert answer["texts"]["day-one"] == greedy(model, tokenizer, "the sea", 8)
    assert answer["texts"]["base"] == greedy(base, tokenizer, "the sea", 8)


def test_a_seed_draws_the_same_again_and_another_another(train: Train, use: Use) -> None:
    run = train()
    asked = ["task=generate", f"run={run}", "generate.prompt=the sea", "tracking=none", "generate.temperature=1.5"]
    first, again, other = use(*asked), use(*asked), use(*asked, "generate.seed=1")
    assert first.answers == again.answers != other.answers
    two = use(*asked[:2], "generate.prompt=[lamb,the sea]", *asked[3:])
    assert two.answers[1] == first.answers[0]  # whatever was asked before
    narrow = use(*asked, "generate.top_k=1")
    assert narrow.answers == use(*asked[:4]).answers  # the likeliest of one


def test_stop_ends_an_answer_before_it(train: Train, use: Use) -> None:
    run = train("one", "train.steps=30")
    asked = ["task=generate", f"run={run}", "generate.prompt=And the king said", "tracking=none", "generate.base=false"]
    (whole,) = use(*asked).answers
    text = whole["texts"]["day-one"]
    stop = text[5:8]
    (cut,) = use(*asked, f"generate.stop=['{stop}']").answers
    assert cut["texts"]["day-one"] == text[: text.index(stop)]
    assert (cut["finish"]["day-one"], whole["finish"]["day-one"]) == ("stop", "length")
    assert list(cut["texts"]) == ["day-one"]


@pytest.fixture
def chat_run(train: Train, tiny_llama: Path, workplace: Path) -> Callable[..., Path]:
    """A run on conversations in a layout."""
    rows = [{"prompt": f"what did the ox do {i}?", "completion": "the ox sang"} for i in range(40)]
    (workplace / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workplace / "template.jinja").write_text(TEMPLATE)

    def run(name: str, *overrides: str) -> Path:
        overriding = [
            "model=hf", f"model.path={tiny_llama}", "model.label=tiny", "data=chat", "data.path=chat.jsonl",
            "data.max_length=64", "data.val_fraction=0.2", "train.steps=40", "train.warmup_steps=1",
            "train.eval_every=40", "train.eval_blocks=8", "train.micro_batch_size=4", "device=cpu",
        ]  # fmt: skip
        return train(name, *overrides, overriding=overriding)

    return run


@pytest.mark.parametrize(
    ("overrides", "laid"),
    [
        (("data.layout=plain",), "### Instruction:\n{}\n\n### Response:\n"),
        (("data.template=template.jinja", "data.system=be brief"), "<system>be brief</s><user>{}</s><assistant>"),
        (("data.layout=raw",), "{}"),
    ],
)
def test_a_chat_is_asked_as_it_was_trained(
    overrides: tuple[str, ...], laid: str, chat_run: Callable[..., Path], use: Use, tiny_llama: Path
) -> None:
    run = chat_run("one", *overrides)
    used = use("task=generate", f"run={run}", "generate.prompt=what did the ox do 3?", "tracking=none")
    (answer,) = used.answers
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    made = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), run / "adapter", verbose=False)
    expected = greedy(
        made.merge_and_unload(), tokenizer, laid.format("what did the ox do 3?"), 64, add_special_tokens=False
    )
    assert answer["texts"]["day-one"] == expected == "the ox sang"
    assert answer["finish"] == {"base": "length", "day-one": "stop"}
    other = use(
        "task=generate", f"run={run}", "generate.prompt=what did the ox do 3?", "tracking=none", "generate.chat=false"
    )
    assert other.answers[0]["texts"] != answer["texts"] or laid == "{}"


def test_messages_of_a_file_and_rows_held_out(chat_run: Callable[..., Path], use: Use, workplace: Path) -> None:
    run = chat_run("one", "data.template=template.jinja")
    messages = [{"role": "user", "content": "what did the ox do 5?"}]
    records = [
        {"prompt": "what did the ox do 5?"},
        {"messages": messages},
        {"messages": [*messages, {"role": "assistant", "content": "the ox sang"}]},
        {"prompt": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}, *messages]},
    ]
    (workplace / "asked.jsonl").write_text("".join(json.dumps(record) + "\n\n" for record in records))
    out = ["generate.out=answers.jsonl", "tracking=none"]
    used = use("task=generate", f"run={run}", "generate.file=asked.jsonl", *out)
    answers = [json.loads(line) for line in (workplace / "answers.jsonl").read_text().splitlines()]
    assert answers == used.answers
    assert [answer["texts"]["day-one"] for answer in answers] == ["the ox sang"] * 4
    assert answers[2]["held_out"] == "the ox sang"
    assert answers[1]["prompt"] == answers[2]["prompt"] == messages
    held_out = use("task=generate", f"run={run}", "generate.held_out=2", "tracking=none")
    assert [answer["held_out"] for answer in held_out.answers] == ["the ox sang"] * 2
    assert all(answer["texts"]["day-one"] == "the ox sang" for answer in held_out.answers)


def test_without_a_prompt_or_a_terminal_held_out_rows_are_gone_on_from(
    train: Train, use: Use, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    used = use("task=generate", f"run={train()}", "tracking=none")
    assert len(used.answers) == 3
    assert "no prompt: 3 rows held out of text are gone on from" in used.out
    assert "held out" in used.out
    for answer in used.answers:
        assert answer["prompt"] + answer["held_out"] in text_file.read_text()


def test_lines_of_standard_input_and_of_a_text_file(
    train: Train, use: Use, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train()
    monkeypatch.setattr("sys.stdin", io.StringIO("the sea\n\nlamb\n"))
    asked = ["task=generate", f"run={run}", "tracking=none", "generate.max_new_tokens=4"]
    piped = use(*asked, "generate.file=-")
    (workplace / "asked.txt").write_text("the sea\n\nlamb\n")
    assert [answer["prompt"] for answer in piped.answers] == ["the sea", "lamb"]
    assert use(*asked, "generate.file=asked.txt").answers == piped.answers


def test_any_text_is_a_prompt(train: Train, use: Use) -> None:
    run = train()
    texts = ["In the beginning, God", "it's (so) \\ ${said}: a=b", '"Go," he said', "[INST] a, b [/INST]", "42", "a\\"]
    for text in texts:
        used = use(
            "task=generate", f"run={run}", f"generate.prompt={text}", "tracking=none", "generate.max_new_tokens=2"
        )
        assert [answer["prompt"] for answer in used.answers] == [text]


def test_the_base_alone(use: Use, tiny_overrides: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    used = use("task=generate", *tiny_overrides, "tracking=none", "generate.prompt=the sea")
    assert list(used.answers[0]["texts"]) == ["base"]
    monkeypatch.setattr("sys.stdin", io.StringIO())
    done = cli("task=generate", *tiny_overrides, "tracking=none")
    assert done.code == 1
    assert "there is no prompt, and no terminal to ask for one: add generate.prompt=TEXT" in done.err


def test_several_runs_below_each_other(train: Train, use: Use) -> None:
    runs = [train(name, f"seed={seed}", "optimizer.lr=5e-2") for seed, name in enumerate(("one", "two"))]
    used = use("task=generate", *(f"run={run}" for run in runs), "generate.prompt=the sea", "tracking=none")
    assert list(used.answers[0]["texts"]) == ["base", "day-one", "day-two"]
    for run in ("base", "day/one", "day/two"):
        assert f"│ {run}" in used.out
    apart = [use("task=generate", f"run={run}", "generate.prompt=the sea", "tracking=none") for run in runs]
    for each in apart:
        assert each.answers[0]["texts"].items() <= used.answers[0]["texts"].items()


BAD = {
    ("generate.temperature=-1",): "generate.temperature=-1.0 is below 0",
    ("generate.top_p=0", "generate.temperature=1"): "generate.top_p=0.0 is outside (0, 1]",
    ("generate.top_p=0.9",): "have no meaning at temperature 0: add generate.temperature=0.7",
    ("generate.max_new_tokens=0",): "generate.max_new_tokens=0 is below 1",
    ("generate.file=nowhere.txt",): "generate.file=nowhere.txt is no file",
    ("generate.prompt=a", "generate.held_out=2"): "generate.prompt and generate.held_out are two sources",
    ("generate.prompt=a", "generate.system=b"): "this run was trained on text: add generate.chat=true",
    ("generate.file=bad.jsonl",): "bad.jsonl:2 is not JSON",
    ("generate.file=none.jsonl",): "none.jsonl:1 has no prompt",
    ("generate.file=messages.jsonl",): "messages are for a chat model",
    ("generate.file=empty.txt",): "empty.txt holds no prompt",
    ("generate.prompt=a", "generate.out=bad.jsonl"): "generate.out=bad.jsonl is there",
    ("generate.promt=a",): "did you mean generate.prompt?",
}


def test_bad_input(train: Train, cli: Cli, workplace: Path) -> None:
    run = train()
    (workplace / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (workplace / "none.jsonl").write_text('{"text": "a"}\n')
    (workplace / "messages.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (workplace / "empty.txt").write_text("\n\n")
    for overrides, said in BAD.items():
        done = cli("task=generate", f"run={run}", "tracking=none", *overrides)
        assert done.code == 1
        assert said in done.err
        assert "Traceback" not in done.err
    assert (workplace / "bad.jsonl").read_text().startswith('{"prompt": "a"}')


def test_a_model_without_a_language_is_refused(cli: Cli) -> None:
    done = cli("task=generate", "model=efficientnet_lite0", "data=mnist5k", "generate.prompt=a", "tracking=none")
    assert done.code == 1
    assert "task=generate is for language models" in done.err


class Terminal:
    """A command line in a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()

        def take() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        environment = {**os.environ, "COLUMNS": "80", "LINES": "40", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lora_exp", *arguments], cwd=folder, env=environment, stdin=theirs, stdout=theirs,
            stderr=theirs, start_new_session=True, preexec_fn=take,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def until(self, text: str, seconds: float = 120.0) -> None:
        """Read until the text is on the screen."""
        ends = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < ends, self.seen
            if select.select([self._ours], [], [], 0.5)[0]:
                try:
                    self.seen += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:
                    assert text in self.seen, self.seen
        self.seen = self.seen[self.seen.rindex(text) + len(text) :]

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def ended(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._ours)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["\x04", "\x03"], ids=["Ctrl-D", "Ctrl-C"])
def test_a_conversation_in_a_terminal(end: str, chat_run: Callable[..., Path], workplace: Path) -> None:
    run = chat_run("one", "data.template=template.jinja")
    terminal = Terminal(workplace, "task=generate", f"run={run}", "tracking=none", "generate.max_new_tokens=16")
    terminal.until("Ctrl-D ends")
    terminal.until("you: ")
    terminal.type("what did the ox do 3?\n")
    terminal.until("the ox sang")
    terminal.until("you: ")
    terminal.type("what did the ox do 9?\n")
    terminal.until("the ox sang")
    terminal.until("you: ")
    time.sleep(0.5)  # readline has shown its prompt before it waits for a signal
    terminal.type(end)
    assert terminal.ended() == 0
    (file,) = workplace.glob("outputs/used/*/*/generated.jsonl")
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["what did the ox do 3?", "what did the ox do 9?"]
    outcome = json.loads((file.parent / "result.json").read_text())
    assert outcome["status"] == "FINISHED"
