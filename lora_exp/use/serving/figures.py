"""What the engine has done, as Prometheus reads it."""

from __future__ import annotations

from dataclasses import asdict

from lora_exp.use.serving.engine import Engine


def figures(engine: Engine, adapters: int) -> str:
    now = {"requests_running": engine.running, "requests_waiting": engine.waiting, "adapters": adapters}
    lines = [line for name, value in now.items() for line in _metric(name, "gauge", value)]
    lines += [
        line for name, value in asdict(engine.counts).items() for line in _metric(f"{name}_total", "counter", value)
    ]
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, value: int) -> list[str]:
    return [f"# TYPE lora_exp_{name} {kind}", f"lora_exp_{name} {value}"]
