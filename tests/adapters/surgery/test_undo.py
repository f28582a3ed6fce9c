"""All or nothing: whatever fails, wherever, the model is as it was."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_exp.adapters
from lora_exp.adapters import LoraConfig, LoraModel

ROOM = str(Path(lora_exp.adapters.__file__).parent)
CONFIG = LoraConfig(
    rank=2,
    target_modules=["q_proj", "linear1"],
    bias="lora_only",
    modules_to_save=["lm_head"],
    lora_dropout=0.1,
    use_dora=True,
)


def everything(model):
    """Classes, attributes, children, hooks, modes, requires_grad and values of a model, to compare."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = {
            key: (list(value), [id(v) for v in value.values()]) if isinstance(value, dict) else repr(value)
            for key, value in vars(module).items()
        }
        found[name] = (id(module), type(module), attributes)
    flags = [(name, p.requires_grad, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    return found, flags, {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(now, before):
    assert now[0] == before[0]
    assert now[1] == before[1]
    assert now[2].keys() == before[2].keys()
    assert all(torch.equal(now[2][key], before[2][key]) for key in before[2])


def make(make_tiny):
    """A base with a hook, a frozen part, a part in evaluation and a layer that torch would fuse."""
    torch.manual_seed(0)
    model = make_tiny()
    model.encoder = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    model.embed.weight.requires_grad_(False)
    model.layers[1].eval()
    model.layers[0].q_proj.register_forward_hook(_hook)
    return model


def _hook(module, args, out):
    return out


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that runs in the library; n=None only counts.

    inside: look at this function's own lines alone.
    """

    def __init__(self, at=None, inside=None):
        self.at, self.inside, self.seen = at, inside, 0

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        file = frame.f_code.co_filename
        if not file.startswith(ROOM) or file.endswith(("undo.py", "patterns.py")):
            return None
        if event == "line" and self.inside in (None, frame.f_code.co_name):
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self.trace


def interrupted_everywhere(prepare, act, state, trials=40, inside=None):
    """`act(prepare())`, stopped at lines all over it; `state` must be what it was each time."""
    ready = prepare()
    with Interrupter(inside=inside) as whole:
        act(ready)
    assert whole.seen > 10
    for at in sorted({1, *range(2, whole.seen, max(1, whole.seen // trials)), whole.seen - 1, whole.seen}):
        ready = prepare()
        before = everything(state(ready))
        stopped = False
        with Interrupter(at, inside):
            try:
                act(ready)
            except KeyboardInterrupt:
                stopped = True
        if stopped:
            assert_same(everything(state(ready)), before)


def test_making_a_model(make_tiny, capsys):
    interrupted_everywhere(lambda: make(make_tiny), lambda base: LoraModel(base, CONFIG), lambda base: base)


def adapted(make_tiny):
    return LoraModel(
        make(make_tiny), LoraConfig(rank=3, target_modules=["v_proj", "q_proj"], bias="lora_only"), verbose=False
    )


def test_adding_an_adapter(make_tiny):
    interrupted_everywhere(
        lambda: adapted(make_tiny), lambda model: model.add_adapter("b", CONFIG), lambda model: model
    )


@pytest.fixture
def folder(make_tiny, tmp_path, randomised):
    model = LoraModel(make(make_tiny), CONFIG, verbose=False)
    randomised(model)
    model.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def test_loading_a_folder(make_tiny, folder):
    interrupted_everywhere(
        lambda: make(make_tiny), lambda base: LoraModel.from_pretrained(base, folder), lambda base: base, trials=25
    )
    interrupted_everywhere(
        lambda: adapted(make_tiny), lambda model: model.load_adapter(folder, "b"), lambda model: model, trials=25
    )


def test_loading_a_file(make_tiny, tmp_path, randomised):
    model = adapted(make_tiny)
    randomised(model)
    model.save_model(tmp_path / "one.safetensors")
    interrupted_everywhere(
        lambda: adapted(make_tiny),
        lambda model: model.load_model(tmp_path / "one.safetensors"),
        lambda model: model,
        inside="copy_strictly",
    )


@pytest.mark.parametrize("wish", [["nowhere"], ["embed", "norm"], "q_proj", ["q_proj"]])
def test_a_bad_config_leaves_the_base_trainable(wish, make_tiny):
    base = make(make_tiny)
    before = everything(base)
    bias = "all" if wish == ["q_proj"] else "none"
    base.odd = nn.MultiheadAttention(4, 2)  # its bias cannot be trained
    before = everything(base)
    with pytest.raises(ValueError, match=r"."):
        LoraModel(base, LoraConfig(rank=2, target_modules=wish, bias=bias))
    assert_same(everything(base), before)


def test_a_bad_file_leaves_everything(make_tiny, folder):
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    good, written = load_file(path), config.read_text()
    key = next(key for key in good if "lora_B" in key)
    bad = [
        {**good, key: good[key] * torch.nan},
        {k: v for k, v in good.items() if k != key},
        {**good, key: good[key][:1]},
    ]
    for tensors in bad:
        save_file(tensors, path)
        base, model = make(make_tiny), adapted(make_tiny)
        states = everything(base), everything(model)
        with pytest.raises(ValueError, match=r"lora_B"):
            LoraModel.from_pretrained(base, folder)
        with pytest.raises(ValueError, match=r"lora_B"):
            model.load_adapter(folder, "b")
        assert_same(everything(base), states[0])
        assert_same(everything(model), states[1])
    save_file(good, path)
    config.write_text(json.dumps({**json.loads(written), "r": 3}))
    base = make(make_tiny)
    before = everything(base)
    with pytest.raises(ValueError, match=r"rank 2.*asks for 3"):
        LoraModel.from_pretrained(base, folder)
    assert_same(everything(base), before)


def test_a_failure_that_is_caught_leaves_a_model_that_works(make_tiny, folder, tokens):
    model = adapted(make_tiny).eval()
    expected = model(tokens)
    with pytest.raises(ValueError, match=r"no adapted layer|names no module|near"):
        model.add_adapter("b", LoraConfig(target_modules=["nowhere"]))
    assert torch.equal(model(tokens), expected)
    model.load_adapter(folder, "b")
    twin = LoraModel.from_pretrained(make(make_tiny), folder, verbose=False).eval()
    model.set_adapter("b")
    assert torch.equal(model(tokens), twin(tokens))
    assert torch.equal(copy.deepcopy(model)(tokens), twin(tokens))
