"""What a config may say, and what it means in a model."""

import logging

import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoRALayerBase, LoraModel, scaling_factor
from lora_exp.adapters.layers.registry import layer_types


def adapted(model):
    return sorted(name for name, m in model.wrapped.named_modules() if isinstance(m, LoRALayerBase))


def injected(base, **options):
    return adapted(LoraModel(base, LoraConfig(rank=2, **options), verbose=False))


def test_defaults():
    config = LoraConfig()
    assert (config.rank, config.lora_alpha, config.lora_dropout) == (8, 8.0, 0.0)
    assert (config.bias, config.use_rslora, config.target_modules) == ("none", True, None)
    assert config.scale == scaling_factor(8, 8.0, True) == 8 / 8**0.5
    assert LoraConfig(**config.to_dict()) == config
    assert LoraConfig(layer_types="all").layer_types == ("all",)


def test_layer_types_are_those_of_the_kinds_of_layer_there_are():
    assert layer_types(["all"]) >= {"linear", "embedding", "conv1d", "conv2d", "conv3d"}
    assert layer_types(["linear", "conv2d"]) == {"linear", "conv2d"}
    with pytest.raises(ValueError, match=r"'dense' is no layer type; choose from conv1d, .*, or 'all' alone"):
        injected(nn.Sequential(nn.Linear(4, 4)), layer_types=("dense",))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 3.5}, "rank=3.5 is not a whole number"),
        ({"rank": True}, "rank=True"),
        ({"lora_alpha": "x"}, "lora_alpha='x'"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 .* \[0, 1\)"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"bias": "some"}, "bias='some' .* none, all, lora_only"),
        ({"layer_types": ()}, "layer_types is empty"),
        ({"target_modules": []}, "target_modules is an empty list"),
        ({"target_modules": ["q", 3]}, r"target_modules holds \[3\]"),
        ({"target_modules": "(q"}, "not a regular expression"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
        ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\]='x'"),
        ({"use_dora": "yes"}, "use_dora='yes'"),
    ],
)
def test_bad_values(bad, match):
    with pytest.raises(ValueError, match=match):
        LoraConfig(**bad)


def test_all_problems_are_reported_together():
    with pytest.raises(ValueError, match=r"rank=0.*lora_alpha='x'.*lora_dropout=2.*bias='b'"):
        LoraConfig(rank=0, lora_alpha="x", lora_dropout=2, bias="b")


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["layers.0.q_proj", "layers.1.q_proj"]),
        ({"target_modules": ["0.q_proj"]}, ["layers.0.q_proj"]),
        ({"target_modules": r"layers\.\d\.v_.*"}, ["layers.0.v_proj", "layers.1.v_proj"]),
        ({"target_modules": ["layers.1"]}, ["layers.1.q_proj", "layers.1.v_proj"]),
        ({"target_modules": ["embed", "lm_head"]}, ["embed", "lm_head"]),
        (
            {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
            ["layers.0.q_proj", "layers.1.q_proj"],
        ),
        ({"exclude_modules": r"layers\.1.*"}, ["layers.0.q_proj", "layers.0.v_proj"]),
        ({"layers_to_transform": 1}, ["layers.1.q_proj", "layers.1.v_proj"]),
        ({"layer_types": "embedding"}, ["embed"]),
        ({"modules_to_save": ["layers.0"]}, ["layers.1.q_proj", "layers.1.v_proj"]),
    ],
)
def test_targets(wish, expected, tiny):
    assert injected(tiny, **wish) == expected


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        ({"target_modules": ["proj"]}, r"'proj' \(near: .*q_proj"),
        ({"target_modules": ["q_proj", "gone"]}, "'gone'"),
        ({"target_modules": "q_proj"}, "matches no module's full name"),
        ({"exclude_modules": ["w_proj"]}, "exclude_modules .*near: .*v_proj"),
        ({"modules_to_save": ["heads"]}, "modules_to_save .*near: lm_head"),
        ({"rank_pattern": {"k_proj": 2}}, "rank_pattern .*near: .*q_proj"),
        ({"alpha_pattern": {"k_proj": 2}}, "alpha_pattern .*'k_proj'"),
        ({"layers_to_transform": [0, 7]}, r"block \[7\]; blocks here: 0 to 1"),
        ({"layer_types": "conv2d"}, "leaves no layer to adapt"),
        ({"target_modules": ["norm"]}, r"layers.0.norm \(LayerNorm\)"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers"]}, "leaves no layer"),
    ],
)
def test_a_wish_that_finds_nothing_is_an_error(wish, match, tiny):
    before = {name: type(m) for name, m in tiny.named_modules()}
    with pytest.raises(ValueError, match=match):
        injected(tiny, **wish)
    assert {name: type(m) for name, m in tiny.named_modules()} == before, "nothing is injected by halves"


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(2, 2, 2)
        self.deep = nn.Conv2d(6, 6, 3, groups=3)
        self.mha = nn.MultiheadAttention(8, 2)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("up", r"ConvTranspose2d.*transposed"),
        ("mha", r"MultiheadAttention.*packed"),
        ("mha.out_proj", "without calling"),
        ("deep", "groups=3"),
        ("scaled", "computed"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_named_with_the_reason(name, reason, caplog):
    with pytest.raises(ValueError, match=reason):
        injected(Odd(), target_modules=[name])
    with caplog.at_level(logging.WARNING):
        assert injected(Odd(), layer_types=("linear", "conv2d")) == ["fc"]
    assert "stay as they are" in caplog.text


def test_rank_above_the_dimensions(tiny, make_tiny, caplog):
    with pytest.raises(ValueError, match="rank=17 is above the dimensions of every adapted layer"):
        LoraModel(tiny, LoraConfig(rank=17), verbose=False)
    wide = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 30))
    with caplog.at_level(logging.WARNING):
        LoraModel(wide, LoraConfig(rank=5), verbose=False)
    assert len(caplog.records) == 1


