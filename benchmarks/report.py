"""Results as Markdown, with what they were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from lora_exp.machine.precision import Precision
from lora_exp.machine.waiting import WAITS

from .rows import Row

_HEADINGS = {
    "job": "The whole default job",
    "layers": "Layers: forward and backward, 512 tokens",
    "models": "Models: a whole training step, 1×256 tokens, all seven projections adapted",
    "memory": "Memory",
    "startup": "Start-up",
    "scale": "Growth",
    "waiting": "Waiting threads",
    "trainers": "Trainers",
    "serving": "Several adapters over one base",
    "packed": "Sweeps in one process",
}
_NOTES = {
    "job": "Seconds of whole processes, medians, ours and a plain PEFT + Trainer script's in turns: loading, the "
    "steps, three evaluations of 32 blocks, the adapter saved twice and MLflow. `training_s` are the steps alone, by "
    "the times at which losses were logged; the rest is start-up, evaluation, saving and the end.",
    "layers": "`ratio` is PEFT's median over ours with its 95 % bootstrap interval (`low`, `high`); `tuned_ratio` is "
    "the same for PEFT with `autocast_adapter_dtype=False`; `floor` is the frozen layer. In bfloat16 ours may beat "
    "the floor: where the processor multiplies float32 faster, an adapted layer runs in float32 inside. `forced`: with "
    "that answer whatever was measured. nf4 is "
    "bitsandbytes' layer on both sides, its products in the activations' dtype.\n\nWhat bounds the gain: DoRA with "
    "dropout takes four products with the base weight on both sides (x and the dropped x forward, two gradients "
    "backward), as the frozen path sees all of x: three quarters of our time at 576→1536 in fp32, so the gain is in "
    "what is around them. LoRA in fp32 is the frozen layer's time and some percent on both sides. In small layers a "
    "part of both sides is the first touch of fresh memory, 0.3 to 0.6 ms a tensor of 512×576 on a busy machine.",
    "models": "`captured` is the share of the gap between PEFT and the frozen model (`floor`) that our adapters "
    "close with the same loss; `captured_with_loss` has our loss head as well. `matmul_floor` is 4 FLOP a weight "
    "and token at the rate of a large product.",
    "memory": "Bytes retained for backward, parameters aside, also in multiples of the input. `share`: ours/PEFT. "
    "In a model neighbours share what they keep: q, k and v one input, gate and up another, and `floor` the rest.",
    "startup": "Seconds of fresh processes, median.",
    "scale": "Exponents b of y ~ x^b.",
    "waiting": "Milliseconds a training step in processes of their own, which take turns: with the wait that the "
    "command sets (ours), OpenMP's default and OMP_WAIT_POLICY=PASSIVE, alone and beside a busy process.",
    "trainers": "Seconds an optimizer step of the default job, median, by processes of their own, which take turns: "
    "our loop and transformers' Trainer, on our adapters and on PEFT's. `ratio` is PEFT under "
    "transformers' Trainer over ours under our loop, with its 95 % bootstrap interval, of the steps alone; "
    "`whole_ratio` of the whole processes. transformers' Trainer has our loss head here.",
    "serving": "SmolLM2-135M in float32 with adapters of rank 8 on all seven projections. `together`: requests for "
    "four adapters in one routed batch, by the engine of `task=serve`; `in_turn`: an adapter's after another's; "
    "`one_adapter` and `base`: as many requests, all for one. `ratio`: the second side's time, or bytes, over the "
    "first's, with its 95 % bootstrap interval. Memory is what a process of its own holds more once all is loaded.",
    "packed": "Seconds of whole processes, medians, the sides in turns; every job is an MLflow run. `packed`: "
    "hydra/launcher=packed; `fresh`: a process of PEFT + Trainer a job; `kept`: PEFT in one process, add_adapter and "
    "delete_adapter on a base that it keeps; `basic`: our jobs under Hydra's own launcher. `over_…`: packed over that "
    "side. `peak_over_one`: peak memory over that of one job alone, of the largest rank. Growth: seconds a job takes "
    "in a long sweep, those of its last quarter over those of its first, and what the report takes at its end.",
}


def circumstances(precision: Precision, quick: bool) -> Row:
    """Machine, what it was measured to be fast in, date, versions and command."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    command = f"python -m benchmarks{' --quick' if quick else ''}"
    about = {
        "date": now(),
        **{key.removeprefix("machine."): value for key, value in precision.tags().items()},
        "waiting": ", ".join(f"{key}={os.environ[key]}" for key in WAITS if key in os.environ) or "OpenMP's default",
        "python": platform.python_version(),
        "command": command,
    }
    return about | versions | {"capability": torch.backends.cpu.get_cpu_capability(), "GPU": "not measured"}


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def load() -> list[float]:
    """The machine's load average over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def table(rows: list[Row]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "group"))
    lines = [" | ".join(keys), " | ".join("---" for _ in keys)]
    lines += [" | ".join(_shown(row.get(key, "")) for key in keys) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def write(results: dict[str, Row], folder: Path) -> None:
    """RESULTS.md, with what NOTES.md says of it at its head if there is one, and a plot beside it."""
    parts = ["# Benchmark results", "Made by `python -m benchmarks`; JSON with the same numbers lies beside it."]
    notes = folder / "NOTES.md"
    parts += [notes.read_text().strip()] if notes.exists() else []
    for name, heading in _HEADINGS.items():
        if name in results:
            parts += [f"## {heading}", in_a_line(results[name]["about"]), _NOTES[name], *_tables(results[name])]
    if "layers" in results:
        _plot(results["layers"]["means"], folder / "layers.png")
        parts.append("![PEFT's time over ours](layers.png)")
    (folder / "RESULTS.md").write_text("\n\n".join(parts) + "\n")


_TABLES = ("rows", "other_layers", "by_model", "loss_head", "peaks", "beside", "growth")


def _tables(found: Row) -> list[str]:
    tables = []
    if "means" in found:
        tables.append(
            table(
                [
                    {"geometric mean of": group, **values, "GPU": "not measured"}
                    for group, values in found["means"].items()
                ]
            )
        )
    return [
        *tables,
        *(table(found[key]) for key in _TABLES if found.get(key)),
    ]


def in_a_line(about: Mapping[str, object]) -> str:
    return "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items())


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _plot(means: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(means) + 1), layout="constrained")
    axes.barh(list(means), [values["mean"] - 1 for values in means.values()], left=1)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = [0.8, 1, 1.25, 1.5, 2, 4, 8]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("PEFT's time over ours (geometric mean, log scale)")
    axes.invert_yaxis()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
