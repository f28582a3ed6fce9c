"""The olora start against PEFT's, which takes the same product off the base itself."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from lora_exp.adapters import LoraConfig, LoraModel

TARGETS = ["q_proj", "v_proj"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pair(base, rslora, **options):
    asked = peft.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=8, use_rslora=rslora, init_lora_weights="olora")
    theirs = peft.get_peft_model(copy.deepcopy(base), asked)
    config = LoraConfig(rank=4, lora_alpha=8, target_modules=TARGETS, use_rslora=rslora, start="olora", **options)
    return LoraModel(base, config, verbose=False), theirs


def losses(model, parameters, tokens):
    found, optimizer = [], torch.optim.SGD(parameters, 0.05)
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("rslora", [True, False], ids=["rslora", "standard"])
def test_the_product_and_training_are_those_of_peft(tiny, tokens, rslora):
    ours, theirs = pair(tiny, rslora)
    for name, layer in ours.wrapped.named_modules():
        if name.endswith(tuple(TARGETS)):
            other = theirs.base_model.model.get_submodule(name)
            product = other.lora_B["default"].weight @ other.lora_A["default"].weight
            torch.testing.assert_close((layer.lora_A @ layer.lora_B).T, product, **CLOSE)
    # Signs of directions are anybody's choice; losses of plain gradient steps do not depend on them.
    mine = losses(ours, ours.adapter_parameters().values(), tokens)
    torch.testing.assert_close(
        mine, losses(theirs, [p for p in theirs.parameters() if p.requires_grad], tokens), **CLOSE
    )
    assert mine[-1] < mine[0]


def test_the_folder_is_what_pefts_conversion_writes(tiny, tokens, tmp_path):
    untouched = copy.deepcopy(tiny)
    ours, theirs = pair(tiny, True)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    losses(ours, ours.adapter_parameters().values(), tokens)
    losses(theirs, [p for p in theirs.parameters() if p.requires_grad], tokens)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    configs = [peft.LoraConfig.from_pretrained(tmp_path / one) for one in ("ours", "theirs")]
    assert [c.r for c in configs] == [8, 8]
    assert configs[0].lora_alpha == pytest.approx(configs[1].lora_alpha)
    loaded = [peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / one) for one in ("ours", "theirs")]
    torch.testing.assert_close(loaded[0](tokens), ours(tokens), **CLOSE)
    torch.testing.assert_close(loaded[1](tokens), ours(tokens), **CLOSE)
