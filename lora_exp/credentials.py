"""Logins belong to the environment: nothing that is written, printed or sent may hold one.

Hydra writes a command line into four files a job before our code runs, so ``refuse_in_arguments`` comes first, and
``refuse_in_config`` before Hydra writes what it composed. ``adopt_login`` takes a login out of MLFLOW_TRACKING_URI,
which MLflow prints. ``redacted`` is the last line of defence, for what other libraries say.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from urllib.parse import unquote, urlsplit, urlunsplit

from omegaconf import Container, OmegaConf

from lora_exp.errors import UserError

# user:password@, where a password may hold a slash or an @. A name alone is a token over http(s); before a database or
# over ssh it is a name.
_LOGIN = re.compile(r"(://)[^/\s:'\"]*:[^\s'\"]*@")
_NAME_ALONE = re.compile(r"(?i)(\bhttps?://)[^/\s'\"]+@")
_WORDS = r"(?:[\w.-]*[-_.])?(?:token|password|passwd|pwd|secret|api[-_]?key|access[-_]?key|signature|sig|key)"
_QUERY = re.compile(rf"(?i)([?&;]{_WORDS}=)[^&\s#'\"]+")
_SECRET_KEY = re.compile(r"(?i)(?:^|[._])(?:token|password|passwd|secret|api_?key|access_?key)$")
_SECRET_VARIABLE = re.compile(r"(?i)(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_?KEY)$")
_SHORTEST = 6  # what is shorter is found in any text
_WAY_OUT = (
    "it would be written to disk. Put it into the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
    "MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_URI for MLflow, HF_TOKEN for the hub"
)


class CredentialError(UserError):
    """A login where it would be written down. Its message names the place, never the value."""


def refuse_in_arguments(arguments: Sequence[str]) -> None:
    """Raise ``CredentialError`` if a command line holds a login. Call before Hydra has seen it."""
    found = [_key(argument) for argument in arguments if holds_login(argument) or _names_secret(argument)]
    if found:
        raise CredentialError(_problem(found))


def refuse_in_config(composed: Container) -> None:
    """The same for what Hydra composed of YAML files. Interpolations such as ``${oc.env:NAME}`` are not resolved:
    Hydra writes them as they are."""
    problems = login_problems(OmegaConf.to_container(composed, resolve=False))
    if problems:
        raise CredentialError(problems[0])


def login_problems(values: object) -> list[str]:
    """One message that names every place of nested ``values`` with a login in it, or none."""
    found = sorted({path for path, text in _texts(values) if holds_login(text) or _names_secret(f"{path}={text}")})
    return [_problem(found)] if found else []


def holds_login(text: str) -> bool:
    """Whether there is a URL with a login or a token in ``text``."""
    return any(pattern.search(text) for pattern in (_LOGIN, _NAME_ALONE, _QUERY))


def redacted(text: str) -> str:
    """``text`` without the login of any URL in it, and without any secret of the environment."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    text = _NAME_ALONE.sub(r"\1***@", _LOGIN.sub(r"\1***@", text))
    return _QUERY.sub(r"\1***", text)


def adopt_login() -> None:
    """Move the login of an http(s) MLFLOW_TRACKING_URI into the variables that MLflow reads it from."""
    parts = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return
    login, _, host = parts.netloc.rpartition("@")
    name, _, password = login.partition(":")
    if password:
        os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(name))
        os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(password))
    else:
        os.environ.setdefault(NAME_ALONE, unquote(name))
    os.environ["MLFLOW_TRACKING_URI"] = urlunsplit(parts._replace(netloc=host))


# MLflow takes a user without a password from an address alone: `tracking` sends this one as a header.
NAME_ALONE = "LORA_EXP_TRACKING_USER_TOKEN"


class RedactingFormatter(logging.Formatter):
    """For terminals and log files; tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _problem(places: Sequence[str]) -> str:
    return f"{', '.join(places)} holds a login or a token: {_WAY_OUT}"


def _secrets() -> list[str]:
    """The environment's own, longest first, so that none leaves a part of another."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    return sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)


def _names_secret(argument: str) -> bool:
    """``hydra.job.env_set.MLFLOW_TRACKING_PASSWORD=…``, unless its value only points into the environment."""
    key, _, value = argument.partition("=")
    return bool(value) and not value.strip("'\"").startswith("${") and bool(_SECRET_KEY.search(key))


def _key(argument: str) -> str:
    """What may be shown of it: an override's key, or nothing of a bare value."""
    key, equals, _ = argument.partition("=")
    return key if equals and re.fullmatch(r"[\w.+~@/-]+", key) and "://" not in key else "An argument"


def _texts(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _texts(below, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for below in value:
            yield from _texts(below, path)
    elif isinstance(value, str):
        yield path, value
