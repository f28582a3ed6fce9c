"""The figures of one configuration, from architecture facts alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lora_exp.adapters import LoraModel
from lora_exp.adapters.inspection.traversal import lora_layers
from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.backends import Adapted, adapt
from lora_exp.config import Config
from lora_exp.data import kind_of
from lora_exp.machine.place import Place, resolve_place
from lora_exp.models import with_new_modules
from lora_exp.models.kind import Outline
from lora_exp.plan.architecture import outline_of, prepare_for_kbit, quantised_names
from lora_exp.plan.bound import upper_bound
from lora_exp.plan.kernels import Kernels
from lora_exp.plan.saying import said_once
from lora_exp.plan.sizes import base_bytes, file_bytes, optimizer_bytes, unpacked_bytes
from lora_exp.plan.trace import Step, Work, trace_step

GIB = 2**30
_PEFT_NAME = "base_model.model.{}.weight"


@dataclass(frozen=True)
class Module:
    """One adapted module: ``weight`` is the frozen weight's shape, ``trained`` its adapter's shapes by name."""

    name: str
    layer_type: str
    weight: list[int]
    trained: dict[str, list[int]]
    trainable: int


@dataclass(frozen=True)
class Plan:
    """What a run needs. ``by_layer_type``: {layer type: [trainable, total parameters]}, adapters included.

    ``total_bytes`` is the highest point of a step. Activations and the head do not always peak together (under
    checkpointing a layer is recomputed when the logits are gone), so it can be less than the sum of the parts.
    ``tokens_per_step`` counts what ``unit`` says: of image data, images.
    """

    dtype: str
    device_type: str
    modules: list[Module]
    by_layer_type: dict[str, list[int]]
    trainable: int
    total: int
    base_bytes: dict[str, int]
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    head_bytes: int
    step_peak_bytes: int
    adapter_file_bytes: int
    flops_per_step: int
    tokens_per_step: int
    unit: str = "tokens"
    warnings: list[str] = field(default_factory=list)

    @property
    def fixed_bytes(self) -> int:
        """What is there whatever the batch."""
        return sum(self.base_bytes.values()) + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.step_peak_bytes


class Planner:
    """Plans one configuration and its neighbours (another batch, another rank); reads the architecture once.

    What the library warns of is said once for all of them; not at all if ``is_told`` by who trains next.
    """

    def __init__(self, config: Config, place: Place | None = None, is_told: bool = False) -> None:
        self._said: set[str] | None = None if is_told else set()
        self._config = config
        self._place = place or planned_place(config)
        self._outline = outline_of(config.model, config.data)

    def plan(self, rows: int | None = None, rank: int | None = None) -> Plan:
        """The figures at the config's micro batch size and rank, or at these."""
        config = replace(self._config, rank=rank or self._config.rank)
        if rows is not None:
            config.train = replace(config.train, micro_batch_size=rows)
        with said_once(self._said):
            return _plan(config, self._outline, self._place)

    def upper_bound(self) -> float:
        """Bytes that the config stays below; infinity for a model of unknown form. No step is traced for it."""
        return upper_bound(self._outline(self._place.dtype), self._config)


def planned_place(config: Config) -> Place:
    """``device=cpu`` is planned as it is; anything else as a GPU that computes in bfloat16, here or not."""
    trains_base, quantised = not config.adapter.is_added, config.quantization.name != "none"
    if config.device.partition(":")[0] in ("cpu", "mps"):
        return resolve_place(config.device, config.model.dtype, trains_base, quantised)
    device = torch.device("cuda")
    dtype = torch.bfloat16 if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    if quantised:  # what is not quantised is float32
        return Place(device, dtype, torch.bfloat16 if dtype == torch.bfloat16 else None)
    if trains_base and config.model.dtype == "auto":
        return Place(device, torch.float32, torch.bfloat16)
    return Place(device, dtype)


