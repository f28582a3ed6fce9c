"""Plan against reality: ``python benchmarks/plan_accuracy.py [OUT.md]`` makes the table of PLAN_ACCURACY.md.

Reality is one training step on the CPU: bytes of what torch.autograd.graph.saved_tensors_hooks sees (each storage
once, parameters left out), of the gradients and of the optimizer's states, and the highest point of the
allocations that torch.profiler records.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_exp import models
from lora_exp.backends import Adapted, adapt
from lora_exp.config import Config, conf_folder, register, to_config
from lora_exp.place import Place
from lora_exp.plan.architecture import facts_of
from lora_exp.plan.estimate import Plan, Planner
from lora_exp.training.objectives import Batch, causal_lm_losses
from lora_exp.training.optimizers import build_optimizer

SMALL_LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
BATCHES = (1, 4, 8)
HEADER = ("model", "batch", "checkpointing", "trainable", "total", "weights MB", "adapter MB", "gradients MB")
HEADER += ("optimizer MB", "file MB", "activations MB", "peak of the step MB")


@dataclass
class Measured:
    trainable: int
    total: int
    weights: int
    adapter: int
    gradients: int = 0
    optimizer: int = 0
    file: int = 0
    activations: int = 0
    peak: int = 0


@dataclass
class Saved:
    """Storages that autograd saved, by where: ``trunk``, ``head`` and one entry a layer."""

    parameters: set[int]
    places: dict[str, dict[int, int]] = field(default_factory=lambda: {"trunk": {}, "head": {}})
    current: str = "trunk"
    kept: list[Any] = field(default_factory=list)  # or another tensor gets the same address

    def note(self, tensor: Tensor, place: str | None = None) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.parameters and storage.nbytes():
            self.kept.append(storage)
            self.places.setdefault(place or self.current, {})[key] = storage.nbytes()
        return tensor

    def bytes_of(self, *places: str) -> int:
        return sum({key: size for place in places for key, size in self.places[place].items()}.values())


def main() -> None:
    register()
    torch.manual_seed(0)
    rows = [line for name in ("smollm2_135m", "small_llama") for line in compared(name)]
    table = "\n".join(["| " + " | ".join(row) + " |" for row in (HEADER, ("---",) * len(HEADER), *rows)])
    print(table)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(table + "\n")


def compared(name: str) -> Iterator[tuple[str, ...]]:
    for checkpointing in (False, True):
        for batch in BATCHES:
            config = _config(name, batch, checkpointing)
            plan = Planner(config, Place(torch.device("cpu"), torch.float32)).plan()
            yield _row(name, batch, checkpointing, plan, measure(config))


def measure(config: Config) -> Measured:
    """One real step."""
    base = _base(config)
    weights = _bytes([*base.parameters(), *base.buffers()])
    adapted = adapt(base, config)
    found = Measured(adapted.trainable, adapted.total, weights, _bytes(adapted.parameters))
    adapted.model.train()
    ids = torch.randint(0, 8000, (config.train.micro_batch_size, config.data.block_size))
    batch = {"input_ids": ids, "labels": ids}
    found.activations = _activations(adapted, batch, config.train.gradient_checkpointing)
    if config.train.gradient_checkpointing:
        models.checkpoint_layers(base)
    optimizer = build_optimizer(adapted.parameters, config.optimizer)
    _loss(adapted.model, batch).backward()
    optimizer.step()
    gradients = [parameter.grad for parameter in adapted.parameters if parameter.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    found.gradients, found.optimizer = _bytes(gradients), _bytes(states)
    found.peak = _peak(adapted.model, batch)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save(Path(folder))
        found.file = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return found


def _activations(adapted: Adapted, batch: Batch, checkpointing: bool) -> int:
    model: Any = adapted.model
    saved = Saved({tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())})
    with _watched(model, saved), torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
        loss = _loss(model, batch)
    del loss
    layers = [place for place in saved.places if place.startswith("layer")]
    if not checkpointing:
        return saved.bytes_of("trunk", *layers)
    return max(saved.bytes_of("trunk", "inputs", layer) for layer in layers)


@contextmanager
def _watched(model: Any, saved: Saved) -> Iterator[None]:
    def enter_layer(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        for value in (*inputs, *keywords.values()):
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor):
                    saved.note(tensor, "inputs")
        saved.current = f"layer{len(saved.places)}"
        saved.places[saved.current] = {}

    def leave_layer(*_: Any) -> None:
        saved.current = "trunk"

    def enter_head(*_: Any) -> None:
        saved.current = "head"

    hooks = [model.get_output_embeddings().register_forward_pre_hook(enter_head)]
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            hooks.append(module.register_forward_pre_hook(enter_layer, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave_layer))
    yield
    for hook in hooks:
        hook.remove()


def _peak(model: nn.Module, batch: Batch) -> int:
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _loss(model, batch).backward()
    found: Any = profile.profiler
    level = peak = 0
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda one: one.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return causal_lm_losses(model, batch).total.sum()


def _base(config: Config) -> Any:
    if config.model.label == "small_llama":
        model = AutoModelForCausalLM.from_config(facts_of(config.model), attn_implementation="sdpa")
        model.config.use_cache = False
        return model
    return models.load_base(models.find_source(config.model), config.model, Place(torch.device("cpu"), torch.float32))


def _config(name: str, batch: int, checkpointing: bool) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = compose("config", overrides=["task=plan", "device=cpu", f"train.micro_batch_size={batch}"])
    config = to_config(composed)
    config.train.gradient_checkpointing = checkpointing
    if name == "small_llama":
        config.model.label, config.model.architecture = name, dict(SMALL_LLAMA)
    return config


def _row(name: str, batch: int, checkpointing: bool, plan: Plan, real: Measured) -> tuple[str, ...]:
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
    return (name, str(batch), "on" if checkpointing else "off", *exact, *near)


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    main()
