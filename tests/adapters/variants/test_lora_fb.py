"""LoRA with B frozen: A alone trains, from zero, under a B drawn as A is elsewhere."""

import copy
import json

import peft
import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel, use_reference


def model_of(base, **options):
    return LoraModel(base, LoraConfig(rank=options.pop("rank", 4), variant="lora_fb", **options), verbose=False)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: torch.randint(0, 9, (3, 4))),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", LAYERS)
def test_A_alone_trains_as_in_the_plain_formulas(kind, dropout, randomised):
    layer, inputs = LAYERS[kind]
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    base = nn.Sequential(layer().double())
    before = base(x)
    model = model_of(base, layer_types="all", lora_dropout=dropout).train()
    assert torch.equal(model(x), before)
    wrapped = model.wrapped[0]
    assert not wrapped.lora_A.any()
    assert wrapped.lora_B.any()
    assert [name.rpartition(".")[2] for name in model.adapter_parameters()] == ["lora_A"]
    randomised(model)
    masks = model.dropout_state()

    def gradient():
        model.load_dropout_state(masks)
        model.zero_grad()
        model(x).square().sum().backward()
        return wrapped.lora_A.grad

    ours = gradient()
    with use_reference():
        plain = gradient()
    assert ours.abs().sum() > 0
    torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-9)
    assert wrapped.lora_B.grad is None


def test_B_is_drawn_as_A_is_elsewhere():
    """Uniform within one by the root of its fan: LoRA's own draw for a layer with in and out exchanged."""
    B = model_of(nn.Sequential(nn.Linear(32, 400)), rank=64, target_modules=["0"]).wrapped[0].lora_B
    A = LoraModel(nn.Sequential(nn.Linear(400, 32)), LoraConfig(rank=64), verbose=False).wrapped[0].lora_A
    assert B.abs().max() <= 400**-0.5
    assert B.std().item() == pytest.approx(A.std().item(), rel=0.02)


def test_peft_reads_plain_lora_and_we_read_it_again(make_tiny, tokens, randomised, tmp_path):
    base = make_tiny().double()
    plain, model = copy.deepcopy(base), model_of(base, target_modules=["q_proj", "embed"])
    randomised(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens), model.eval()(tokens), atol=1e-12, rtol=1e-11)
    back = LoraModel.from_pretrained(plain, tmp_path, verbose=False)
    assert back.configs["default"].variant == "lora_fb"
    assert torch.equal(back.eval()(tokens), model(tokens))


def test_a_start_is_refused(make_tiny):
    with pytest.raises(ValueError, match="lora_fb"):
        model_of(make_tiny(), start="pissa")