def _plan(config: Config, outline: Outline, place: Place) -> Plan:
    compute = config.quantization.compute_dtype
    dtype = place.dtype if config.quantization.name == "none" or compute == "auto" else getattr(torch, compute)
    model = outline(dtype)
    quantised = quantised_names(model, config.quantization)
    if quantised:
        prepare_for_kbit(model, quantised)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    config = replace(config, model=with_new_modules(config.model, model))
    adapted = adapt(model, config)
    trained = _named(adapted)
    stored_with, adds = _in_file(adapted), config.adapter.is_added
    stored = base_bytes(weights, quantised, config.quantization)
    step = _step(adapted.model, config, place, weights, quantised)
    kind = kind_of(config.data)
    return Plan(
        dtype=str(dtype).removeprefix("torch."),
        device_type=place.device.type,
        modules=adapted_modules(model),
        by_layer_type=_by_layer_type(model, adapted),
        trainable=adapted.trainable,
        total=adapted.total,
        base_bytes=stored,
        adapter_bytes=_bytes(stored_with) if adds else 0,
        gradient_bytes=_bytes(trained),
        optimizer_bytes=optimizer_bytes(adapted.parameters, config.optimizer),
        activation_bytes=step.activation_bytes,
        head_bytes=step.head_bytes,
        step_peak_bytes=step.peak_bytes,
        adapter_file_bytes=file_bytes(stored_with),
        flops_per_step=step.flops * config.train.grad_accum_steps,
        tokens_per_step=config.train.micro_batch_size * kind.units * config.train.grad_accum_steps,
        unit=kind.unit,
        warnings=_warnings(config, model, step),
    )


def adapted_modules(model: nn.Module) -> list[Module]:
    """Every adapted module of our own with its shapes; for other backends, every module that holds trained weights."""
    ours = [_module(name, layer) for name, layer in lora_layers(model)]
    if ours:
        return ours
    found = []
    for name, module in model.named_modules():
        own = {key: value for key, value in module.named_parameters(recurse=False) if value.requires_grad}
        if own:
            shapes = {key: list(value.shape) for key, value in own.items()}
            first = next(iter(shapes.values()))
            found.append(Module(name, layer_kind(module), first, shapes, sum(value.numel() for value in own.values())))
    return found


def layer_kind(module: nn.Module) -> str:
    """``linear``, ``embedding``, ``conv2d``, …, ``norm`` or ``other``."""
    if isinstance(module, LoRALayerBase):
        return module.layer_type
    kinds = {"Linear": "linear", "Conv1D": "linear", "Embedding": "embedding", "Norm": "norm", "Experts": "experts"}
    for axes in (1, 2, 3):
        kinds |= {f"BatchNorm{axes}d": "norm", f"Conv{axes}d": f"conv{axes}d"}
    return next((kind for end, kind in kinds.items() if type(module).__name__.endswith(end)), "other")


def _step(model: nn.Module, config: Config, place: Place, weights: Mapping[str, Tensor], quantised: set[str]) -> Step:
    kind, section = kind_of(config.data), config.train
    with torch.device("meta"):
        batch = kind.collate([kind.row()] * section.micro_batch_size)
    unpacked = max((unpacked_bytes(weights[name], config.quantization) for name in quantised), default=0)
    work = Work(model, kind.losses, batch, unpacked)
    kernels = Kernels(place.device.type, place.autocast, config.quantization.name in ("nf4", "fp4"))
    return trace_step(work, kernels, section.gradient_checkpointing)


def _module(name: str, layer: LoRALayerBase) -> Module:
    trained = layer.adapter.trained_parameters()
    shapes = {key: list(value.shape) for key, value in trained.items()}
    trainable = sum(parameter.numel() for parameter in trained.values())
    return Module(name, layer.layer_type, list(layer.weight.shape), shapes, trainable)


def _by_layer_type(model: nn.Module, adapted: Adapted) -> dict[str, list[int]]:
    seen, trained = set(), {id(parameter) for parameter in adapted.parameters}
    counts: dict[str, list[int]] = {}
    for module in model.modules():
        # An adapted layer is counted with its adapter, before the walk comes to it.
        for parameter in module.parameters(recurse=isinstance(module, LoRALayerBase)):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                row = counts.setdefault(layer_kind(module), [0, 0])
                row[0] += parameter.numel() if id(parameter) in trained else 0
                row[1] += parameter.numel()
    return counts


def _named(adapted: Adapted) -> dict[str, nn.Parameter]:
    model = adapted.model
    if isinstance(model, LoraModel):
        return {_PEFT_NAME.format(name): value for name, value in model.adapter_parameters().items()}
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _in_file(adapted: Adapted) -> dict[str, Tensor]:
    """What the adapter's file holds, and memory with it: what is trained, and of some starts what they were."""
    model = adapted.model
    if isinstance(model, LoraModel):
        return {_PEFT_NAME.format(name): value for name, value in model.adapter_tensors().items()}
    return dict(_named(adapted))


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _warnings(config: Config, model: nn.Module, step: Step) -> list[str]:
    found = []
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    wanted = kind_of(config.data).positions
    if isinstance(positions, int) and wanted is not None and wanted > positions:
        found.append(
            f"data.{kind_of(config.data).length_field}={wanted} is above the model's {positions} positions: lower it"
        )
    if step.all_logits:
        found.append(f"The loss holds all logits of a micro batch at once: {step.all_logits}.")
    return found
