"""The factored norm against the dense one, and how often it is computed."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_exp.adapters import DoRAConv2d, DoRAEmbedding, DoRALinear, LoraConfig, LoraModel, norms

LAYERS = {
    "linear": lambda **options: DoRALinear(40, 30, 4, 8, **options),
    "conv": lambda **options: DoRAConv2d(5, 8, 3, rank=4, **options),
    "grouped": lambda **options: DoRAConv2d(4, 8, 3, groups=2, rank=4, **options),
    "embedding": lambda **options: DoRAEmbedding(50, 12, rank=4, **options),
}


def trained(layer, std=0.3):
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return layer


@pytest.fixture
def computed(monkeypatch):
    counted, real = [], norms.factored_norm
    monkeypatch.setattr(norms, "factored_norm", lambda *args: counted.append(1) or real(*args))
    return counted


@pytest.mark.parametrize("kind", LAYERS)
def test_norms_and_deltas_are_float32_under_autocast(kind):
    layer = trained(LAYERS[kind]())
    delta, dense = layer.delta_weight(), layer.adapter.weight_norm(layer).detach()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.adapter.constant_norm(layer), dense, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.adapter.weight_norm(layer).detach(), dense, rtol=1e-6, atol=0)
        assert torch.equal(layer.delta_weight(), delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_factored_is_dense(kind, dtype, monkeypatch):
    monkeypatch.setattr(norms, "_CHUNK", 200)
    layer = trained(LAYERS[kind](dtype=dtype))
    adapter = layer.adapter
    torch.testing.assert_close(adapter.constant_norm(layer), adapter.weight_norm(layer).detach(), rtol=1e-6, atol=0)


def test_gpt2s_layout():
    pytest.importorskip("transformers.pytorch_utils")
    from lora_exp.adapters import DoraAdapter, LoRAConv1D

    layer = LoRAConv1D(6, 9, rank=2)
    layer.add_adapter(DoraAdapter("default", 2, 4.0, 0.0, False))
    adapter = trained(layer).adapter
    torch.testing.assert_close(adapter.constant_norm(layer), adapter.weight_norm(layer).detach(), rtol=1e-6, atol=0)


def test_rows_that_cancel_are_computed_exactly():
    layer = DoRALinear(6, 5, 2, 4, use_rslora=False)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.weight.copy_(-layer.delta_weight() * 1.0001)
        layer.weight[2].zero_()
        layer.lora_B[:, 2].zero_()
    adapter = layer.adapter
    dense = adapter.weight_norm(layer).detach()
    torch.testing.assert_close(adapter.constant_norm(layer), dense, rtol=1e-2, atol=0)
    assert dense[2] == torch.finfo(torch.float32).tiny


def test_once_per_optimizer_step_and_never_on_a_replay(computed):
    layer = trained(DoRALinear(6, 6, 2, 4, lora_dropout=0.1))
    optimizer = torch.optim.AdamW(layer.adapters.parameters(), lr=0.01)
    x = torch.randn(3, 6, requires_grad=True)
    for step in range(1, 4):
        for reentrant in (True, False):  # two micro batches
            checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        assert len(computed) == step + 1  # and once at the start, for the magnitude
        optimizer.step()
        optimizer.zero_grad()
    layer.eval()
    with torch.no_grad():
        layer(x), layer(x)
    assert len(computed) == 5


WRITES = {
    "in place": lambda layer: layer.lora_B.mul_(2),
    "through data": lambda layer: layer.lora_B.data.mul_(2),
    "other data": lambda layer: setattr(layer.lora_A, "data", layer.lora_A.data * 3),
    "the base": lambda layer: layer.weight.data.mul_(1.5),
    "the scale": lambda layer: setattr(layer.adapter, "scale", 7.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_kind_of_change_is_noticed(write):
    layer, x = trained(DoRALinear(6, 5, 2, 4)), torch.randn(2, 6)
    layer(x)
    with torch.no_grad():
        WRITES[write](layer)
    adapter = layer.adapter
    torch.testing.assert_close(adapter.constant_norm(layer), adapter.weight_norm(layer).detach())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(twin):
    layer, x = trained(DoRALinear(6, 5, 2, 4)), torch.randn(2, 6)
    expected = layer(x)
    other = twin(layer)
    assert torch.equal(other(x), expected)
    trained(other)
    other(x)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(other(x), expected)


def test_inference_tensors_are_not_cached(computed):
    with torch.inference_mode():
        layer = DoRALinear(6, 5, 2, 4)
        layer.lora_B.normal_()
        first = layer(torch.ones(1, 6))
        layer.lora_B.mul_(2)
        assert not torch.equal(layer(torch.ones(1, 6)), first)
    assert len(computed) == 3


def test_a_new_adapter_changes_nothing_at_all(tiny, tokens):
    expected = tiny(tokens)
    model = LoraModel(tiny, LoraConfig(rank=2, use_dora=True), verbose=False)
    torch.testing.assert_close(model(tokens), expected, atol=1e-6, rtol=1e-6)
