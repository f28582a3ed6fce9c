"""What a variant meets elsewhere in the library, one row a test: the same must hold for each of them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel, use_reference

VARIANTS = ("lora_fa", "lora_fb", "vera")


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def adapted(base, variant, randomised=None, **options):
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    model = LoraModel(base, LoraConfig(rank=4, variant=variant, **options), verbose=False)
    if randomised is not None:
        randomised(model)
    return model


def test_nothing_changes_at_first(variant, make_tiny, tokens):
    base = make_tiny()
    before = base(tokens)
    assert torch.equal(adapted(base, variant)(tokens), before)


def test_both_paths_agree(variant, tiny, tokens, randomised):
    model = adapted(tiny, variant, randomised, lora_dropout=0.2).train()
    state = model.dropout_state()

    def gradients():
        model.load_dropout_state(state)
        model.zero_grad()
        model(tokens).square().mean().backward()
        return [value.grad for value in model.adapter_parameters().values()]

    ours = gradients()
    with use_reference():
        plain = gradients()
    assert all(value.abs().sum() > 0 for value in ours)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_merge_unmerge_and_disable(variant, tiny, tokens, randomised):
    before = tiny(tokens)
    model = adapted(tiny, variant, randomised).eval()
    out = model(tokens)
    assert not torch.allclose(out, before)
    with model.disable_adapter():
        assert torch.equal(model(tokens), before)
    model.merge()
    torch.testing.assert_close(model(tokens), out, atol=1e-5, rtol=1e-5)
    model.unmerge()
    assert torch.equal(model(tokens), out)
    torch.testing.assert_close(model.merge_and_unload()(tokens), out, atol=1e-5, rtol=1e-5)


def test_several_adapters_and_a_route(variant, tiny, tokens, randomised):
    model = adapted(tiny, variant, randomised)
    model.add_adapter("other", LoraConfig(rank=2, variant=variant, target_modules=["q_proj"]))
    model.add_adapter("plain", LoraConfig(rank=2))
    randomised(model, "other")
    randomised(model, "plain")
    expected = []
    for name, rows in (("default", slice(0, 1)), ("other", slice(1, 3)), ("plain", slice(3, 4))):
        model.set_adapter(name)
        expected.append(model(tokens[rows]))
    with model.route({"default": 1, "other": 2, "plain": 1}):
        out = model(tokens)
        out.square().mean().backward()
    torch.testing.assert_close(out, torch.cat(expected))
    for name in ("default", "other", "plain"):
        assert all(value.grad is not None for value in model.adapter_parameters(name).values())
    model.delete_adapter("default")
    model.set_adapter("other")
    torch.testing.assert_close(model(tokens[1:3]), expected[1])


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "file"])
def test_copies(variant, way, make_tiny, tokens, randomised, tmp_path):
    base = make_tiny()
    plain, model = copy.deepcopy(base), adapted(base, variant, randomised)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.manual_seed(9)  # what is drawn now is not what comes back
        twin = adapted(plain, variant)
        if way == "state_dict":
            twin.load_state_dict(model.state_dict())
        else:
            model.save_model(tmp_path / "a.safetensors")
            twin.load_model(tmp_path / "a.safetensors")
    assert torch.equal(twin(tokens), model(tokens))
    assert twin.parameter_counts() == model.parameter_counts()
    trained = {name for name, value in twin.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in model.named_parameters() if value.requires_grad}


def test_another_kind_of_adapter_is_not_loaded(variant, make_tiny, tmp_path):
    adapted(make_tiny(), variant).save_model(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"variant '{variant}' there, 'lora' here"):
        adapted(make_tiny(), "lora").load_model(tmp_path / "a.safetensors")


def test_half_precision_and_double(variant, tiny, tokens, randomised):
    model = adapted(tiny, variant, randomised)
    out = model(tokens)
    torch.testing.assert_close(model.double()(tokens).float(), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.bfloat16()(tokens).float(), out, atol=0.2, rtol=0.2)


def test_the_meta_device(variant, make_tiny):
    with torch.device("meta"):
        base = make_tiny()
    model = adapted(base, variant)
    assert model.parameter_counts() == adapted(make_tiny(), variant).parameter_counts()
    assert model(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 11)


def test_compiled(variant, tiny, tokens, randomised):
    model = adapted(tiny, variant, randomised).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(variant, kind, randomised):
    bnb = pytest.importorskip("bitsandbytes")
    made = {
        "nf4": lambda: bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4"),
        "int8": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
    }
    model = adapted(nn.Sequential(made[kind]()).to("cpu"), variant, randomised, target_modules=["0"])
    x = torch.randn(3, 64)
    out = model(x)
    out.square().mean().backward()
    assert all(value.grad is not None for value in model.adapter_parameters().values())
    torch.testing.assert_close(model.merge_and_unload()(x), out, atol=1e-4, rtol=1e-4)
