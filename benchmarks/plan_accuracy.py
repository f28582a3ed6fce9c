"""Plan against reality: ``python -m benchmarks.plan_accuracy [OUT.md]`` makes the tables of PLAN_ACCURACY.md.

Reality is one training step on the CPU: tensors as they are stored, what torch.autograd.graph.saved_tensors_hooks
sees (each storage once, what is stored left out), and the highest point of the allocations that torch.profiler
records.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measured import Measured, measure
from lora_exp.config import Config, conf_folder
from lora_exp.plan.estimate import Plan, Planner
from lora_exp.schema import register, to_config

SMALL_LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
BATCHES = (1, 4, 8)
IMAGES = (8, 32, 64)
HEADER = (
    *("model", "base", "batch", "checkpointing", "trainable", "total", "weights MB", "adapter MB"),
    *("gradients MB", "optimizer MB", "file MB", "activations MB", "peak of the step MB"),
)


def main() -> None:
    register()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        small = _small_llama(Path(folder))
        lines = ["| " + " | ".join(row) + " |" for row in (HEADER, ("---",) * len(HEADER))]
        print("\n".join(lines), flush=True)
        for overrides in _cases(small):
            lines.append("| " + " | ".join(compared(overrides)) + " |")
            print(lines[-1], flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text("\n".join(lines) + "\n")


def compared(overrides: list[str]) -> tuple[str, ...]:
    """The row of one configuration."""
    config = _config(overrides)
    return _row(config, Planner(config).plan(), measure(config))


def _cases(small: list[str]) -> Iterator[list[str]]:
    for model in (["model=smollm2_135m"], small):
        for stored in ("none", "nf4"):
            for checkpointing in ("false", "true"):
                for batch in BATCHES:
                    yield [*model, f"quantization={stored}", *_step(batch, checkpointing)]
    for choices in (["nf4", "quantization.double_quant=true"], ["int8"], ["nf4", "model.dtype=bfloat16"]):
        yield [*small, f"quantization={choices[0]}", *choices[1:], *_step(4, "false")]
    yield ["model=smollm2_135m", "quantization=nf4", "quantization.double_quant=true", *_step(4, "false")]
    yield [*small, "adapter=dora", "dropout=0.1", *_step(4, "false")]
    yield [*small, "backend=peft", *_step(4, "false")]
    for stored in ("nf4", "int8"):  # most layers are quantised and not adapted
        few = ["targets=[q_proj,v_proj]", "model.dtype=bfloat16"]
        yield [*small, f"quantization={stored}", *few, *_step(4, "false")]
    for batch in IMAGES:
        yield ["+experiment=vision_conv2d", f"train.micro_batch_size={batch}"]


def _step(batch: int, checkpointing: str) -> list[str]:
    return [f"train.micro_batch_size={batch}", f"train.gradient_checkpointing={checkpointing}"]


def _small_llama(folder: Path) -> list[str]:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL_LLAMA)).save_pretrained(folder)
    return ["model=hf", f"model.path={folder}", "model.label=small_llama"]


def _config(overrides: list[str]) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", overrides=["task=plan", "device=cpu", *overrides]))


def _row(config: Config, plan: Plan, real: Measured) -> tuple[str, ...]:
    counts = [(plan.trainable, real.trainable), (plan.total, real.total)]
    sizes = [
        (sum(plan.base_bytes.values()), real.weights),
        (plan.adapter_bytes, real.adapter),
        (plan.gradient_bytes, real.gradients),
        (plan.optimizer_bytes, real.optimizer),
        (plan.adapter_file_bytes, real.file),
        (plan.activation_bytes, real.activations),
        (plan.step_peak_bytes, real.peak),
    ]
    exact = [f"{ours:,}" if ours == theirs else f"{ours:,} ≠ {theirs:,}" for ours, theirs in counts]
    near = [f"{ours / 1e6:.2f} / {theirs / 1e6:.2f} ({100 * (ours / theirs - 1):+.1f} %)" for ours, theirs in sizes]
    checkpointing = "on" if config.train.gradient_checkpointing else "off"
    return (*_names(config), str(config.train.micro_batch_size), checkpointing, *exact, *near)


def _names(config: Config) -> tuple[str, str]:
    stored = config.quantization.name + (" double_quant" if config.quantization.double_quant else "")
    dtype = "" if config.model.dtype in ("auto", "float32") else f" {config.model.dtype}"
    adapter = "" if config.adapter.name == "lora" else f" {config.adapter.name}"
    backend = "" if config.backend == "native" else f" {config.backend}"
    few = "" if config.targets is None else f" on {' and '.join(config.targets)}"
    return f"{config.model.label}{adapter}{' dropout' if config.dropout else ''}{backend}{few}", f"{stored}{dtype}"


if __name__ == "__main__":
    main()
