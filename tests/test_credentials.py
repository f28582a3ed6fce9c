"""What is a login, and what is none."""

from __future__ import annotations

import logging

import pytest
from omegaconf import OmegaConf

from lora_exp.config import Config, TrackingConfig
from lora_exp.credentials import (
    CredentialError,
    RedactingFormatter,
    adopt_login,
    holds_login,
    login_problems,
    redacted,
    refuse_in_arguments,
    refuse_in_config,
)

LOGINS = [
    "http://user:S3cretPw@host/x",
    "https://S3cretPw@host",
    "https://user@corp.com:S3cretPw@host",
    "http://user:S3cr@etPw/S3cretPw@host:5000",
    "http://:S3cretPw@host",
    "postgresql://user:S3cretPw@host/db",
    "s3://KEY:S3cretPw@bucket/a",
    "https://host/x?token=S3cretPw",
    "https://host/x?a=1&api_key=S3cretPw#y",
    "https://host/x?X-Amz-Signature=S3cretPw",
    "/data/file.txt?access_token=S3cretPw",
]
NONE = [
    "http://host:5000/a",
    "postgresql://user@host/db",
    "ssh://git@host/x",
    "https://host/@scope/package",
    "https://host/x?page=2&monkey=1",
    "sqlite:////a/b.db?timeout=5",
    "ORG/NAME",
    "[q_proj,v_proj]",
    "rank=8,16",
]


@pytest.mark.parametrize("text", LOGINS)
def test_a_login_is_seen_refused_and_taken_out(text: str) -> None:
    assert holds_login(text)
    for around in ("{}", "failed at {} (refused)", "('{}')", '"{}"'):
        shown = redacted(around.format(text))
        assert "S3cretPw" not in shown
        assert "S3cr" not in shown
        assert "***" in shown
    for argument in (f"tracking.uri={text}", f"+x='{text}'", f"data={{path: {text}}}", f"--{text}"):
        with pytest.raises(CredentialError, match="MLFLOW_TRACKING_PASSWORD") as refused:
            refuse_in_arguments(["rank=8", argument])
        assert "S3cretPw" not in str(refused.value)
    with pytest.raises(CredentialError, match=r"^a\.b holds"):
        refuse_in_config(OmegaConf.create({"a": {"b": text, "c": 1}, "d": ["${oc.env:HOME}"]}))


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_login_passes_unchanged(text: str) -> None:
    assert not holds_login(text)
    assert redacted(f"at {text} now") == f"at {text} now"
    refuse_in_arguments([text, f"data.path={text}"])


def test_a_key_that_names_a_secret_is_refused_but_not_its_interpolation() -> None:
    with pytest.raises(CredentialError, match=r"env_set\.MLFLOW_TRACKING_PASSWORD holds"):
        refuse_in_arguments(["+hydra.job.env_set.MLFLOW_TRACKING_PASSWORD=S3cretPw"])
    refuse_in_arguments(["+hydra.job.env_set.MLFLOW_TRACKING_PASSWORD=${oc.env:PW}", "data.tokens=5"])


def test_the_environments_own_secrets_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "plain words")
    monkeypatch.setenv("SOME_API_KEY", "S3cretPw")
    monkeypatch.setenv("TINY_TOKEN", "is")
    assert redacted("this is S3cretPw or plain words") == "this is *** or ***"
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "at %s", ("http://u:S3cretPw@h",), None)
    assert RedactingFormatter("%(message)s").format(record) == "at http://***@h"


@pytest.mark.parametrize(
    ("uri", "variables"),
    [
        ("https://me:p%40w%2F@host/x", {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "p@w/"}),
        ("https://S3cretPw@host/x", {"LORA_EXP_TRACKING_USER_TOKEN": "S3cretPw"}),
        ("https://host/x", {}),
    ],
)
def test_a_login_leaves_the_address(uri: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "LORA_EXP_TRACKING_USER_TOKEN")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    adopt_login()
    assert os.environ["MLFLOW_TRACKING_URI"] == "https://host/x"
    assert {name: os.environ[name] for name in names if name in os.environ} == variables


def test_a_config_is_looked_through() -> None:
    from dataclasses import asdict

    assert login_problems(asdict(Config(tracking=TrackingConfig(uri="http://u:p@h"))))[0].startswith("tracking.uri ")
    assert login_problems(asdict(Config())) == []
