"""VeRA: projections that all layers share, formulas and files against PEFT's."""

import copy
import json
import pickle

import peft
import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.adapters.variants.vera import Projection

OURS = {"variant": "vera", "rank": 4, "lora_alpha": 4, "use_rslora": False, "target_modules": ["q_proj", "v_proj"]}
THEIRS = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def vera(base, **options):
    return LoraModel(base, LoraConfig(**{**OURS, **options}), verbose=False)


def shared(model):
    """The storages of all projections, each once."""
    found = [module for module in model.modules() if isinstance(module, Projection)]
    return {buffer.untyped_storage().data_ptr() for module in found for buffer in module.buffers()}


def shapes(base):
    """Another shape a layer, so that projections are cut."""
    for layer in base.layers:
        layer.v_proj = nn.Linear(16, 16, bias=False)
        layer.q_proj = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    return base


def logits(model, inputs):
    with torch.no_grad():
        found = model.eval()(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def twin_of(model, twin):
    """Copy d and b to PEFT by hand; A and B follow from the seed."""
    theirs = dict(twin.base_model.model.named_modules())
    with torch.no_grad():
        for name, value in model.adapter_parameters().items():
            layer, _, what = name.rpartition(".")
            getattr(theirs[layer], f"vera_lambda_{what}")["default"].copy_(value)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_pefts_projections(seed, make_tiny):
    base = shapes(make_tiny())
    options = {"target_modules": ["v_proj", "q_proj.0", "q_proj.1"]}
    twin = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=4, projection_prng_key=seed, **options))
    model = vera(base, variant_options={"projection_seed": seed, "d_initial": 0.2}, **options)
    (projection,) = {module for module in model.modules() if isinstance(module, Projection)}
    assert torch.equal(projection.A, twin.base_model.vera_A["default"])
    assert torch.equal(projection.B, twin.base_model.vera_B["default"])
    assert model.parameter_counts() == twin.get_nb_trainable_parameters()
    assert all(
        (value == (0.2 if name.endswith(".d") else 0)).all() for name, value in model.adapter_parameters().items()
    )


def test_outputs_gradients_and_steps_are_pefts(make_tiny, tokens, randomised):
    base = make_tiny().double()
    twin = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(**THEIRS))
    model = vera(base)
    randomised(model)
    twin_of(model, twin)
    theirs = dict(twin.base_model.model.named_modules())
    optimizers = [torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.1) for one in (model, twin)]
    for _ in range(3):
        found = [one(tokens) for one in (model, twin)]
        torch.testing.assert_close(*found, atol=1e-10, rtol=1e-9)
        for out in found:
            out.log_softmax(-1)[..., 0].mean().backward()
        for name, value in model.adapter_parameters().items():
            layer, _, what = name.rpartition(".")
            expected = getattr(theirs[layer], f"vera_lambda_{what}")["default"].grad
            torch.testing.assert_close(value.grad, expected, atol=1e-12, rtol=1e-9)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout, randomised):
    model = vera(nn.Sequential(nn.Linear(5, 3).double()), rank=2, lora_dropout=dropout, target_modules=["0"])
    randomised(model.train())
    state, adapter = model.dropout_state(), model.wrapped[0].adapter
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def run(x, d, b):
        model.load_dropout_state(state)
        return model(x)

    assert torch.autograd.gradcheck(run, (x, adapter.d, adapter.b))


def test_a_layers_input_is_not_retained():
    model = vera(nn.Sequential(nn.Linear(64, 64)), target_modules=["0"])
    x, seen = torch.randn(512, 64, requires_grad=True), []

    def note(tensor):
        seen.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    assert seen
    assert x.untyped_storage().data_ptr() not in seen


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "bfloat16", "double", "state_dict", "undo"])
def test_all_layers_share_one_projection(way, make_tiny):
    model = vera(make_tiny())
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif way == "state_dict":
        model.load_state_dict(model.state_dict())
    elif way == "undo":
        with pytest.raises(ValueError, match="is of type embedding; target linear layers"):
            model.add_adapter("other", LoraConfig(variant="vera", target_modules=["embed", "q_proj"]))
    else:
        model.to(getattr(torch, way))
    layers = [layer.adapters["default"] for block in model.wrapped.layers for layer in (block.q_proj, block.v_proj)]
    assert len({id(adapter.projection) for adapter in layers}) == 1
    assert len(shared(model)) == 2


