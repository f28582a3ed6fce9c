"""What of ``task=serve`` is refused before anything listens."""

from __future__ import annotations

import builtins
import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
SERVE = ["task=serve", "tracking=none"]


def test_fields_that_cannot_be_are_all_named_at_once(cli: Cli, tiny_overrides: list[str]) -> None:
    done = cli(*tiny_overrides, *SERVE, "serve.port=70000", "serve.batch=0", "serve.queue=-1", "serve.max_tokens=0")
    assert done.code == 1
    for said in ("serve.port=70000", "serve.batch=0", "serve.queue=-1", "serve.max_tokens=0"):
        assert said in done.err
    assert "Traceback" not in done.err


def test_a_missing_library_is_named_with_its_extra(
    cli: Cli, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fastapi" else found(name, *rest)
    )
    done = cli(*tiny_overrides, *SERVE)
    assert done.code == 1
    assert "pip install 'lora_exp[serve]'" in done.err


def test_neither_is_imported_for_other_tasks(
    cli: Cli, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        assert not name.startswith("lora_exp.use.serving"), name
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert cli(*tiny_overrides, "task=plan", "tracking=none").code == 0


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(cli: Cli, tiny_overrides: list[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = cli(*tiny_overrides, *SERVE, f"serve.port={other.getsockname()[1]}")
    assert done.code == 1
    assert "serve.port=0 takes a free one" in done.err
    assert "model  tiny" not in done.out


def test_a_host_that_is_none_is_said(cli: Cli, tiny_overrides: list[str]) -> None:
    done = cli(*tiny_overrides, *SERVE, "serve.host=203.0.113.7", "serve.port=0")
    assert done.code == 1
    assert "203.0.113.7" in done.err
    assert "Traceback" not in done.err


def test_runs_that_trained_the_base_itself_are_refused(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    assert cli(*tiny_overrides, "tracking=none", "adapter=full", "hydra.run.dir=full").code == 0
    done = cli(*SERVE, "run=full", "serve.port=0")
    assert done.code == 1
    assert "trained the base's own weights" in done.err
    assert "export=merged" in done.err


def test_names_are_one_each_and_none_is_the_bases(
    cli: Cli, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = ["model=hf", f"model.path={base_folder}", "model.label=tiny", "device=cpu", "model.dtype=float32"]
    serve = [*SERVE, *model, f"run={adapter_folders['plain']}", "serve.port=0"]
    for names, said in {
        "[a,b]": "2 names for 1 runs",
        "[tiny]": "what the base is called",
        "['a b']": "cannot be used",
    }.items():
        done = cli(*serve, f"serve.names={names}")
        assert done.code == 1
        assert said in done.err
