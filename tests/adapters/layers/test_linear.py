"""LoRALinear on its own."""

import math

import pytest
import torch
from torch import nn

from lora_exp.adapters import LoRALinear


def filled(**kwargs) -> LoRALinear:
    layer = LoRALinear(6, 5, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


def test_it_is_a_linear_layer():
    layer = LoRALinear(6, 5, rank=3)
    assert isinstance(layer, nn.Linear)
    assert {"weight", "bias"} < set(layer.state_dict())
    assert layer.lora_A.shape == (6, 3)
    assert layer.lora_B.shape == (3, 5)
    assert not layer.lora_B.any()
    assert not layer.weight.requires_grad


@pytest.mark.parametrize(("rslora", "scale"), [(True, 16 / math.sqrt(4)), (False, 4.0)])
def test_the_formula(rslora, scale):
    layer, x = filled(rank=4, lora_alpha=16, use_rslora=rslora), torch.randn(2, 3, 6)
    expected = x @ layer.weight.T + layer.bias + scale * (x @ layer.lora_A) @ layer.lora_B
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta_weight(), scale * (layer.lora_A @ layer.lora_B).T)


@pytest.mark.parametrize("bias", [True, False])
def test_merge_gives_a_plain_layer(bias):
    layer, x = filled(rank=4, bias=bias), torch.randn(2, 6)
    plain = layer.merge()
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), layer(x))


def test_initialisation_has_pefts_bounds():
    layer = LoRALinear(100, 400, rank=64)
    assert layer.lora_A.abs().max() <= 0.1
    assert layer.lora_A.abs().max() > 0.099
    assert abs(layer.lora_A.std().item() - 0.1 / math.sqrt(3)) < 0.002


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": 2.5}, {"lora_dropout": 1.0}, {"lora_alpha": float("nan")}])
def test_bad_values(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoRALinear(6, 5, **bad)


def test_gradients_in_float64():
    layer = LoRALinear(4, 3, rank=2, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)

    def run(x, a, b):
        return torch.func.functional_call(layer, {"adapters.default.lora_A": a, "adapters.default.lora_B": b}, (x,))

    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, layer.lora_A, layer.lora_B))
