"""The sections that only tasks on finished runs read: what is evaluated, written, exported and served, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class BestConfig:
    """Which run ``run=best`` is: the best by ``metric`` among those ``of`` a sweep's folder, the id of a sweep's MLflow
    run, or an MLflow experiment's name; null: of the newest sweep below ./outputs.

    ``better``: lower or higher; null: as the metric is known to be.
    """

    of: str | None = None
    metric: str = "eval/loss"
    better: str | None = None


@dataclass
class ExportConfig:
    """What a finished run is written as. A format (``export/formats/``) reads those of the fields that it knows.

    ``path``: the folder; null: ``outputs/exports/RUN-FORMAT``. ``overwrite``: replace one that is there.

    ``verify``: load what was written in its own runtime, in a fresh process, and compare. ``texts`` held-out texts of
    ``tokens`` tokens each are looked at. ``max_logit`` and ``max_kl``: what is let through (nats); null: the format's.

    ``dtype`` of what is merged: float32, float16, bfloat16; auto: the base's. ``quantise``: none, or nf4, fp4, int8 in
    which a merged model is stored again. ``shard_gb``: the largest file, in 10⁹ bytes. ``type``: of GGUF's weights.
    """

    format: str = MISSING
    path: str | None = None
    overwrite: bool = False
    verify: bool = True
    texts: int = 4
    tokens: int = 32
    max_logit: float | None = None
    max_kl: float | None = None
    dtype: str = "auto"
    quantise: str = "none"
    shard_gb: float = 5.0
    type: str = "f16"


@dataclass
class EvaluateConfig:
    """``split``: validation, test or train, of ``data``. ``rows``: at most so many; null: all.

    ``merged``: also each adapter merged into the base. ``base``: also the base alone. ``forget``: another dataset, by
    the name of a file in ``conf/data`` or a path to text, on which the loss is taken too.
    """

    split: str = "validation"
    rows: int | None = field(default=None, metadata={"such_as": 32})
    base: bool = True
    merged: bool = True
    forget: str | None = None


@dataclass
class GenerateConfig:
    """``prompt``: a text or a list of them. ``file``: a text file, a prompt a line, or .jsonl with ``prompt`` or
    ``messages``; neither: a conversation in the terminal. ``out``: a .jsonl file for the answers.

    ``chat``: put prompts into the tokenizer's chat template; null: where it has one and the run was trained on chats.
    ``system``: the system's message there. ``base``: answer by the base alone, too.

    ``temperature`` 0: always the likeliest token.
    """

    prompt: Any = None
    file: str | None = None
    out: str | None = None
    chat: bool | None = None
    system: str | None = None
    base: bool = True
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = field(default=None, metadata={"such_as": 50})
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)


@dataclass
class ServeConfig:
    """An OpenAI-compatible server on ``host``. ``batch`` prompts at a time are answered, whichever adapters they are
    for; up to ``queue`` more wait.

    ``names``: what the runs are asked for by, in their order; empty: their own short names. ``context``: tokens of a
    prompt and its answer, at most the model's own; ``max_tokens``: of an answer. ``max_body_kb``: of a request's body.
    ``adapters``: how many may be loaded at once. ``folder``: below which adapters may be loaded from while it serves;
    null: ./outputs. ``grace_s``: how long what runs may go on after a signal.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    names: list[str] = field(default_factory=list)
    batch: int = 8
    queue: int = 256
    context: int = 4096
    max_tokens: int = 512
    max_body_kb: int = 256
    adapters: int = 16
    folder: str | None = None
    grace_s: int = 5
