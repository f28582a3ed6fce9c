"""Whole models, tiny and random: several adapters in one batch, packed rows, experts, training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lora_exp.adapters import LoraConfig, LoraModel

from .checks import LIMITS, Case, LeftOut, difference, differences

STEPS = 10
_SIZES: dict[str, object] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def cases(device: torch.device) -> Iterator[Case]:
    yield "three adapters in one batch: each as alone, fp32", 1e-5, partial(_routed, device)
    for attention in ("sdpa", "eager"):
        yield f"packed rows, {attention}: no sample sees another", 0.0, partial(_packed, attention, device)
        yield f"packed rows, {attention}: as each row alone, fp32", 1e-5, partial(_packed_alone, attention, device)
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, LIMITS[torch.bfloat16])):
        name = f"a mixture's stacked experts, {str(dtype).removeprefix('torch.')}: as in float64"
        yield name, limit, partial(_experts, dtype, device)
    for variant in ("lora", "dora"):
        name = f"{STEPS} steps of AdamW, {variant}, fp32: the losses of the CPU"
        yield name, 1e-4, partial(_trained, variant, device)
    yield "checkpointed layers, dropout: gradients as without checkpoints", 1e-5, partial(_checkpointed, device)
    yield "a step of training waits for the device nowhere", 0.0, partial(_waits, device)


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    made: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig.from_dict(_SIZES, attn_implementation=attention)).eval()
    return made


def words(rows: int = 4, length: int = 24) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 320, (rows, length))


def adapted(model: nn.Module, **options: object) -> LoraModel:
    torch.manual_seed(2)
    return LoraModel(model, LoraConfig(**{"rank": 8, **options}), "a", verbose=False)  # type: ignore[arg-type]


@torch.no_grad()
def _shaken(model: LoraModel, *names: str) -> LoraModel:
    torch.manual_seed(3)
    for name in names:
        for parameter in model.adapter_parameters(name).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _routed(device: torch.device) -> float:
    model = adapted(llama())
    model.add_adapter("b", LoraConfig(rank=4, use_dora=True))
    model.add_adapter("c", LoraConfig(rank=16, use_rslora=False, lora_alpha=32))
    model = _shaken(model, "a", "b", "c").to(device)
    x, sizes, start, errors = words().to(device), {"a": 1, "b": 2, "c": 1}, 0, []
    with torch.no_grad(), model.route(sizes):
        together = model(input_ids=x).logits
    for name, size in sizes.items():
        model.set_adapter(name)
        with torch.no_grad():
            alone = model(input_ids=x[start : start + size]).logits
        errors.append(difference(together[start : start + size], alone))
        start += size
    return max(errors)


def _packed_logits(model: nn.Module, rows: list[Tensor]) -> Tensor:
    """Logits (1, tokens, V) of rows one after another, each with positions from 0, as the harness hands them over."""
    places = torch.cat([torch.arange(len(row), device=row.device) for row in rows])
    with torch.no_grad():
        out: Tensor = model(input_ids=torch.cat(rows)[None], position_ids=places[None], use_cache=False).logits
    return out


def _packed(attention: str, device: torch.device) -> float:
    model = _shaken(adapted(llama(attention)), "a").to(device)
    first, second, third = (words()[row].to(device) for row in range(3))
    kept = _packed_logits(model, [first, second, third])
    changed = _packed_logits(model, [first, second.flip(0), third])
    lengths = [len(first), len(second), len(third)]
    before, after = kept.split(lengths, 1), changed.split(lengths, 1)
    if torch.equal(before[1], after[1]):
        raise AssertionError("the changed sample's own logits did not change")
    return max(float((before[i] - after[i]).abs().max()) for i in (0, 2))


def _packed_alone(attention: str, device: torch.device) -> float:
    model = _shaken(adapted(llama(attention)), "a").to(device)
    rows = [words()[row][: 12 + 4 * row].to(device) for row in range(3)]
    packed = _packed_logits(model, rows).split([len(row) for row in rows], 1)
    return max(difference(out, _packed_logits(model, [row])) for out, row in zip(packed, rows, strict=True))


def _experts(dtype: torch.dtype, device: torch.device) -> float:
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
    config = MixtralConfig.from_dict(sizes, attn_implementation="eager", experts_implementation="grouped_mm")
    targets = ["gate_up_proj", "down_proj"]
    model = _shaken(adapted(MixtralForCausalLM(config).eval(), target_modules=targets), "a")
    block, x = model.model.layers[0].mlp.to(dtype), torch.randn(2, 12, 64).to(dtype)
    exact = _block_step(copy.deepcopy(block).double(), x.double())
    return differences(_block_step(block.to(device), x.to(device)), exact)


def _block_step(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out = block(x)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    grads = {name: p.grad for name, p in block.named_parameters() if p.requires_grad and p.grad is not None}
    return grads | {"output": out.detach()}


def _losses(model: LoraModel, x: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.adapter_parameters("a").values(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return [loss.item() for loss in found]


def _trained(variant: str, device: torch.device) -> float:
    expected = torch.tensor(_losses(adapted(llama(), variant=variant), words()))
    if not expected[-1] < 0.95 * expected[0]:
        raise AssertionError(f"the loss did not fall on the CPU: {expected.tolist()}")
    found = torch.tensor(_losses(adapted(llama(), variant=variant).to(device), words().to(device)))
    return (found - expected).abs().max().item()


def _checkpointed(device: torch.device) -> float:
    found = []
    for checkpoints in (False, True):
        model = _shaken(adapted(llama(), lora_dropout=0.3), "a").to(device).train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        x = words().to(device)
        model(input_ids=x, labels=x).loss.backward()
        found.append({name: p.grad for name, p in model.adapter_parameters("a").items() if p.grad is not None})
    return differences(found[1], found[0])


def _waits(device: torch.device) -> float:
    if device.type != "cuda":
        raise LeftOut("a CPU computes as it is asked")
    model, x = adapted(llama(), lora_dropout=0.1).to(device).train(), words().to(device)
    _step(model, x)()  # the first looks things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(model, x)()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0


def _step(model: LoraModel, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        model(input_ids=x).logits.float().square().mean().backward()

    return step
