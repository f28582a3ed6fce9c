"""What every start meets: files, merging, routing, copies, other layers and bases. Each of the registry's is met."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pickle

import peft
import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoRALinear, LoraModel, use_reference
from lora_exp.adapters.starts import registry as starts
from lora_exp.adapters.starts.registry import start, start_named, start_names
from lora_exp.adapters.starts.start import Start
from lora_exp.adapters.variants import registry as variants
from lora_exp.adapters.variants.lora import LoraAdapter
from lora_exp.adapters.variants.registry import variant
from lora_exp.errors import UserError

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

STARTS = [name for name in start_names() if name != "loftq"]  # which has only quantised bases, and tests of its own
SUBTRACTED = [name for name in STARTS if start_named(name).is_subtracted]
EACH = pytest.mark.parametrize("name", STARTS)
BOTH = pytest.mark.parametrize("variant", ["lora", "dora"])
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 2e-6}
TARGETS = ["q_proj", "v_proj"]


def adapted(base: nn.Module, name: str, variant: str = "lora", **more) -> LoraModel:
    config = {"rank": 4, "target_modules": TARGETS, **more}
    return LoraModel(base, LoraConfig(start=name, variant=variant, **config), verbose=False)


def trained(model: LoraModel, tokens: torch.Tensor, name: str = "default", steps: int = 2) -> LoraModel:
    optimizer = torch.optim.SGD(model.adapter_parameters(name).values(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
    return model


@EACH
@BOTH
def test_the_base_is_never_changed_and_is_where_training_starts(name, variant, tiny, tokens):
    before, base = copy.deepcopy(tiny.state_dict()), tiny(tokens)
    model = adapted(tiny, name, variant)
    torch.testing.assert_close(model(tokens), base, **(EXACT if name in SUBTRACTED or name == "default" else CLOSE))
    changed = trained(model, tokens)(tokens)
    assert (changed - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(tokens), base)
    for key, value in before.items():
        assert torch.equal(dict(model.wrapped.named_parameters())[key], value), key


@EACH
@BOTH
def test_kernels_agree_with_the_plain_formulas(name, variant, tiny, tokens):
    model = trained(adapted(tiny, name, variant, lora_dropout=0.3).double(), tokens).train()
    state = model.dropout_state()
    found = []
    for plain in (False, True):
        model.zero_grad()
        model.load_dropout_state(state)
        with use_reference() if plain else contextlib.nullcontext():
            out = model(tokens)
            out.square().sum().backward()
        found.append([out, *(p.grad for p in model.adapter_parameters().values())])
    for fused, reference in zip(*found, strict=True):
        torch.testing.assert_close(fused, reference)


@EACH
@BOTH
def test_merging_and_unmerging(name, variant, tiny, tokens):
    model = trained(adapted(tiny, name, variant), tokens)
    base = {key: value.clone() for key, value in model.wrapped.named_parameters() if "lora" not in key}
    wanted = model(tokens)
    model.merge()
    torch.testing.assert_close(model(tokens), wanted, **CLOSE)
    model.unmerge()
    assert all(torch.equal(dict(model.wrapped.named_parameters())[key], value) for key, value in base.items())
    assert torch.equal(model(tokens), wanted)
    plain = model.merge_and_unload()
    assert type(plain.layers[0].q_proj) is nn.Linear
    torch.testing.assert_close(plain(tokens), wanted, **CLOSE)


@EACH
@BOTH
@pytest.mark.parametrize("rslora", [True, False], ids=["rslora", "standard"])
def test_a_folder_loads_in_peft_onto_the_untouched_base_and_goes_on_here(name, variant, rslora, tiny, tokens, tmp_path):
    untouched = copy.deepcopy(tiny)
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.q_proj": 5.0}}
    model = trained(adapted(tiny, name, variant, use_rslora=rslora, **patterns), tokens)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    torch.testing.assert_close(theirs(tokens), model(tokens), **CLOSE)
    again = LoraModel.from_pretrained(untouched, tmp_path, verbose=False)
    assert again.configs["default"].start == name
    assert again.configs["default"].rank == 4
    ours = model.adapter_tensors()
    assert {key: value.tolist() for key, value in again.adapter_tensors().items()} == {
        key: value.tolist() for key, value in ours.items()
    }
    trained(model, tokens), trained(again, tokens)
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("name", SUBTRACTED)
def test_a_folder_whose_config_was_changed_is_a_plain_lora_of_twice_the_rank(name, tiny, tokens, tmp_path):
    untouched = copy.deepcopy(tiny)
    trained(adapted(tiny, name), tokens).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": ', '"lora_alpha": 2'))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    again = LoraModel.from_pretrained(untouched, tmp_path, verbose=False)
    assert again.configs["default"].rank == 8
    assert again.configs["default"].start == "default"
    torch.testing.assert_close(again(tokens), theirs(tokens), rtol=1e-3, atol=1e-4)  # differences of large products


@EACH
@BOTH
def test_one_file_of_our_own(name, variant, tiny, tokens, tmp_path):
    twin = adapted(copy.deepcopy(tiny), name, variant)
    model = trained(adapted(tiny, name, variant), tokens)
    model.save_model(tmp_path / "adapter.safetensors")
    twin.load_model(tmp_path / "adapter.safetensors")
    assert torch.equal(twin(tokens), model(tokens))


@EACH
@BOTH
def test_copies_and_state_dicts(name, variant, tiny, tokens):
    untouched = copy.deepcopy(tiny)
    model = trained(adapted(tiny, name, variant), tokens)
    wanted = model(tokens)
    buffer = io.BytesIO(pickle.dumps(model))
    for twin in (copy.deepcopy(model), pickle.load(buffer)):
        assert torch.equal(twin(tokens), wanted)
        trained(twin, tokens)
        assert torch.equal(model(tokens), wanted)
    other = adapted(untouched, name, variant)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), wanted)


@EACH
def test_several_adapters_side_by_side(name, tiny, tokens):
    model = adapted(tiny, name)
    model.add_adapter("plain", LoraConfig(rank=2, target_modules=TARGETS))
    model.add_adapter("second", LoraConfig(rank=2, target_modules=TARGETS, start=name, variant="dora"))
    names = ["default", "plain", "second", "__base__"]
    for one in names[:3]:
        model.set_adapter(one)
        trained(model, tokens, one)
    with model.route(dict.fromkeys(names, 1)):
        routed = model(tokens)
    for row, one in enumerate(names[:3]):
        model.set_adapter(one)
        torch.testing.assert_close(routed[row], model(tokens)[row], **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(routed[3], model(tokens)[3], **CLOSE)
    model.delete_adapter("default")
    assert not any("start_" in key for key in model.adapter_tensors("plain"))


@EACH
@pytest.mark.parametrize("kind", ["conv", "embedding", "sparse", "gpt2"])
def test_other_kinds_of_layers(kind, name, vision, images, tiny, tokens, make_transformer, inputs_for, tmp_path):
    if kind == "gpt2":
        base, inputs = make_transformer("gpt2").eval(), inputs_for("gpt2")["input_ids"]
        config = {"target_modules": ["c_attn"]}
    elif kind == "sparse" and name in SUBTRACTED:
        tiny.embed.sparse = True
        with pytest.raises(UserError, match=f"start='{name}' is not for embed: its gradients are sparse"):
            adapted(tiny, name, target_modules=["embed"])
        return
    elif kind == "conv":
        base, inputs, config = vision.eval(), images, {"target_modules": ["conv"]}
    else:
        base, inputs, config = tiny, tokens, {"target_modules": ["embed"]}
        base.embed.sparse = kind == "sparse"
    untouched = copy.deepcopy(base)

    def run(model):
        out = model(inputs)
        return out if isinstance(out, torch.Tensor) else out.logits

    model = adapted(base, name, **config)
    torch.testing.assert_close(run(model), run(untouched), **CLOSE)
    for parameter in model.adapter_parameters().values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    run(model).square().mean().backward()
    assert all(p.grad is not None and p.grad.to_dense().any() for p in model.adapter_parameters().values())
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path).eval()
    torch.testing.assert_close(run(theirs), run(model), **CLOSE)
    torch.testing.assert_close(run(model.merge_and_unload()), run(theirs), **CLOSE)


@EACH
@BOTH
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_stays_as_it_was_quantised(kind, name, variant, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(64, 32)
    made = bnb.nn.Linear4bit(64, 32, quant_type="nf4") if kind == "nf4" else bnb.nn.Linear8bitLt(64, 32, True, False)
    made.load_state_dict(plain.state_dict(), strict=False)
    base = nn.Sequential(made.to("cpu"))
    x, packed = torch.randn(3, 64), made.weight.data.clone()
    model = adapted(base, name, variant, target_modules=["0"])
    with model.disable_adapter():
        wanted = model(x)
    torch.testing.assert_close(model(x), wanted, **CLOSE)
    trained(model, x)
    assert not torch.allclose(model(x), wanted, **CLOSE)
    assert torch.equal(model.wrapped[0].weight.data, packed)
    changed = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), changed, **CLOSE)


@pytest.mark.parametrize("name", SUBTRACTED)
def test_sixteen_bits_keep_a_small_change(name):
    """As a difference of two products that are rounded to bfloat16 it would be lost."""
    base = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    model = adapted(nn.Sequential(base), name, target_modules=["0"])
    x = torch.randn(16, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        layer = model.wrapped[0]
        layer.lora_B.add_(1e-4 * torch.randn_like(layer.lora_B))
        found = layer.adapter.low_rank(layer, x).double()
        wanted = x.double() @ layer.delta_weight().double().T
    assert (found - wanted).norm() < 0.01 * wanted.norm()


@EACH
def test_a_seed_gives_one_start(name, make_tiny):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        base = make_tiny()
        torch.manual_seed(seed)
        found.append([p.detach() for p in adapted(base, name).adapter_parameters().values()])
    assert all(torch.equal(one, other) for one, other in zip(*found[:2], strict=True))


@EACH
def test_on_the_meta_device_shapes_are_there(name, tiny):
    counts = adapted(copy.deepcopy(tiny), name).parameter_counts()
    model = adapted(tiny.to("meta"), name)
    assert all(tensor.is_meta for tensor in model.adapter_tensors().values())
    assert model.parameter_counts() == counts


@pytest.mark.parametrize("name", SUBTRACTED)
def test_a_compiled_model_follows(name, tiny, tokens):
    model = trained(adapted(tiny, name), tokens).eval()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), **CLOSE)


@pytest.mark.parametrize("name", SUBTRACTED)
def test_another_base_that_is_loaded_leaves_an_untrained_dora_meaning_no_change(name, tiny, make_tiny, tokens):
    other = make_tiny()
    model = adapted(tiny, name, "dora")
    model.wrapped.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(model(tokens), other(tokens), **CLOSE)


def test_a_layer_without_one_product_is_refused_by_name():
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    for name in STARTS:
        if name != "default":
            with pytest.raises(UserError, match=f"start='{name}' is not for 0: its delta is not one product"):
                adapted(base, name, target_modules=["0"])
            assert type(base[0]) is nn.Conv2d


def test_a_rank_above_the_weight_is_refused_by_name():
    for name in SUBTRACTED:
        with pytest.raises(UserError, match=f"start='{name}' is not for 0: rank=6 is more than the 4 directions"):
            adapted(nn.Sequential(nn.Linear(8, 4)), name, target_modules=["0"], rank=6)


def test_unknown_names_and_options_are_refused(tiny):
    with pytest.raises(UserError, match=r"start='pisa' is no start; choose one of .*default"):
        adapted(tiny, "pisa")
    with pytest.raises(UserError, match="start_options: iters is no option of 'default'; it takes none"):
        adapted(tiny, "default", start_options={"iters": 2})


def test_a_variant_that_does_not_say_so_keeps_its_own_way_to_begin(tiny, monkeypatch):
    monkeypatch.setattr(variants._VARIANTS, "_entries", dict(variants._VARIANTS._entries))

    @variant("begins_alone")
    class Alone(LoraAdapter):
        pass

    with pytest.raises(UserError, match="start='orthogonal' is not for variant='begins_alone'"):
        adapted(tiny, "orthogonal", "begins_alone")
    adapted(tiny, "default", "begins_alone")


def test_a_start_from_outside_is_one_class(tiny, tokens, monkeypatch):
    monkeypatch.setattr(starts._STARTS, "_entries", dict(starts._STARTS._entries))

    @start("ones_of")
    class Ones(Start):
        is_subtracted = True

        def __init__(self, *, value: float = 1.0) -> None:
            self.value = value

        def fill(self, blank):
            blank.lora_A.fill_(self.value)
            blank.lora_B.fill_(self.value)

    base = tiny(tokens)
    model = adapted(tiny, "ones_of", start_options={"value": 0.5})
    assert model.wrapped.layers[0].q_proj.lora_A.eq(0.5).all()
    assert torch.equal(model(tokens), base)


def test_a_layer_built_by_hand_begins_by_default():
    layer = LoRALinear(8, 4)
    assert layer.lora_A.any()
    assert not layer.lora_B.any()