def test_patterns_set_single_layers(tiny):
    config = LoraConfig(
        rank=4,
        rank_pattern={r"layers\.0\..*": 2, "q_proj": 3},
        alpha_pattern={"1.v_proj": 5},
        use_rslora=False,
    )
    model = LoraModel(tiny, config, verbose=False)
    seen = {name: (m.rank, m.alpha) for name, m in tiny.named_modules() if isinstance(m, LoRALayerBase)}
    assert seen == {
        "layers.0.q_proj": (2, 8.0),
        "layers.0.v_proj": (2, 8.0),
        "layers.1.q_proj": (3, 8.0),
        "layers.1.v_proj": (4, 5),
    }
    assert model.wrapped.layers[1].v_proj.scale == 5 / 4


def test_biases_that_are_not_simply_added_are_refused():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.bias = nn.Parameter(torch.zeros(4))

    with pytest.raises(ValueError, match="not simply added"):
        injected(Custom(), bias="all")
    assert injected(Custom(), bias="lora_only") == ["fc"]
    with pytest.raises(ValueError, match="finds no bias to train"):
        injected(nn.Sequential(nn.Linear(4, 4, bias=False)), bias="lora_only")


def test_another_kind_of_layer_is_one_class(monkeypatch):
    from lora_exp.adapters import LoRALinear, adapts
    from lora_exp.adapters.layers import registry

    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))

    class Doubled(nn.Linear):
        """Keeps half its weight, as a quantised layer keeps something else than it computes with."""

        def forward(self, x):
            return nn.functional.linear(x, 2 * self.weight, self.bias)

    @adapts(registry.qualified_name(Doubled))
    class LoRADoubled(LoRALinear):
        def dense_weight(self):
            return 2 * super().dense_weight()

        def linear_forward(self, x):
            return x @ self.dense_weight().T

    for dora in (False, True):
        base, x = nn.Sequential(Doubled(4, 3)), torch.randn(2, 4)
        before = base(x)
        model = LoraModel(base, LoraConfig(rank=2, use_dora=dora), verbose=False)
        assert isinstance(base[0], LoRADoubled)
        assert isinstance(base[0], Doubled)
        torch.testing.assert_close(model(x), before)
