"""Layer types and kinds of adapter through the backends: PEFT is the oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from lora_exp.backends import Adapted, adapt
from lora_exp.config import AdapterConfig, Config, LayerConfig, ModelConfig, ScalingConfig

TARGETS = {"linear": ["mix"], "embedding": ["embed"], "conv2d": ["spread"]}


class Tiny(nn.Module):
    """Tokens (B, T) → looked up, mixed, convolved as an image → logits (B, 3): a layer of every type."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.spread = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.spread(torch.tanh(self.mix(self.embed(tokens))).unsqueeze(1))
        return self.head(torch.relu(self.grouped(x)).mean((2, 3)))


@pytest.fixture
def base() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def wish(layer: str = "linear", adapter: str = "lora", head: bool = True, **changes: Any) -> Config:
    trains = {"full": "weights", "head": "modules_to_save"}.get(adapter, "adapter")
    model = ModelConfig(label="tiny", targets=TARGETS, modules_to_save=["head"] if head else [])
    config = Config(
        layer=LayerConfig(layer, [layer]),
        adapter=AdapterConfig(adapter, adapter if trains == "adapter" else None, trains=trains),
        scaling=ScalingConfig("rslora"),
        model=model,
    )
    return Config(**(vars(config) | {"rank": 4} | changes))


def loss_of(adapted: Adapted) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 11, (5, 7), generator=generator)
    labels = torch.randint(0, 3, (5,), generator=generator)
    return nn.functional.cross_entropy(adapted.model(tokens), labels)


CASES = [("linear", "none"), ("embedding", "none"), ("conv2d", "none"), ("conv2d", "lora_only"), ("all", "lora_only")]


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize(("layer", "bias"), CASES)
def test_native_and_peft_agree(layer: str, adapter: str, bias: str, base: Tiny, tmp_path: Path) -> None:
    twin = copy.deepcopy(base)
    ours = adapt(base, wish(layer, adapter, bias=bias))
    theirs = adapt(twin, wish(layer, adapter, bias=bias, backend="peft"))
    with torch.no_grad():
        for parameter in ours.parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.save(tmp_path)
    set_peft_model_state_dict(theirs.model, load_peft_weights(str(tmp_path)))
    assert (ours.trainable, ours.total) == (theirs.trainable, theirs.total)
    losses = [loss_of(ours), loss_of(theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    norms = [sum(float(p.grad.norm()) for p in side.parameters if p.grad is not None) for side in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_layer_all_is_the_union_of_the_models_targets(base: Tiny) -> None:
    adapted = adapt(base, wish("all"))
    layers = {name.rpartition(".lora_A")[0] for name in adapted.model.adapter_parameters() if "lora_A" in name}
    assert layers == {"mix", "embed", "spread"}


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_without_named_targets_every_layer_of_the_type_but_the_head(backend: str, base: Tiny) -> None:
    base.head, base.lm_head = nn.Identity(), base.head
    base.forward = lambda tokens: base.lm_head(Tiny.forward(base, tokens))
    config = wish("linear", head=False, model=ModelConfig(label="any"), backend=backend)
    adapted = adapt(base, config)
    assert adapted.trainable == 4 * (8 + 8)


def test_peft_keeps_the_frozen_embedding_out_of_the_file(base: Tiny, tmp_path: Path) -> None:
    adapted = adapt(base, wish("embedding", backend="peft", head=False))
    assert isinstance(adapted.model, peft.PeftModel)
    adapted.save(tmp_path)
    assert not any("base_layer" in name for name in load_peft_weights(str(tmp_path)))


def test_peft_refuses_a_grouped_convolution_with_the_reason(base: Tiny) -> None:
    with pytest.raises(ValueError, match=r"grouped: .*groups=2.* use backend=native"):
        adapt(base, wish("conv2d", targets=["grouped"], backend="peft"))
    assert adapt(Tiny(), wish("conv2d", targets=["grouped"])).trainable > 0


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_targets_of_another_layer_type_are_refused(backend: str, base: Tiny) -> None:
    with pytest.raises(ValueError, match=r"names embed, which is of type embedding, but layer=conv2d.*layer=embedding"):
        adapt(base, wish("conv2d", targets=["embed", "spread"], backend=backend))


def test_head_trains_the_modules_to_save_alone(base: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    before = copy.deepcopy(base.state_dict())
    adapted = adapt(base, wish(adapter="head"))
    loss_of(adapted).backward()
    torch.optim.SGD(adapted.parameters, lr=1.0).step()
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert adapted.trainable == 6 * 3 + 3
    adapted.save(tmp_path)
    assert set(load_file(tmp_path / "weights.safetensors")) == changed


def test_full_takes_targets_and_the_new_head(base: Tiny) -> None:
    adapt(base, wish(adapter="full", targets=["mix"]))
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert trained == {"mix.weight", "mix.bias", "head.weight", "head.bias"}


def test_full_saves_the_state_of_a_base_without_save_pretrained(base: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adapt(base, wish(adapter="full")).save(tmp_path)
    assert set(load_file(tmp_path / "weights.safetensors")) == set(base.state_dict())
