"""Embedding, convolution, Conv1D and DoRA layers on their own: geometry, options, gradients."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_exp.adapters import (
    DoRAConv2d,
    DoRAEmbedding,
    DoRALinear,
    LoraConfig,
    LoRAConv1D,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAEmbedding,
    LoRALinear,
    LoraModel,
)

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"padding": (2, 1), "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "dilation": 2},
    {"groups": 2},
    {"groups": 4, "stride": 2, "padding": 1, "bias": False},
]


def trained(layer):
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("kind", [LoRAConv2d, DoRAConv2d])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_adapted_convolution_is_the_convolution_with_the_merged_weight(kind, geometry):
    layer, x = trained(kind(4, 8, 3, rank=4, **geometry)), torch.randn(2, 4, 9, 8)
    weight = layer.weight + layer.delta_weight()
    if kind is DoRAConv2d:
        norm = weight.flatten(1).norm(dim=1)
        weight = weight * (layer.magnitude / norm).view(-1, 1, 1, 1)
    torch.testing.assert_close(layer(x), layer._conv_forward(x, weight, layer.bias), atol=1e-5, rtol=1e-4)
    plain = layer.merge()
    assert type(plain) is nn.Conv2d
    assert plain.padding_mode == layer.padding_mode
    torch.testing.assert_close(plain(x), layer(x), atol=1e-5, rtol=1e-4)
    if kind is LoRAConv2d:
        assert not torch.equal(layer(x), nn.Conv2d.forward(layer, x))


def test_grouped_factors():
    layer = LoRAConv2d(6, 9, 3, groups=3, rank=6)
    assert layer.lora_A.shape == (6, 2, 3, 3)
    assert layer.lora_B.shape == (6, 3)
    assert layer.delta_weight().shape == layer.weight.shape
    with pytest.raises(ValueError, match="rank=4 cannot be shared out among groups=3"):
        LoRAConv2d(6, 9, 3, groups=3, rank=4)


@pytest.mark.parametrize(("kind", "dims"), [(LoRAConv1d, 1), (LoRAConv3d, 3)])
def test_other_dimensions(kind, dims):
    layer, x = trained(kind(2, 4, 3, padding=1, rank=2)), torch.randn(2, 2, *[4] * dims)
    torch.testing.assert_close(layer.merge()(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [LoRAEmbedding, DoRAEmbedding])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"max_norm": 0.7}, {"max_norm": 1.0, "norm_type": 1.0}])
def test_embedding_is_the_lookup_in_the_merged_table(kind, options):
    layer, x = kind(7, 5, rank=3, **options), torch.tensor([[0, 2, 2], [6, 1, 3]])
    before = layer.weight.clone()
    torch.testing.assert_close(layer(x), F.embedding(x, before.clone(), **options))
    layer(x).sum().backward()
    if "padding_idx" in options:
        assert not layer.lora_A.grad[2].any()
    trained(layer)
    torch.testing.assert_close(layer(x), layer.merge()(x))
    assert torch.equal(layer.weight, before)


def test_embedding_gradient_options():
    x = torch.tensor([1, 1, 1, 4])
    plain, counted = LoRAEmbedding(7, 5, rank=2), LoRAEmbedding(7, 5, rank=2, scale_grad_by_freq=True)
    counted.load_state_dict(plain.state_dict())
    for layer in (plain, counted):
        layer(x).sum().backward()
    torch.testing.assert_close(plain.lora_A.grad[1], 3 * counted.lora_A.grad[1])
    sparse = LoRAEmbedding(7, 5, rank=2, sparse=True)
    sparse(x).sum().backward()
    assert sparse.lora_A.grad.is_sparse
    assert isinstance(sparse, nn.Embedding)


def test_scaled_embeddings_are_followed():
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    base = nn.Sequential(Scaled(7, 4))
    model = LoraModel(base, LoraConfig(rank=2, layer_types=("embedding",)), verbose=False)
    nn.init.normal_(model.adapter_parameters()["0.lora_A"])
    x = torch.arange(7)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model))) if "<locals>" not in Scaled.__qualname__ else model
    adapted = twin(x)
    plain = model.merge_and_unload()
    assert type(plain[0]) is Scaled
    torch.testing.assert_close(plain(x), adapted)


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    layer, x = trained(LoRAConv1D(6, 4, rank=2)), torch.randn(2, 3, 4)
    assert isinstance(layer, Conv1D)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))
    assert type(layer.merge()) is Conv1D
    torch.testing.assert_close(layer.merge()(x), layer(x))


@pytest.mark.parametrize(
    "layer",
    [
        LoRALinear(3, 4, rank=2, dtype=torch.float64),
        DoRALinear(3, 4, 2, 4, dtype=torch.float64),
        LoRAConv2d(2, 4, 2, groups=2, rank=2, dtype=torch.float64),
        DoRAConv2d(2, 4, 2, groups=2, rank=2, dtype=torch.float64),
        LoRAEmbedding(5, 3, rank=2, dtype=torch.float64),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_gradients_in_float64(layer):
    trained(layer)
    names, values = zip(*layer.adapters.named_parameters(), strict=True)
    x = torch.arange(5) if isinstance(layer, nn.Embedding) else None
    if x is None:
        shape = (2, 2, 3, 3) if isinstance(layer, nn.Conv2d) else (2, 3)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if hasattr(layer, "magnitude"):
        layer.adapter.detach_norm = False  # numerical derivatives see the norm move

    def run(x, *factors):
        given = {f"adapters.{name}": value for name, value in zip(names, factors, strict=True)}
        return torch.func.functional_call(layer, given, (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_the_norm_is_a_constant_unless_asked():
    x, grads = torch.randn(5, 4), []
    layer = trained(DoRALinear(4, 3, 2, 4))
    for detach in (True, False):
        layer.zero_grad()
        layer.adapter.detach_norm = detach
        layer(x).square().sum().backward()
        grads.append(layer.lora_B.grad)
    assert not torch.allclose(*grads)
    model = LoraModel(nn.Linear(4, 3), LoraConfig(rank=2, use_dora=True, dora_detach_norm=False), verbose=False)
    assert model.wrapped.adapter.detach_norm is False


def test_magnitude_follows_the_loaded_weight():
    layer, weight = DoRALinear(4, 3, rank=2, alpha=4), torch.randn(3, 4)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(3)}, strict=False)
    torch.testing.assert_close(layer.magnitude.detach(), weight.norm(dim=1))
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), x @ weight.T)
    trained(layer)
    twin = DoRALinear(4, 3, rank=2, alpha=4)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


def test_a_dead_row_stays_finite():
    layer = DoRALinear(4, 3, 2, 4)
    layer.load_state_dict({"weight": torch.zeros(3, 4)}, strict=False)
    layer(torch.randn(2, 4)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.adapters.parameters())