def test_the_meta_device_and_back(make_tiny, tokens, randomised):
    model = vera(make_tiny())
    randomised(model)
    state = model.state_dict()
    empty = vera(make_tiny()).to("meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.to_empty(device="cpu").load_state_dict(state)
    assert len(shared(empty)) == 2
    assert torch.equal(empty(tokens), model(tokens))


def test_one_layer_may_move_alone(tiny, tokens, randomised):
    model = vera(tiny)
    randomised(model)
    out = model(tokens)
    model.wrapped.layers[1].q_proj.adapters["default"].double()
    torch.testing.assert_close(model(tokens), out)


CASES = [
    ("llama", ["q_proj", "down_proj"]),
    ("llama", "all-linear"),
    ("llama", r".*layers\.1\..*_proj"),
    ("gpt2", ["c_attn", "c_fc"]),
    ("bert", ["query"]),
    ("t5", ["q", "wo"]),
]


@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_folders_both_ways(kind, targets, make_transformer, inputs_for, randomised, tmp_path):
    """Ours -> PEFT -> ours in float64, with a scale, which PEFT's VeRA has not."""
    base, inputs = make_transformer(kind).double(), inputs_for(kind)
    plain = copy.deepcopy(base)
    model = vera(base, target_modules=targets, lora_alpha=6, use_rslora=True, lora_dropout=0.1)
    randomised(model)
    model.save_pretrained(tmp_path / "ours")
    stored = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert (stored["peft_type"], stored["r"], stored["vera_dropout"]) == ("VERA", 4, 0.1)
    assert "# VeRA adapter of rank 4" in (tmp_path / "ours/README.md").read_text()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs, inputs), logits(model, inputs), atol=1e-12, rtol=1e-11)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back = LoraModel.from_pretrained(copy.deepcopy(plain), tmp_path / folder, verbose=False)
        torch.testing.assert_close(logits(back, inputs), logits(model, inputs), atol=1e-12, rtol=1e-11)
        assert back.configs["default"].variant == "vera"
        assert back.configs["default"].scale == 1
        assert back.parameter_counts() == model.parameter_counts()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_saved_modules_and_exclusions(bias, make_tiny, tokens, randomised, tmp_path):
    base = make_tiny().double()
    plain = copy.deepcopy(base)
    exclude = {"exclude_modules": ["layers.1.v_proj"], "modules_to_save": ["lm_head"]}
    model = vera(base, bias=bias, **exclude)
    randomised(model)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens), model.eval()(tokens), atol=1e-12, rtol=1e-11)
    back = LoraModel.from_pretrained(plain, tmp_path, verbose=False).eval()
    torch.testing.assert_close(back(tokens), model(tokens), atol=0, rtol=0)


def test_what_pefts_files_cannot_hold_is_refused_by_name(make_tiny, tmp_path):
    model = vera(make_tiny(), rank_pattern={"layers.0.q_proj": 2})
    with pytest.raises(ValueError, match=r"rank_pattern.*save_model"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_model(tmp_path / "own.safetensors")


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A:UserWarning")
def test_a_file_without_its_projections_is_refused(make_tiny, tmp_path):
    twin = peft.get_peft_model(make_tiny(), peft.VeraConfig(**THEIRS, save_projection=False))
    twin.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save_projection=False"):
        LoraModel.from_pretrained(make_tiny(), tmp_path, verbose=False)


def test_a_file_of_another_rank_is_refused(make_tiny, tmp_path):
    vera(make_tiny()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    with pytest.raises(ValueError, match=r"rank 4, where adapter_config.json asks for 8"):
        LoraModel.from_pretrained(make_tiny(), tmp_path, verbose=False)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.Embedding(9, 4)])
def test_other_layers_are_refused_by_name(layer):
    with pytest.raises(ValueError, match="variant='vera' is for linear layers"):
        vera(nn.Sequential(layer), target_modules=["0"], layer_types="all")
