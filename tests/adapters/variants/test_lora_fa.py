"""LoRA-FA: A frozen, inputs not retained, files that are plain LoRA to PEFT."""

import copy
import json

import peft
import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel, use_reference
from lora_exp.adapters.numerics import precision
from lora_exp.adapters.numerics.precision import BLAS, FLOAT32, NATIVE, Answers


def model_of(base, variant="lora_fa", **options):
    return LoraModel(base, LoraConfig(rank=options.pop("rank", 4), variant=variant, **options), verbose=False)


def retained_bytes(model, x):
    """Bytes of the storages that autograd holds after forward, the model's own parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bf16", [NATIVE, FLOAT32])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_linear_layers_input_is_not_retained(dtype, bf16, dropout, monkeypatch):
    """At most a tenth of LoRA's bytes, whatever 16 bits are inside; all of both follow from the input."""
    monkeypatch.setattr(precision, "_told", Answers(bf16, BLAS))
    x = torch.randn(256, 512, dtype=dtype, requires_grad=True)
    found = {}
    for variant in ("lora", "lora_fa"):
        base = nn.Sequential(nn.Linear(512, 512, dtype=dtype))
        found[variant] = retained_bytes(model_of(base, variant, rank=8, lora_dropout=dropout).train(), x)
    assert found["lora"] >= x.nbytes
    assert found["lora_fa"] <= 0.1 * found["lora"]


@pytest.mark.parametrize("bf16", [NATIVE, FLOAT32])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_its_gradients_in_16_bits_are_loras(bf16, dropout, monkeypatch):
    """With as many rows as float32 inside begins at: what B's gradient follows from must be there though x is not."""
    monkeypatch.setattr(precision, "_told", Answers(bf16, BLAS))
    x, found = torch.randn(256, 64, dtype=torch.bfloat16), []
    base = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    for variant in ("lora", "lora_fa"):
        torch.manual_seed(0)
        model = model_of(copy.deepcopy(base), variant, lora_dropout=dropout)
        layer, inputs = model.wrapped[0], x.clone().requires_grad_()
        with torch.no_grad():
            layer.lora_B.normal_()
        model(inputs).square().sum().backward()
        found.append((layer.lora_B.grad, inputs.grad))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2 * other.abs().max().item())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kernel", [1, 3])
def test_nor_is_a_convolutions(kernel, dropout):
    x = torch.randn(2, 64, 12, 12, requires_grad=True)
    base = nn.Sequential(nn.Conv2d(64, 64, kernel, padding=kernel // 2))
    model = model_of(base, layer_types="conv2d", lora_dropout=dropout).train()
    assert retained_bytes(model, x) == 2 * 4 * 12 * 12 * 4  # conv(x, A) alone: N r t t float32


def layer_and_input(kind):
    if kind == "linear":
        return nn.Linear(6, 5).double(), torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    if kind == "conv2d":
        return nn.Conv2d(4, 6, 3, padding=1).double(), torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    if kind == "grouped":
        return nn.Conv2d(4, 6, 3, groups=2).double(), torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    return nn.Embedding(9, 5).double(), torch.randint(0, 9, (3, 4))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped", "embedding"])
def test_gradients_are_those_of_the_plain_formulas(kind, dropout, randomised):
    base, x = layer_and_input(kind)
    model = model_of(nn.Sequential(base), layer_types="all", lora_dropout=dropout).train()
    randomised(model)
    seed = model.dropout_state()

    def found():
        model.load_dropout_state(seed)
        model.zero_grad()
        x.grad = None
        model(x).square().sum().backward()
        return [value.grad for value in (*model.adapter_parameters().values(), x) if value.requires_grad]

    ours = found()
    with use_reference():
        plain = found()
    assert len(ours) == (1 if kind == "embedding" else 2)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-9)
    layer = model.wrapped[0]
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_gradcheck(kind, randomised):
    base, x = layer_and_input(kind)
    model = model_of(nn.Sequential(base), rank=2, layer_types="all")
    randomised(model)
    B = model.wrapped[0].lora_B
    assert torch.autograd.gradcheck(lambda x, B: model(x), (x, B))


def test_what_trains_and_what_is_held(tiny, tokens):
    model = model_of(tiny, target_modules=["q_proj", "embed"])
    assert {name.rpartition(".")[2] for name in model.adapter_parameters()} == {"lora_B"}
    assert {name.rpartition(".")[2] for name in model.adapter_tensors()} == {"lora_A", "lora_B"}
    before = {name: value.clone() for name, value in model.adapter_tensors().items() if name.endswith("lora_A")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)  # all, as a careless user may
    for _ in range(2):
        model(tokens).square().mean().backward()
        optimizer.step()
    assert model.check_gradients() == []
    for name, value in before.items():
        assert value.any()
        assert torch.equal(model.adapter_tensors()[name], value)


def test_peft_reads_plain_lora_and_we_read_lora_fa_again(make_tiny, tokens, randomised, tmp_path):
    base = make_tiny().double()
    plain, model = copy.deepcopy(base), model_of(base, target_modules=["q_proj", "embed"], lora_dropout=0.1)
    randomised(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens), model.eval()(tokens), atol=1e-12, rtol=1e-11)
    back = LoraModel.from_pretrained(copy.deepcopy(plain), tmp_path, verbose=False)
    assert back.configs["default"].variant == "lora_fa"
    assert back.parameter_counts() == model.parameter_counts()
    assert torch.equal(back.eval()(tokens), model(tokens))
    theirs.save_pretrained(tmp_path / "theirs")  # without our notes: an adapter whose A trains
    assert LoraModel.from_pretrained(plain, tmp_path / "theirs", verbose=False).configs["default"].variant == "lora"
