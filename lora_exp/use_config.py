"""The sections that only tasks on finished runs read: what is evaluated, written, exported and served, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

# None of which a training's result depends on.
SECTIONS = ("export", "best", "evaluate", "analyse", "generate", "serve")


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
    """``split``: validation, test or train, of ``data``. ``rows``: at most so many, evenly spread, or ``all``; null: as
    many as the training looked at, which is ``train.eval_blocks``, and of test rows all.

    ``base``: also the base alone. ``merged``: also each adapter merged into the base. ``together``: several adapters in
    one pass over the base; null: where there are several. One by one they give a run's own figures to the bit.

    ``forget``: another dataset, on which the loss is taken before and after: the name of a file in ``conf/data``, a
    YAML file like those, or a path to text.
    """

    split: str = "validation"
    rows: Any = field(default=None, metadata={"such_as": 32})
    base: bool = True
    merged: bool = True
    together: bool | None = field(default=None, metadata={"such_as": False})
    forget: str | None = None


@dataclass
class AnalyseConfig:
    """``curve``: the loss with each layer's change cut to ``ranks`` (null: 1, 2, 4, … up to the run's own), on the rows
    that ``evaluate`` says. ``margin``: by how much (nats) the loss at the smallest rank that will do may be above the
    run's; ``save``: keep that adapter.

    ``intruders``: whether to look for intruder dimensions: of the ``top`` directions of each changed weight, those that
    are less than ``similarity`` like every direction of the base's.
    """

    curve: bool = True
    ranks: list[int] | None = None
    margin: float = 0.01
    save: bool = True
    intruders: bool = True
    top: int = 10
    similarity: float = 0.5


@dataclass
class GenerateConfig:
    """``prompt``: a text or a list of them. ``file``: a text file, a prompt a line, or .jsonl with ``prompt`` or
    ``messages`` (``-``: lines of standard input). ``held_out``: the beginnings of so many rows held out for validation.
    None of them: a conversation in the terminal, and where there is none ``held_out=3``.

    ``out``: a .jsonl file for the answers, which ``overwrite`` lets be replaced. ``base``: answer by the base, too.

    ``chat``: ask in the layout of conversations; null: where the run was trained on such. ``system``: the first message
    of each; null: that of the run's data, if any.

    ``temperature`` 0: always the likeliest token; else drawn, by ``seed``. ``stop``: texts that end an answer.
    ``batch``: how many prompts are answered together, the shorter ones filled up.
    """

    prompt: Any = None
    file: str | None = None
    held_out: int | None = field(default=None, metadata={"such_as": 3})
    out: str | None = None
    overwrite: bool = False
    base: bool = True
    chat: bool | None = field(default=None, metadata={"such_as": True})
    system: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = field(default=None, metadata={"such_as": 50})
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    seed: int = 0
    batch: int = 1


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
