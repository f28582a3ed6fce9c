"""Every command that README and docs show: it composes, converts, and passes the checks before anything is loaded."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException

from lora_exp.checks import check
from lora_exp.composing import check_composed, expect_schemas
from lora_exp.config import Config, ConfigError, conf_folder
from lora_exp.schema import register, to_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = re.compile(r"^(?:\$ )?(?:(?:python|torchrun|accelerate launch)\b.* -m lora_exp|lora-exp)(?= |$)")
REFUSED = ("rnak=16", "rank=0 ")  # shown for the message that they end in
# About a file that is not there, a sweep's own values, or several processes.
CHECKED_ELSEWHERE = re.compile(r"\b(?:[A-Z]{2,}|A|B|notes|prompts|peft_suite|parallel)\b")
register()


def commands() -> Iterator[tuple[str, str]]:
    """Page and what stands behind the command's name, whole: a line may go on after a backslash."""
    for page in PAGES:
        for block in re.findall(r"^```(?:bash|text)\n(.*?)^```", page.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if begun := STARTS.match(line):
                    yield page.name, line[begun.end() :].strip()


COMMANDS = list(commands())
OF_FILES = re.compile("--config-dir|plugins=|adapter.config=|rerun=")  # which are read to compose
OTHERS = [(page, line) for page, line in COMMANDS if not OF_FILES.search(line)]


@pytest.fixture(scope="module", autouse=True)
def _configs() -> Iterator[None]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield


@pytest.mark.parametrize(("page", "line"), OTHERS, ids=[f"{page}-{at}" for at, (page, _) in enumerate(OTHERS)])
def test_a_documented_command_passes_the_checks(page: str, line: str) -> None:
    given = get_args_parser().parse_args(shlex.split(line, comments=True))
    for overrides in jobs(given.overrides):
        if line.startswith(REFUSED):
            with pytest.raises((ConfigError, ConfigCompositionException)):
                check(composed(tuple(overrides)))
            continue
        config = composed(tuple(overrides))
        if not CHECKED_ELSEWHERE.search(" ".join(given.overrides)):
            check(config)


def jobs(overrides: list[str]) -> list[list[str]]:
    """The first job of a sweep, and as many others as each choice of a file needs to come once."""
    choices = []
    for override in OverridesParser.create().parse_overrides(overrides):
        key, values = override.get_key_element(), [override.input_line]
        if override.is_sweep_override():
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        choices.append(values if (conf_folder() / key.lstrip("+")).is_dir() else values[:1])
    first = [values[0] for values in choices]
    others = [[*first[:at], value, *first[at + 1 :]] for at, values in enumerate(choices) for value in values[1:]]
    return [first, *others]


@functools.cache
def composed(overrides: tuple[str, ...]) -> Config:
    """As ``lora_exp`` makes it of a command line; what is Hydra's own needs to compose."""
    ours = [override for override in overrides if not override.startswith("hydra")]
    if len(ours) < len(overrides):
        expect_schemas()
        compose("config", list(overrides), return_hydra_config=True)
    found = compose("config", ours)
    check_composed(found)
    return to_config(found)


def test_the_pages_are_read() -> None:
    assert len({page for page, _ in COMMANDS}) >= 20
    assert len(COMMANDS) >= 100
    assert len(OTHERS) >= 90
