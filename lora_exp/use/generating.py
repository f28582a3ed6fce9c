"""``task=generate``: prompts answered by base and adapters, or a conversation with them in the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_exp.adapters.files.whole import write_text
from lora_exp.config import Config
from lora_exp.data import kind_of
from lora_exp.errors import UserError
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.use.columns import Columns, console
from lora_exp.use.loading import BASE, Trained, load_trained
from lora_exp.use.prompts import Prompt, Prompter, given_prompts
from lora_exp.use.rows import loaded
from lora_exp.use.writing import Answer, Writer

log = logging.getLogger(__name__)
FILE = "generated.jsonl"
_OPENINGS = 3
_ASKS = "you: "
Found = list[dict[str, Any]]


def generate(config: Config, job: Job) -> UseResult:
    """Load once, then answer; all answers are in the job's folder, and in ``generate.out``."""
    _check_source(config)
    trained = load_trained(config)
    session = Session(trained, config, console())
    began = time.monotonic()
    prompts = _prompts(trained, config, session.prompter)
    with contextlib.suppress(_LeftError):
        session.answer(prompts) if prompts else session.converse()
    return session.end(job.folder, time.monotonic() - began)


class _LeftError(Exception):
    """The person has had enough."""


class Session:
    """Everybody's answers, shown as they come and kept."""

    def __init__(self, trained: Trained, config: Config, screen: Console) -> None:
        self._section, self._screen = config.generate, screen
        self._writer, self.prompter = Writer(trained, config.generate), Prompter.of(trained, config)
        self._names = [name for name in trained.names if name != BASE or config.generate.base]
        self._titles = _titles(trained, self._names)
        self._found: Found = []

    def answer(self, prompts: Sequence[Prompt]) -> None:
        """Each prompt by everybody."""
        for start in range(0, len(prompts), self._section.batch):
            signals.obey()
            self._answer_together(prompts[start : start + self._section.batch])

    def converse(self) -> None:
        """Until the person ends it. In conversations everybody remembers what was said, and what it has answered."""
        self._screen.print(_hint(self.prompter), style="dim")
        said: dict[str, list[dict[str, str]]] = {name: [] for name in self._names}
        while True:
            line = _line()
            if not line.strip():
                said = {name: [] for name in self._names}
                continue
            try:
                self._turn(line, said)
            except signals.Stopped as stop:
                signals.answered()
                raise _LeftError from stop
            except UserError as error:
                self._screen.print(str(error), markup=False)

    def end(self, folder: Path, seconds: float) -> UseResult:
        """Write what was answered."""
        files = [folder / FILE, *([Path(self._section.out).expanduser()] if self._section.out else [])]
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in self._found)
        for file in files:
            write_text(file, text)
        tokens = sum(sum(each["tokens"].values()) for each in self._found)
        prompts = "1 prompt" if len(self._found) == 1 else f"{len(self._found)} prompts"
        log.info(f"{prompts}, {tokens} tokens in {seconds:.1f} s: {files[-1]}")
        return UseResult({"tokens": float(tokens), "tokens_per_s": tokens / max(seconds, 1e-9)}, list(map(str, files)))

    def _answer_together(self, prompts: Sequence[Prompt]) -> None:
        if len(prompts) == 1:
            with Columns(self._screen, prompts[0].shown, list(self._titles.values()), prompts[0].expected) as columns:
                answers = {name: [self._written(name, prompts[0], columns)] for name in self._names}
        else:
            answers = {name: self._writer.write(name, prompts) for name in self._names}
        for place, prompt in enumerate(prompts):
            own = {name: found[place] for name, found in answers.items()}
            if len(prompts) > 1:
                self._show(prompt, own)
            self._keep(prompt, own)

    def _show(self, prompt: Prompt, answers: dict[str, Answer]) -> None:
        with Columns(self._screen, prompt.shown, list(self._titles.values()), prompt.expected) as columns:
            for name, answer in answers.items():
                columns.update(self._titles[name], answer.text)

    def _written(self, name: str, prompt: Prompt, columns: Columns) -> Answer:
        title = self._titles[name]
        (answer,) = self._writer.write(name, [prompt], lambda text: columns.update(title, text))
        columns.update(title, answer.text)
        return answer

    def _turn(self, line: str, said: dict[str, list[dict[str, str]]]) -> None:
        """One line to everybody, each in its own conversation."""
        is_chat = self.prompter.ask is not None
        asked = {name: [*past, {"role": "user", "content": line}] for name, past in said.items()}
        prompts = {name: self.prompter.prompt(asked[name] if is_chat else line) for name in self._names}
        with Columns(self._screen, line, list(self._titles.values())) as columns:
            answers = {name: self._written(name, prompts[name], columns) for name in self._names}
        for name, answer in answers.items():
            said[name] = [*asked[name], {"role": "assistant", "content": answer.text}]
        self._keep(self.prompter.prompt(line), answers)

    def _keep(self, prompt: Prompt, answers: dict[str, Answer]) -> None:
        asked = prompt.asked if isinstance(prompt.asked, str) else list(prompt.asked)
        found = {
            "prompt": asked,
            "texts": {name: answer.text for name, answer in answers.items()},
            "tokens": {name: answer.tokens for name, answer in answers.items()},
            "finish": {name: answer.finish for name, answer in answers.items()},
        }
        self._found.append(found | ({} if prompt.expected is None else {"held_out": prompt.expected}))


def _check_source(config: Config) -> None:
    """Without a prompt, a terminal and a run there is nothing to go on from; said before anything is loaded."""
    section = config.generate
    is_asked = any(each is not None for each in (section.prompt, section.file, section.held_out, config.run))
    if not is_asked and not sys.stdin.isatty():
        raise UserError("there is no prompt, and no terminal to ask for one: add generate.prompt=TEXT")


def _prompts(trained: Trained, config: Config, prompter: Prompter) -> list[Prompt]:
    """What to answer; none where there is a terminal to be asked in."""
    section = config.generate
    if found := given_prompts(config, prompter):
        return found
    if section.held_out is None and sys.stdin.isatty():
        return []
    run = next(iter(trained.runs.values()), None)
    if run is None or run.folder is None:
        raise UserError(
            "generate.held_out goes on from rows of a run's data, which is not known here: add generate.prompt=TEXT"
        )
    data = loaded(config.data, trained)
    openings = kind_of(config.data).openings(data.validation, section.held_out or _OPENINGS)
    if not openings:
        raise UserError(f"data={config.data.label} has no rows to go on from: add generate.prompt=TEXT")
    log.info(f"no prompt: {len(openings)} rows held out of {config.data.label} are gone on from")
    return [prompter.opening(ids, rest[: section.max_new_tokens]) for ids, rest in openings]


def _titles(trained: Trained, names: Sequence[str]) -> dict[str, str]:
    """What columns are called: the runs as they are named, without what does not fit."""
    return {name: BASE if name == BASE else trained.runs[name].title for name in names}


def _hint(prompter: Prompter) -> str:
    anew = ", an empty line begins anew" if prompter.ask is not None else ""
    return f"Ctrl-D ends{anew}."


def _line() -> str:
    """What the person types next. Raises ``_LeftError`` at the end of it, by Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrows and a history
    try:
        with signals.at_once():
            return input(_ASKS)
    except EOFError:
        print()
        raise _LeftError from None
    except signals.Stopped as stop:
        print()
        signals.answered()
        raise _LeftError from stop
