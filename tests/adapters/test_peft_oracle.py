"""Outputs and all gradients equal PEFT's, with the same factors and the same dropout mask."""

import contextlib

import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel, use_reference
from lora_exp.adapters.kernels import terms
from lora_exp.adapters.variants import lora

CLOSE = {"atol": 1e-6, "rtol": 1e-5}
EXACT = {"atol": 1e-12, "rtol": 1e-11}  # of float64
ALL = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "t5": "shared"}


@pytest.fixture
def same_masks(monkeypatch):
    """Both libraries drop what a generator seeded by the shape alone says."""

    def noise(x, p):
        generator = torch.Generator().manual_seed(x.numel() + x.shape[-1])  # also with leading dimensions in one
        return torch.empty(x.shape).bernoulli_(1 - p, generator=generator) / (1 - p)

    monkeypatch.setattr(lora, "dropout_noise", lambda x, p, seed: noise(x, p).to(x.dtype))
    monkeypatch.setattr(terms, "dropout_mask", lambda x, p, seed: (noise(x, p) > 0).to(x.dtype))
    monkeypatch.setattr(terms, "keep_share", lambda p: 1 - p)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * noise(x, self.p) if self.training else x)


def output_of(result):
    return result if isinstance(result, torch.Tensor) else result.logits


def assert_equal(model, twin, oracle, inputs, atol=CLOSE["atol"], rtol=CLOSE["rtol"]):
    ours, theirs = output_of(model(**inputs)), output_of(twin(**inputs))
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)
    weights = torch.randn_like(ours)
    (ours * weights).mean().backward()
    (theirs * weights).mean().backward()
    expected = oracle.gradients(model, twin)
    for name, parameter in model.adapter_parameters().items():
        said = {"msg": lambda m, n=name: f"{n}: {m}"}
        torch.testing.assert_close(parameter.grad, expected[name], atol=atol, rtol=rtol, **said)
    assert model.parameter_counts() == twin.get_nb_trainable_parameters()


def pair(base, oracle, randomised, targets, rslora=True, dora=False, dropout=0.0, bias="none"):
    options = {"target_modules": targets, "lora_alpha": 6, "lora_dropout": dropout, "bias": bias}
    options |= {"use_rslora": rslora, "use_dora": dora}
    twin = oracle.twin(base, r=4, **options)
    model = LoraModel(base, LoraConfig(rank=4, **options), verbose=False)
    randomised(model, std=0.1)
    oracle.copy(model, twin)
    return model.train(), twin.train()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("rslora", [False, True], ids=["standard", "rslora"])
@pytest.mark.parametrize("kind", list(ALL))
def test_transformers(kind, rslora, dora, make_transformer, inputs_for, oracle, randomised):
    base = make_transformer(kind)
    if kind == "t5":  # it scales nothing down: float32's rounding in another order moves a logit by more than 1e-6
        base = base.double()
    model, twin = pair(base, oracle, randomised, ALL[kind], rslora, dora)
    assert_equal(model, twin, oracle, inputs_for(kind), **(EXACT if kind == "t5" else CLOSE))


DROPOUT = [
    (kind, path, dora) for kind in ("llama", "gpt2", "t5") for path in ("fused", "reference") for dora in (False, True)
]
# T5 scales nothing down: its logits sum more terms, and the fused order of LoRA's additions moves one of them by
# 1.6e-6. test_fused holds the fused path to the reference path in float64.
DROPOUT.remove(("t5", "fused", False))


@pytest.mark.parametrize(("kind", "path", "dora"), DROPOUT)
def test_dropout(kind, path, dora, make_transformer, inputs_for, oracle, randomised, same_masks):
    model, twin = pair(make_transformer(kind), oracle, randomised, ALL[kind], dora=dora, dropout=0.3)
    with use_reference() if path == "reference" else contextlib.nullcontext():
        assert_equal(model, twin, oracle, inputs_for(kind))
    assert not torch.equal(output_of(model(**inputs_for(kind))), output_of(model.eval()(**inputs_for(kind))))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_embeddings(kind, dora, make_transformer, inputs_for, oracle, randomised):
    targets = [EMBEDDINGS[kind], ALL[kind][0]]
    model, twin = pair(make_transformer(kind), oracle, randomised, targets, dora=dora)
    assert_equal(model, twin, oracle, inputs_for(kind))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_biases(kind, dora, bias, make_transformer, inputs_for, oracle, randomised):
    model, twin = pair(make_transformer(kind), oracle, randomised, ALL[kind][:1], dora=dora, bias=bias)
    assert_equal(model, twin, oracle, inputs_for(kind))


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_vision(dora, dropout, bias, vision, images, oracle, randomised, same_masks):
    model, twin = pair(vision, oracle, randomised, ["stem", "conv", "head"], dora=dora, dropout=dropout, bias=bias)
    assert_equal(model, twin, oracle, {"x": images})


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_resnet(dora, oracle, randomised):
    import transformers

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    base = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=5))
    targets = [f"{name}.convolution" for name in ("embedder", "layer.0", "layer.1", "shortcut")] + ["classifier.1"]
    model, twin = pair(base, oracle, randomised, targets, dora=dora)
    assert_equal(model, twin, oracle, {"pixel_values": torch.randn(3, 3, 32, 32)})


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_other_convolutions(dims, dora, oracle, randomised):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    base = nn.Sequential(conv(4, 6, 3, stride=2, padding=1), nn.Tanh(), conv(6, 4, 1))
    model, twin = pair(base, oracle, randomised, ["0", "2"], dora=dora)
    assert_equal(model, twin, oracle, {"input": torch.randn(2, 4, *[5] * dims)})


def test_patterns_and_saved_modules(tiny, tokens, oracle, randomised):
    options = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.0.q_proj": 2, "v_proj": 3},
        "alpha_pattern": {r"layers\.1\..*": 5},
        "modules_to_save": ["lm_head"],
    }
    import peft

    twin = peft.get_peft_model(__import__("copy").deepcopy(tiny), peft.LoraConfig(r=4, lora_alpha=6, **options))
    model = LoraModel(tiny, LoraConfig(rank=4, lora_alpha=6, use_rslora=False, **options), verbose=False)
    randomised(model, std=0.1)
    their_head = twin.base_model.model.lm_head.modules_to_save["default"].weight
    head = model.adapter_parameters()["lm_head.weight"]
    with torch.no_grad():
        their_head.copy_(head)
    factors = {key: p for key, p in model.adapter_parameters().items() if "lm_head" not in key}
    model.adapter_parameters = lambda name="default": factors
    oracle.copy(model, twin)
    torch.testing.assert_close(model(tokens), twin(tokens), **CLOSE)
    model(tokens).square().mean().backward()
    twin(tokens).square().mean().backward()
    torch.testing.assert_close(head.grad, their_head.grad, **CLOSE)
    del model.adapter_parameters
    assert model.parameter_counts() == twin.get_nb_trainable_parameters()
