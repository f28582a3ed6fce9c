"""``task=serve``: several adapters over one base behind an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util

from lora_exp.config import Config
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.task import Task, task

_LEAST = {"batch": 1, "queue": 0, "context": 2, "max_tokens": 1, "max_body_kb": 1, "adapters": 1, "grace_s": 0}


@task("serve")
class Serve(Task):
    result = UseResult
    of_runs = True

    def problems(self, config: Config) -> list[str]:
        section = config.serve
        problems = [
            f"serve.{name}={getattr(section, name)} is below {least}: use {least} or more"
            for name, least in _LEAST.items()
            if getattr(section, name) < least
        ]
        if not 0 <= section.port < 2**16:
            problems.append(f"serve.port={section.port} is no port: use 1 to 65535, or 0 for a free one")
        absent = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
        if absent:
            problems.append(f"task=serve: {' and '.join(absent)} not installed: pip install 'lora_exp[serve]'")
        return problems

    def run(self, config: Config, job: Job) -> UseResult:
        with signals.at_once():
            from lora_exp.use.serving.server import run_serve

        run_serve(config)
