"""A plan as tables for a person."""

from __future__ import annotations

import re

from rich.console import Console
from rich.table import Table

from lora_exp.config import Config
from lora_exp.data import kind_of
from lora_exp.plan.estimate import GIB, Module, Plan
from lora_exp.plan.fit import Fit

_LEAST = 2**20  # a part below a MiB is a few buffers


def show(plan: Plan, found: Fit | None, config: Config) -> None:
    """Print the adapted modules, the counts, the memory and what fits."""
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=140)
    for table in (_modules(plan.modules), _counts(plan), _memory(plan)):
        console.print(table, markup=False)
    for line in [*_facts(plan, config), *fit_lines(plan, found, config), *plan.warnings]:
        console.print(line, markup=False, highlight=False)


def memory_parts(plan: Plan) -> dict[str, int]:
    """Bytes by what they are for, in the order of the table."""
    base = {f"base weights, {kind}": size for kind, size in plan.base_bytes.items()}
    return base | {
        "adapter": plan.adapter_bytes,
        "gradients": plan.gradient_bytes,
        "optimizer states": plan.optimizer_bytes,
        "activations": plan.activation_bytes,
        "logits and loss": plan.head_bytes,
    }


def fit_lines(plan: Plan, found: Fit | None, config: Config) -> list[str]:
    """What fits, and if it does not, what to change."""
    if found is None:
        return []
    section, rows = config.plan, config.train.micro_batch_size
    needs = f"{plan.total_bytes / GIB:.2f} GiB and {section.reserve_gib:g} GiB in reserve"
    verdict = "Fits" if found.fits else "Does not fit"
    lines = [f"{verdict} into {section.gpu_gib:g} GiB: it needs {needs}."]
    rank = "" if found.largest_rank is None else f"; largest rank at micro batch {rows}: {found.largest_rank or 'none'}"
    lines.append(f"Largest micro batch at rank {config.rank}: {found.largest_batch or 'none'}{rank}.")
    return lines if found.fits else [*lines, f"What helps: {', '.join(remedies(config, found.largest_batch))}."]


def remedies(config: Config, largest_batch: int) -> list[str]:
    """Overrides that make a plan smaller, the mildest first."""
    ways = [f"train.micro_batch_size={largest_batch}"] if largest_batch else []
    if not largest_batch and config.train.micro_batch_size > 1:
        ways.append("a smaller train.micro_batch_size")
    if not config.train.gradient_checkpointing:
        ways.append("train.gradient_checkpointing=true")
    if config.adapter.trains == "weights":
        return [*ways, "adapter=lora", "a smaller model"]
    if config.quantization.name == "none" and config.task == "plan":
        ways.append("quantization=nf4")
    return [*ways, *kind_of(config.data).remedies, "a smaller model"]


def _modules(modules: list[Module]) -> Table:
    groups: dict[tuple[str, str, str], list[Module]] = {}
    for module in modules:
        shapes = ", ".join(f"{name} {_shape(shape)}" for name, shape in module.trained.items())
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", module.name)
        groups.setdefault((name, _shape(module.weight), shapes), []).append(module)
    table = _table("Adapted modules", "module", "count", "weight", "trained", "parameters")
    for (name, weight, shapes), members in groups.items():
        trainable = sum(module.trainable for module in members)
        table.add_row(name, str(len(members)), weight, shapes, f"{trainable:,}")
    return table


def _counts(plan: Plan) -> Table:
    table = _table("Parameters", "layer type", "trainable", "total", "trainable %")
    for kind, (trainable, total) in [*plan.by_layer_type.items(), ("all", [plan.trainable, plan.total])]:
        table.add_row(kind, f"{trainable:,}", f"{total:,}", f"{100 * trainable / total:.3f}")
    return table


def _memory(plan: Plan) -> Table:
    place = "GPU" if plan.device_type == "cuda" else plan.device_type.upper()
    table = _table(f"Memory per {place}, computing in {plan.dtype}", "part", "GiB")
    for part, size in memory_parts(plan).items():
        if size >= _LEAST:
            table.add_row(part, f"{size / GIB:.3f}")
    table.add_row("total, at the highest point of a step", f"{plan.total_bytes / GIB:.3f}", style="bold")
    return table


def _facts(plan: Plan, config: Config) -> list[str]:
    return [
        f"Adapter file {plan.adapter_file_bytes / 1e6:.2f} MB. A step of {config.train.grad_accum_steps} × "
        f"{config.train.micro_batch_size} {kind_of(config.data).rows}: {plan.tokens_per_step:,} {plan.unit}, "
        f"{plan.flops_per_step / 1e12:.4g} TFLOPs."
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    words = ("module", "weight", "trained", "layer type", "part")
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right", overflow="fold")
    return table


def _shape(sizes: list[int]) -> str:
    return "×".join(map(str, sizes))
