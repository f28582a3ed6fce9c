"""The orthogonal start against PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.errors import UserError


def test_the_factors_are_those_of_peft():
    base = nn.Sequential(nn.Linear(24, 16))
    model = peft.get_peft_model(nn.Sequential(nn.Linear(24, 16)), peft.LoraConfig(target_modules=["0"], r=4))
    layer = model.base_model.model[0]
    torch.manual_seed(7)
    layer.orthogonal_init("default")
    torch.manual_seed(7)
    ours = LoraModel(base, LoraConfig(rank=4, target_modules=["0"], start="orthogonal"), verbose=False).wrapped[0]
    torch.testing.assert_close(ours.lora_A.T, layer.lora_A["default"].weight)
    torch.testing.assert_close(ours.lora_B.T, layer.lora_B["default"].weight)
    assert ours.lora_A.any()
    assert ours.lora_B.any()
    assert ours.delta_weight().abs().max() < 1e-6


def test_an_odd_rank_is_refused():
    with pytest.raises(UserError, match="start='orthogonal' is not for 0: rank=3 is odd"):
        LoraModel(nn.Sequential(nn.Linear(8, 8)), LoraConfig(rank=3, start="orthogonal", target_modules=["0"]))
