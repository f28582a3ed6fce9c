"""LoftQ on bases that stay as they were quantised."""

from __future__ import annotations

import copy
import logging

import peft
import pytest
import torch
from torch import nn

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says so where it lacks an optional kernel
bnb = pytest.importorskip("bitsandbytes")

from lora_exp.adapters import Given, LoraConfig, LoraModel  # noqa: E402
from lora_exp.adapters.inspection.input_scales import input_scales  # noqa: E402
from lora_exp.adapters.numerics import packed_weights  # noqa: E402
from lora_exp.errors import UserError  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 2e-6}
BOTH = pytest.mark.parametrize("variant", ["lora", "dora"])


class Net(nn.Module):
    """Two quantised layers and one that is not."""

    def __init__(self, kind: str = "nf4") -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 5)
        self.dense = {name: getattr(self, name).weight.detach().clone() for name in ("up", "down")}
        for name in self.dense:
            setattr(self, name, quantised(getattr(self, name), kind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.down(torch.relu(self.up(x)))))


def quantised(layer: nn.Linear, kind: str) -> nn.Module:
    shape = layer.in_features, layer.out_features
    made = (
        bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        if kind == "int8"
        else bnb.nn.Linear4bit(*shape, quant_type=kind)
    )
    made.load_state_dict(layer.state_dict(), strict=False)
    return made.requires_grad_(False).to("cpu")


def adapted(net: Net, variant: str = "lora", dense=None, **more) -> LoraModel:
    config = {"rank": 8, "target_modules": ["up", "down"], "start_options": {"iterations": None}, **more}
    made = LoraConfig(start="loftq", variant=variant, **config)
    return LoraModel(net, made, verbose=False, given=Given(net.dense if dense is None else dense))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_product_is_the_best_of_its_rank(kind):
    """Eckart-Young: the error that is left is that of the singular values that are left."""
    model = adapted(Net(kind))
    for name, dense in model.wrapped.dense.items():
        layer = getattr(model.wrapped, name)
        lost = dense - layer.dense_weight()
        left = torch.linalg.svdvals(lost)[8:].square().sum().sqrt()
        torch.testing.assert_close((lost - layer.delta_weight()).norm(), left, **CLOSE)
        assert left < lost.norm()


def test_the_factors_are_those_of_peft():
    model = adapted(Net())
    for name, dense in model.wrapped.dense.items():
        layer = getattr(model.wrapped, name)
        theirs = peft.utils.loftq_utils._low_rank_decomposition(dense - layer.dense_weight(), reduced_rank=8)
        torch.testing.assert_close(layer.delta_weight(), theirs["L"] @ theirs["R"], rtol=1e-3, atol=1e-5)


@BOTH
def test_the_start_is_nearer_to_the_unquantised_layer_and_the_base_stays(variant):
    torch.manual_seed(1)
    net = Net()
    plain = nn.Linear(64, 128)
    plain.weight.data.copy_(net.dense["up"])
    plain.bias.data.copy_(net.up.bias)
    x, packed = torch.randn(50, 64), net.up.weight.data.clone()
    model = adapted(net, variant, rank=32)
    with model.disable_adapter():
        quantised_out = model.wrapped.up(x)
    started = model.wrapped.up(x)
    assert (started - plain(x)).norm() < 0.6 * (quantised_out - plain(x)).norm()
    assert torch.equal(model.wrapped.up.weight.data, packed)


@BOTH
def test_a_folder_loads_in_peft_onto_the_quantised_base_and_here_without_dense_weights(variant, tmp_path):
    net = Net()
    packed_weights.keep_trainable(net)  # no repacking for inference in bfloat16
    untouched, x = copy.deepcopy(net), torch.randn(9, 64)
    model = adapted(net, variant)
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        for parameter in model.adapter_parameters().values():
            parameter.data.sub_(1e-2 * parameter.grad)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)
    again = LoraModel.from_pretrained(untouched, tmp_path, verbose=False)
    assert again.configs["default"].start == "loftq"
    assert torch.equal(again(x), model(x))


def test_dense_weights_may_be_read_one_at_a_time():
    net, asked = Net(), []

    def read(name):
        asked.append(name)
        return net.dense[name].to(torch.bfloat16)

    adapted(net, dense=read, target_modules=["up", "down", "head"], rank=4)
    assert asked == ["up", "down"]  # the head has lost nothing
    assert net.head.lora_A.any()
    assert not net.head.lora_B.any()


def test_what_is_missing_is_said():
    with pytest.raises(UserError, match=r"asks for dense_weights; pass given=Given\(dense_weights="):
        LoraModel(Net(), LoraConfig(start="loftq", target_modules=["up"]))
    with pytest.raises(UserError, match="dense_weights has nothing for down"):
        adapted(net := Net(), dense={"up": net.dense["up"]})
    with pytest.raises(UserError, match=r"dense_weights gave \(3, 3\) for up, where it must be \(128, 64\)"):
        adapted(Net(), dense=lambda name: torch.zeros(3, 3))
    with pytest.raises(UserError, match="no adapted layer is quantised"):
        LoraModel(nn.Sequential(nn.Linear(8, 8)), LoraConfig(rank=2, start="loftq", target_modules=["0"]))
    assert type(net.up) is bnb.nn.Linear4bit
    assert not net.up.__dict__.get("route")


def test_weighed_by_its_inputs_the_outputs_error_is_the_least():
    torch.manual_seed(2)
    net, x = Net(), torch.randn(200, 64) * torch.logspace(-2, 1, 64)
    scales = input_scales({"up": net.up}, lambda: net(x))
    torch.testing.assert_close(scales["up"], x.square().mean(0).sqrt())
    wanted, errors = x @ net.dense["up"].T, {}
    for rows in (0, 1):
        options = {"iterations": None, "rows": rows}
        config = LoraConfig(rank=8, target_modules=["up"], start="loftq", start_options=options)
        layer = LoraModel(copy.deepcopy(net), config, verbose=False, given=Given(net.dense, scales)).wrapped.up
        errors[rows] = (x @ (layer.dense_weight() + layer.delta_weight()).T - wanted).norm()
        error = net.dense["up"] - layer.dense_weight()
        assert errors[rows] < (x @ error.T).norm()
    assert errors[1] < 0.7 * errors[0]
    left = torch.linalg.svdvals(error * scales["up"])[8:].square().sum().sqrt()
    torch.testing.assert_close(((error - layer.delta_weight()) * scales["up"]).norm(), left, **CLOSE)
    with pytest.raises(UserError, match="asks for input_scales"):
        adapted(Net(), start_options={"rows": 4})
    with pytest.raises(UserError, match="rows=-1 must be a whole number of rows"):
        adapted(Net(), start_options={"rows": -1})
