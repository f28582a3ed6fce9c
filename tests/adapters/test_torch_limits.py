"""Where torch goes past our layers or asks them for what they do not have: it works, or says what does."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from lora_exp.adapters import (
    DoRAConv2d,
    DoRALinear,
    LoraConfig,
    LoRAConv2d,
    LoRALinear,
    LoraModel,
    use_reference,
)

LAYERS = {
    "linear": lambda **o: LoRALinear(6, 4, **o),
    "dora": lambda **o: DoRALinear(6, 4, **o),
    "conv": lambda **o: LoRAConv2d(3, 4, 3, **o),
    "dora conv": lambda **o: DoRAConv2d(3, 4, 3, **o),
}
SEVERAL = {"a": LoraConfig(rank=2, target_modules=["linear1"]), "b": LoraConfig(rank=3, target_modules=["linear1"])}


def made(kind, **options):
    torch.manual_seed(0)
    layer = LAYERS[kind](rank=2, **options).double()
    for parameter in layer.adapters.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def input_for(kind):
    shape = (2, 3, 5, 5) if "conv" in kind else (3, 6)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# The encoder's fast path


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["linear1"]},
        {"target_modules": ["layers.1.linear2"]},
        {"target_modules": ["linear1"], "bias": "lora_only"},
        {"target_modules": ["layers.0.linear1"], "modules_to_save": ["layers.1.norm1"]},
        {"target_modules": ["layers.0.linear1"], "modules_to_save": ["layers.1.linear1", "layers.1.self_attn"]},
    ],
)
def test_the_encoders_fast_path_does_not_go_past_adapters(options, padded, grad, randomised):
    model = LoraModel(nn.Sequential(encoder(), nn.Linear(16, 3)), LoraConfig(rank=2, **options), verbose=False)
    randomised(model)
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padded
    call = partial(model.wrapped[0], x, src_key_padding_mask=padding if padded else None)
    expected = model.train() and call()
    with torch.set_grad_enabled(grad):
        found = model.eval() and call()
    torch.testing.assert_close(found[~padding], expected[~padding], atol=1e-5, rtol=1e-5)


def test_one_layer_of_an_encoder(randomised):
    model = LoraModel(encoder().layers[0], SEVERAL["a"], "a", verbose=False)
    randomised(model, "a")
    x = torch.randn(3, 5, 16)
    expected = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wish", ["out_proj", "self_attn"])
def test_what_attention_reads_without_calling_is_refused(wish):
    with pytest.raises(ValueError, match="MultiheadAttention"):
        LoraModel(encoder(), LoraConfig(rank=2, target_modules=[wish]), verbose=False)


def test_a_saved_module_that_is_read_cannot_be_routed(randomised):
    model = LoraModel(encoder(), LoraConfig(**vars_of("a"), modules_to_save=["out_proj"]), "a", verbose=False)
    model.add_adapter("b", LoraConfig(**vars_of("b"), modules_to_save=["out_proj"]))
    for name in SEVERAL:
        randomised(model, name)
    x = torch.randn(4, 5, 16)
    first = model(x)
    model.set_adapter("b")
    assert not torch.allclose(first, model(x))
    with pytest.raises(ValueError, match="read without calling"), model.route({"a": 2, "b": 2}):
        model(x)


def vars_of(name):
    return {"rank": SEVERAL[name].rank, "target_modules": ["linear1"]}


# Tracing


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_can_be_traced(dora, dropout, training, tiny, tokens, randomised):
    model = LoraModel(tiny, LoraConfig(rank=2, use_dora=dora, lora_dropout=dropout), verbose=False).train(training)
    randomised(model)
    drops = training and dropout > 0
    traced = torch.jit.trace(model, (tokens,), check_trace=not drops)
    assert torch.equal(traced(tokens), traced(tokens)) != drops  # a trace draws new masks, as nn.Dropout's does
    if not drops:
        others = torch.randint(0, 11, (2, 7))
        torch.testing.assert_close(traced(others), model(others))
    traced(tokens).sum().backward()
    assert model.check_gradients() == []


# Derivatives


@pytest.mark.parametrize("reduce", ["square", "sum"])
@pytest.mark.parametrize("of", ["input", "factors"])
@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives_name_what_to_do(kind, of, reduce):
    layer, x = made(kind), input_for(kind)

    def second():
        out = layer(x) if reduce == "sum" else layer(x).square()
        first = torch.autograd.grad(out.sum(), [x, *layer.adapters.parameters()], create_graph=True)
        wanted = [x] if of == "input" else list(layer.adapters.parameters())
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    with pytest.raises(RuntimeError, match="use_reference"):
        second()
    with use_reference():
        assert all(g.abs().sum() > 0 for g in second())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_hessian_is_never_silently_zero(kind):
    layer, x = made(kind), input_for(kind)

    def loss(x):
        return layer(x).square().sum()

    with pytest.raises(RuntimeError, match="use_reference"):
        torch.autograd.functional.hessian(loss, x)
    with use_reference():
        assert torch.autograd.functional.hessian(loss, x).abs().sum() > 0


def test_a_refusal_does_not_unpack_twice():
    layer, x = made("linear"), input_for("linear")
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    grad = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(layer(x).square().sum(), x)[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_batched_gradients_are_right_or_name_what_to_do(kind, vmap, dropout):
    layer, x = made(kind, **({"lora_dropout": dropout} if "linear" in kind else {})), input_for(kind)
    wanted = [x, *layer.adapters.parameters()]

    def batched(out, grads):
        if vmap:
            return torch.func.vmap(lambda g: torch.autograd.grad(out, wanted, g, retain_graph=True))(grads)
        return torch.autograd.grad(out, wanted, grads, is_grads_batched=True, retain_graph=True)

    out = layer(x)
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    each = zip(*[torch.autograd.grad(out, wanted, g, retain_graph=True) for g in grads], strict=True)
    try:
        found = batched(out, grads)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="use_reference"):
            batched(out, grads)
        with use_reference():
            batched(layer(x), grads)
    else:
        for mine, expected in zip(found, each, strict=True):
            torch.testing.assert_close(mine, torch.stack(expected))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own decompositions
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_mode_names_what_to_do(kind):
    layer, x = made(kind), input_for(kind).detach()
    jacobian = partial(torch.autograd.functional.jacobian, layer, x, vectorize=True, strategy="forward-mode")
    with pytest.raises(RuntimeError, match="use_reference"):
        jacobian()


# Names


@pytest.mark.parametrize(
    "name", ["copy", "training", "_modules", "_keys", "forward", "type", "a.b", "", None, 3, "a b"]
)
def test_names_that_torch_cannot_hold_are_refused_before_anything_changes(name, tiny, randomised):
    base = copy.deepcopy(tiny)
    with pytest.raises(ValueError, match="cannot be used"):
        LoraModel(tiny, LoraConfig(rank=2, bias="all", modules_to_save=["lm_head"]), name, verbose=False)
    assert repr(tiny) == repr(base)
    assert all(p.requires_grad for p in tiny.parameters())
    model = LoraModel(tiny, LoraConfig(rank=2), verbose=False)
    before = [key for key, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="cannot be used"):
        model.add_adapter(name, LoraConfig(rank=2, bias="all", modules_to_save=["lm_head"]))
    assert [key for key, _ in model.named_parameters()] == before


@pytest.mark.parametrize("name", ["self", "name", "weight", "bias", "lora_A", "default", "0", "ab-1", "ü"])
def test_other_names_work_everywhere(name, tiny, tokens, randomised, tmp_path):
    options = {"bias": "all", "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    model = LoraModel(tiny, LoraConfig(rank=2, **options), name, verbose=False).eval()
    model.add_adapter("other", LoraConfig(rank=3, **options))
    randomised(model, name)
    expected = model(tokens)
    with model.route({name: 2, "other": 2}):
        torch.testing.assert_close(model(tokens)[:2], expected[:2])
    model.save_pretrained(tmp_path, name)
    model.delete_adapter(name)
    model.load_adapter(tmp_path, name)
    model.set_adapter(name)
    assert torch.equal(model(tokens), expected)
    with warnings.catch_warnings():
        model.merge_and_unload(name)
