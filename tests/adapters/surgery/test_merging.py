"""Merging: merged = adapted, unmerging restores every bit, nothing of the library is left."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_exp.adapters import LoraAdapter, LoraConfig, LoraModel
from lora_exp.adapters.surgery import merging

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def bits(model):
    return {
        name.replace(".original", ""): value.clone()
        for name, value in model.state_dict().items()
        if "adapters" not in name and "trained_biases" not in name and ".copies." not in name
    }


def logits(model, inputs):
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


def subject(kind, request):
    if kind == "vision":
        return request.getfixturevalue("vision"), {"x": request.getfixturevalue("images")}
    if kind == "tiny":
        return request.getfixturevalue("tiny"), {"tokens": request.getfixturevalue("tokens")}
    make, inputs = request.getfixturevalue("make_transformer"), request.getfixturevalue("inputs_for")
    return make(kind), inputs(kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["tiny", "vision", "gpt2", "llama", "t5"])
def test_every_kind_of_layer(kind, dora, dtype, request, randomised, tmp_path):
    base, inputs = subject(kind, request)
    original = copy.deepcopy(base)
    types = {name: type(module) for name, module in base.named_modules()}
    config = LoraConfig(rank=2, layer_types=("linear", "embedding", "conv2d"), use_dora=dora, bias="all")
    config = LoraConfig(**{**config.to_dict(), "bias": "none"}) if kind in ("llama", "t5") else config
    model = LoraModel(base.to(dtype).eval(), config, verbose=False)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    randomised(model, std=0.1)
    before, adapted = bits(model.wrapped), logits(model, inputs)
    model.save_model(tmp_path / "merged.safetensors", merge_weights=True)

    report = model.merge()
    merged = logits(model, inputs)
    close = CLOSE if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.1}
    torch.testing.assert_close(merged, adapted, **close)
    assert report.layers == len({key.rpartition(".")[0] for key in model.adapter_parameters() if "lora_A" in key})
    assert (report.max_error == 0) == (dtype == torch.float32)
    with model.disable_adapter():
        assert all(torch.equal(before[name], value) for name, value in bits(model.wrapped).items())
    model.unmerge()
    assert all(torch.equal(before[name], value) for name, value in bits(model.wrapped).items())
    assert torch.equal(logits(model, inputs), adapted)

    plain = model.merge_and_unload()
    assert {name: type(module) for name, module in plain.named_modules()} == types
    assert torch.equal(logits(plain, inputs), merged)
    reloaded = original.to(dtype).eval()
    reloaded.load_state_dict(load_file(tmp_path / "merged.safetensors"), strict=kind not in ("llama", "t5"))
    if kind in ("tiny", "vision"):
        assert torch.equal(logits(reloaded, inputs), merged)


def test_repeated_merging_does_not_drift(tiny, tokens, randomised):
    model = LoraModel(tiny.bfloat16(), LoraConfig(rank=4), verbose=False)
    randomised(model)
    before = bits(tiny)
    for _ in range(5):
        assert model.merge().relative_error > 0
        model.unmerge()
    assert all(torch.equal(before[name], value) for name, value in bits(tiny).items())


def test_merging_is_refused_where_it_would_do_harm(tiny, tokens, randomised):
    model = LoraModel(tiny, LoraConfig(rank=4), verbose=False)
    before = bits(tiny)
    with torch.no_grad():
        model.adapter_parameters()["layers.1.v_proj.lora_B"].fill_(float("inf"))
    with pytest.raises(ValueError, match=r"layers\.1\.v_proj that are not finite; nothing was merged"):
        model.merge()
    assert model.merged_adapter is None
    assert all(torch.equal(before[name], value) for name, value in bits(tiny).items())
    with pytest.raises(ValueError, match="nothing is merged"):
        model.unmerge()
    with torch.no_grad():
        model.adapter_parameters()["layers.1.v_proj.lora_B"].zero_()
    model.merge()
    for forbidden in (
        model.merge,
        lambda: model.set_adapter("default"),
        lambda: model.delete_adapter("default"),
    ):
        with pytest.raises(ValueError, match=r"unmerge\(\) first"):
            forbidden()
    model.wrapped.double()
    with pytest.raises(ValueError, match="bit for bit"):
        model.unmerge()


def test_saved_modules_replace_the_originals(tiny, tokens, randomised, tmp_path):
    original = copy.deepcopy(tiny)
    model = LoraModel(tiny, LoraConfig(rank=2, modules_to_save=["lm_head", "layers.0.norm"]), verbose=False)
    randomised(model)
    expected = model(tokens)
    model.save_model(tmp_path / "m.safetensors", merge_weights=True)
    original.load_state_dict(load_file(tmp_path / "m.safetensors"))
    torch.testing.assert_close(original(tokens), expected, **CLOSE)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(tokens), expected, **CLOSE)
    assert type(plain.lm_head) is nn.Linear


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_weights_stay_exact(targets, dora, make_transformer, inputs_for, randomised, tmp_path):
    import transformers

    torch.manual_seed(0)
    base = make_transformer("llama")
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = True
    base, inputs = transformers.LlamaForCausalLM(config), inputs_for("llama")
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = LoraModel(base.eval(), LoraConfig(rank=3, target_modules=targets, use_dora=dora), verbose=False)
    randomised(model)
    adapted = logits(model, inputs)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "adapter")
    fresh = transformers.LlamaForCausalLM(config)
    fresh.load_state_dict({key: v for key, v in base.state_dict().items() if "adapters" not in key})
    again = LoraModel.from_pretrained(fresh, tmp_path / "adapter", strict_base=True, verbose=False)
    torch.testing.assert_close(logits(again.eval(), inputs), adapted, atol=1e-6, rtol=1e-5)
    model.merge()
    torch.testing.assert_close(logits(model, inputs), adapted, **CLOSE)
    model.unmerge()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    plain.save_pretrained(tmp_path / "merged")
    reloaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(reloaded, inputs), adapted, **CLOSE)


class TwoAdapters:
    """A model with `a` and `b`, on layers of their own and on one that both adapt; `a` is merged or not."""

    @pytest.fixture(params=["none", "all"])
    def model(self, request, tiny, randomised):
        options = {"rank": 2, "bias": request.param}
        model = LoraModel(
            tiny, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **options), "a", False
        )
        model.add_adapter(
            "b", LoraConfig(target_modules=["q_proj", "embed"], layer_types="all", use_dora=True, **options)
        )
        for name in model.configs:
            randomised(model, name)
        return model.eval()


class TestWhileAnotherIsMerged(TwoAdapters):
    def test_a_file_holds_the_adapter_that_was_named(self, model, make_tiny, tokens, tmp_path):
        expected = {}
        for name in model.configs:
            model.set_adapter(name)
            expected[name] = model(tokens)
        model.set_adapter("b")
        model.merge("a")
        for name in model.configs:
            model.save_model(tmp_path / "m.safetensors", merge_weights=True, name=name)
            plain = make_tiny()
            plain.load_state_dict(load_file(tmp_path / "m.safetensors"))
            torch.testing.assert_close(plain(tokens), expected[name], **CLOSE)
        assert model.merged_adapter == model.active_adapter == "a"
        torch.testing.assert_close(model(tokens), expected["a"], **CLOSE)
        model.unmerge()
        assert model.active_adapter == "b"
        assert torch.equal(model(tokens), expected["b"])

    @pytest.mark.parametrize("name", ["a", "b", None])
    def test_unloading_gives_the_adapter_that_was_named(self, model, name, tokens):
        model.set_adapter(name or "a")
        expected = model(tokens)
        model.set_adapter("b")
        model.merge("a")
        torch.testing.assert_close(model.merge_and_unload(name)(tokens), expected, **CLOSE)


class TestSavingWhileMerged(TwoAdapters):
    def test_nothing_is_lost(self, model, make_tiny, tokens, tmp_path):
        model.set_adapter("a")
        expected, fresh = model(tokens), copy.deepcopy(model)
        tensors = {key: value.clone() for key, value in model.adapter_tensors("a").items()}
        model.save_model(tmp_path / "before.safetensors")
        model.merge("a")
        assert model.adapter_tensors("a").keys() == tensors.keys()
        assert all(torch.equal(value, tensors[key]) for key, value in model.adapter_tensors("a").items())
        model.save_model(tmp_path / "after.safetensors")
        before, after = (load_file(tmp_path / f"{when}.safetensors") for when in ("before", "after"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        model.save_pretrained(tmp_path / "folder")
        base = make_tiny()
        with torch.no_grad():
            for key, value in model.wrapped.state_dict().items():
                if key in dict(base.named_parameters()):
                    base.get_parameter(key).copy_(merging.kept_parameters(model.wrapped).get(key, value))
            base.lm_head.load_state_dict(model.wrapped.lm_head.original.state_dict())
        again = LoraModel.from_pretrained(base, tmp_path / "folder", strict_base=True, verbose=False)
        torch.testing.assert_close(again.eval()(tokens), expected, atol=1e-6, rtol=1e-5)
        for other in (fresh, model):  # an unmerged model, and a merged one
            state = copy.deepcopy(model.state_dict())
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
            other.load_state_dict(state)
            torch.testing.assert_close(other(tokens), expected, **CLOSE)
        model.unmerge()
        assert torch.equal(model(tokens), expected)

    def test_a_state_dict_of_another_merge_is_refused(self, model):
        state = model.state_dict()
        model.merge("a")
        with pytest.raises(ValueError, match=r"another merge or of none; call unmerge\(\)"):
            model.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_disabling_puts_the_merge_back_as_it_was_asked_for(dtype, tiny, tokens, randomised):
    model = LoraModel(tiny.to(dtype), LoraConfig(rank=2), verbose=False)
    randomised(model)
    with torch.no_grad():
        model.adapter_parameters()["layers.1.v_proj.lora_B"][0, 0] = float("inf")
    model.merge(safe=False)
    merged = bits(tiny)
    with model.disable_adapter():
        assert model(tokens).isfinite().all()
    assert all(torch.equal(merged[name], value) for name, value in bits(tiny).items())


def test_an_interrupted_merge_leaves_no_half(tiny, tokens, randomised, monkeypatch):
    model = LoraModel(tiny, LoraConfig(rank=2), verbose=False)
    randomised(model)
    expected, calls, real = model(tokens), [], LoraAdapter.merged

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(LoraAdapter, "merged", failing)
    with pytest.raises(KeyboardInterrupt):
        model.merge()
    assert model.merged_adapter is None
    assert torch.equal(model(tokens), expected)


def test_a_merge_in_inference_mode_can_be_trained_through(tiny, tokens, randomised):
    model = LoraModel(tiny, LoraConfig(rank=2, bias="all"), verbose=False)
    randomised(model)
    with torch.inference_mode():
        model.merge()
        with model.disable_adapter():
            model(tokens)
    h = torch.ones(1, 16, requires_grad=True)
    tiny.layers[0](h).sum().backward()
    with torch.inference_mode():
        model.unmerge()
    model(tokens).sum().backward()
    assert model.check_gradients() == []


def test_ties_that_merging_leaves_alone_stay(make_transformer, inputs_for, randomised):
    model = LoraModel(make_transformer("gpt2"), LoraConfig(rank=2, target_modules=["c_attn"]), verbose=False)
    randomised(model)
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is True
    assert plain.lm_head.weight is plain.transformer.wte.weight


def test_merged_files_hold_shared_tensors_and_buffers(make_transformer, randomised, tmp_path):
    model = LoraModel(make_transformer("gpt2"), LoraConfig(rank=2, target_modules=["c_attn"]), verbose=False)
    randomised(model)
    model.save_model(tmp_path / "m.safetensors", merge_weights=True)
    fresh = make_transformer("gpt2")
    fresh.load_state_dict(load_file(tmp_path / "m.safetensors"))
    torch.testing.assert_close(
        fresh.transformer.h[0].attn.c_attn.weight, model.wrapped.transformer.h[0].attn.c_attn.merge().weight
    )
