"""What one real training step takes, for benchmarks/plan_accuracy.py and the tests of plans."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_exp import models
from lora_exp.backends import Adapted, adapt
from lora_exp.config import Config
from lora_exp.data import Batch, kind_of, load_data
from lora_exp.machine.place import Place, resolve_place, set_seed
from lora_exp.training.optimizers import build_optimizer


@dataclass
class Measured:
    """Counts, and bytes. ``activations``: what autograd saves below the head; under checkpointing the layers'
    inputs and what the largest layer saves while it is recomputed. ``peak``: of the step, above what stays."""

    trainable: int
    total: int
    weights: int
    adapter: int
    activations: int
    gradients: int = 0
    optimizer: int = 0
    peak: int = 0
    file: int = 0


@dataclass
class _Saved:
    """Storages that autograd saved, by where: ``trunk``, ``head`` and one entry a layer."""

    outside: set[int]
    places: dict[str, dict[int, int]] = field(default_factory=lambda: {"trunk": {}, "head": {}, "inputs": {}})
    current: str = "trunk"
    kept: list[torch.UntypedStorage] = field(default_factory=list)  # or another tensor gets the same address

    def note(self, tensor: Tensor, place: str | None = None) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.outside and storage.nbytes():
            self.kept.append(storage)
            self.places.setdefault(place or self.current, {})[key] = storage.nbytes()
        return tensor

    def bytes_of(self, *places: str) -> int:
        return sum({key: size for place in places for key, size in self.places[place].items()}.values())


def measure(config: Config, place: Place | None = None) -> Measured:
    """Load, adapt and train one step of ``config`` on the CPU."""
    quantised = config.quantization.name != "none"
    place = place or resolve_place("cpu", config.model.dtype, not config.adapter.is_added, quantised)
    shape = {} if kind_of(config.data).needs_tokenizer else load_data(config.data, lambda: None).shape
    base = models.load_base(models.find_source(config.model), config.model, place, shape, config.quantization)
    weights = _bytes(_stored(base))
    set_seed(config.seed)
    adapted = adapt(base, config)
    added = _bytes(_stored(adapted.model)) - weights  # before a pass, in which int8 layers move their constants
    adapted.model.train()
    step = _Step(adapted, config, place, _batch(base, config))
    with torch.no_grad():  # the first pass of a model tells whether its loss needs all logits
        step.loss()
    retained = step.activations(config.train.gradient_checkpointing)
    found = Measured(adapted.trainable, adapted.total, weights, added, retained)
    if config.train.gradient_checkpointing:
        models.checkpoint_layers(base)
    optimizer = build_optimizer(adapted.parameters, config.optimizer, adapted.fast)
    step.loss().backward()
    optimizer.step()
    found.gradients = _bytes([parameter.grad for parameter in adapted.parameters if parameter.grad is not None])
    found.optimizer = _bytes([value for state in optimizer.state.values() for value in state.values()])
    found.peak, found.file = step.peak(), _file_bytes(adapted)
    return found


@dataclass
class _Step:
    adapted: Adapted
    config: Config
    place: Place
    batch: Batch

    def loss(self) -> Tensor:
        with self.place.compute():
            return kind_of(self.config.data).losses(self.adapted.model, self.batch).total.sum()

    def activations(self, checkpointing: bool) -> int:
        model = self.adapted.model
        saved = _Saved({tensor.untyped_storage().data_ptr() for tensor in _stored(model)})
        with _watched(model, saved), torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
            loss = self.loss()
        del loss
        layers = [place for place in saved.places if place.startswith("layer")]
        if not checkpointing:
            return saved.bytes_of("trunk", *layers)
        return max(saved.bytes_of("trunk", "inputs", layer) for layer in layers)

    def peak(self) -> int:
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.loss().backward()
        found = profile.profiler
        assert found is not None
        assert found.kineto_results is not None
        level = peak = 0
        events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda one: one.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return peak


@contextlib.contextmanager
def _watched(model: nn.Module, saved: _Saved) -> Iterator[None]:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None

    def enter_head(module: nn.Module, inputs: object) -> None:  # no hook on the head itself: it would change the loss
        if head is not None and not isinstance(module, nn.Embedding) and _own_weight(module) is head.weight:
            saved.current = "head"

    def enter_layer(module: nn.Module, inputs: tuple[object, ...], keywords: dict[str, object]) -> None:
        for value in (*inputs, *keywords.values()):
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor):
                    saved.note(tensor, "inputs")
        saved.current = f"layer{len(saved.places)}"
        saved.places[saved.current] = {}

    def leave_layer(*_: object) -> None:
        saved.current = "trunk"

    hooks = [register_module_forward_pre_hook(enter_head)]
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            hooks.append(module.register_forward_pre_hook(enter_layer, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave_layer))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("weight")


def _stored(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and the constants of quantised ones, each storage once."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in list(found):
        state = getattr(parameter, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            found += [value for value in vars(one or object).values() if isinstance(value, Tensor)]
        found += [value for value in (getattr(parameter, "SCB", None),) if value is not None]
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in found}.values())


def _batch(base: nn.Module, config: Config) -> Batch:
    """Rows as a plan has them, with values that differ: of tokens, any of the model's."""
    kind = kind_of(config.data)
    row = kind.row()
    if "input_ids" in row:
        assert isinstance(base, PreTrainedModel)
        row["input_ids"] = torch.randint(0, base.config.vocab_size, row["input_ids"].shape)
    if "pixels" in row:
        row["pixels"] = torch.randint(0, 256, row["pixels"].shape, dtype=torch.uint8)
    return kind.collate([row] * config.train.micro_batch_size)


def _file_bytes(adapted: Adapted) -> int:
    with tempfile.TemporaryDirectory() as folder:
        adapted.save(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
