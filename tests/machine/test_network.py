"""Asking a server whether it is there, and what a base's source makes of a hub that is not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lora_exp.machine.network import refusal
from lora_exp.models import source
from lora_exp.models.source import Source


def test_an_address_that_answers_is_not_refused_and_a_closed_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/some/path"
        assert refusal(url) is None
    assert isinstance(refusal(url), ConnectionRefusedError)


def test_behind_a_proxy_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert refusal("http://a-name-that-does-not-resolve.invalid") is None


def test_files_are_not_refused() -> None:
    assert refusal("sqlite:///outputs/mlflow.db") is None


@pytest.mark.parametrize("answers", [True, False])
def test_a_silent_hub_leaves_what_it_has_given_before(
    answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "hub_answers", lambda: answers)
    assert Source("org/name").options.get("local_files_only", False) is not answers
    assert "local_files_only" not in Source(str(tmp_path)).options
