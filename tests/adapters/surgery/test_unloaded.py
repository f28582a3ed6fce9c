"""What merge_and_unload leaves behind: modules of the original classes with nothing of ours on them."""

import logging
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def transposed():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 8)


def quantised(kind):
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu")
    return bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type=kind).to("cpu")


KINDS = {
    "linear": (lambda: nn.Linear(8, 8), torch.randn(2, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), torch.randn(2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3), torch.randn(2, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), torch.randn(2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 3), torch.randn(2, 4, 6, 6, 6)),
    "embedding": (lambda: nn.Embedding(9, 8), torch.arange(6)),
    "transposed": (transposed, torch.randn(2, 8)),
    **{kind: (lambda kind=kind: quantised(kind), torch.randn(2, 64)) for kind in ("int8", "nf4", "fp4")},
}
QUANTISED = ("int8", "nf4", "fp4")


def traces(model):
    """The attributes and hooks of every module, and its class."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks", "_state_dict_hooks")
    return {
        name: (type(module), set(vars(module)), set(module._modules), [len(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    }


def unloaded(kind, dora, bias, requantise, merged_first):
    make, x = KINDS[kind]
    plain = nn.Sequential(make(), nn.Identity())
    plain.register_module("saved", nn.Identity())
    before = traces(plain)
    config = LoraConfig(rank=2, target_modules=["0"], layer_types="all", use_dora=dora, bias=bias)
    model = LoraModel(plain, config, verbose=False)
    for training in (True, False):
        model.train(training)
        out = model(x)
    out.sum().backward()
    with torch.inference_mode():
        model(x)
    if merged_first:
        model.merge(requantise=requantise)
        model(x)
        with model.disable_adapter():
            model(x)
    return before, model.merge_and_unload(requantise=requantise), x


@pytest.mark.parametrize("merged_first", [False, True])
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_attribute_no_hook_and_no_class_of_ours_is_left(kind, dora, bias, merged_first):
    if kind == "embedding" and bias == "all":
        return  # has none
    for requantise in {False, kind in QUANTISED}:
        before, plain, x = unloaded(kind, dora, bias, requantise, merged_first)
        after = traces(plain)
        if kind in QUANTISED and not requantise:
            after["0"], before["0"] = after["0"], traces(nn.Sequential(nn.Linear(64, 64)))["0"]
        assert after == before
        stored = pickle.dumps(plain)
        assert b"lora_exp" not in stored
        assert torch.equal(pickle.loads(stored)(x), plain(x))


def test_a_saved_module_leaves_as_its_own_class():
    plain = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    before = traces(plain)
    model = LoraModel(plain, LoraConfig(rank=2, target_modules=["0"], modules_to_save=["1"]), verbose=False)
    model(torch.randn(2, 8)).sum().backward()
    assert traces(model.merge_and_unload()) == before


@pytest.mark.parametrize("heads", [1, 2])  # an odd number has no fast path
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
def test_torchs_encoder_may_take_its_fast_path_again(activation, heads):
    def flags(model):
        return [{key: value for key, value in vars(m).items() if isinstance(value, int)} for m in model.modules()]

    layer = nn.TransformerEncoderLayer(8, heads, 16, activation=activation, batch_first=True)
    usable = activation is not torch.tanh and heads == 2
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=usable).eval()
    before = flags(base)
    plain = LoraModel(base, LoraConfig(rank=2, target_modules=["linear1"]), verbose=False).merge_and_unload()
    assert flags(plain) == before


def test_their_pickles_load_where_the_library_is_not(tmp_path):
    kinds = [kind for kind in KINDS if kind not in (*QUANTISED, "transposed")]
    models = {kind: unloaded(kind, True, "none", False, False)[1:] for kind in kinds}
    (tmp_path / "models.pickle").write_bytes(pickle.dumps({kind: (m, x, m(x)) for kind, (m, x) in models.items()}))
    code = (
        "import sys, pickle, torch; sys.modules['lora_exp'] = None\n"
        f"models = pickle.load(open({str(tmp_path / 'models.pickle')!r}, 'rb')).values()\n"
        "assert all(torch.equal(model(x), y) for model, x, y in models)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
