"""Variants of which one factor never trains, against PEFT's LoRA with that factor frozen by hand."""

import pytest
import torch

from lora_exp.adapters import LoraConfig, LoraModel


@pytest.mark.parametrize(("variant", "frozen"), [("lora_fa", "lora_A"), ("lora_fb", "lora_B")])
def test_steps_are_those_of_peft(variant, frozen, make_tiny, tokens, oracle):
    base = make_tiny()
    twin = oracle.twin(base, r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8.0, use_rslora=True)
    ours = LoraModel(base, LoraConfig(rank=4, variant=variant), verbose=False)
    theirs = dict(twin.base_model.model.named_modules())
    for name, value in ours.adapter_tensors().items():
        layer, _, what = name.rpartition(".")
        getattr(theirs[layer], what)["default"].weight.data.copy_(value.T)
    for name, value in twin.named_parameters():
        value.requires_grad_(value.requires_grad and frozen not in name)
    assert ours.parameter_counts() == twin.get_nb_trainable_parameters()
    losses = []
    for model, values in ((ours, ours.adapter_parameters().values()), (twin, twin.parameters())):
        optimizer = torch.optim.AdamW([value for value in values if value.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(tokens).log_softmax(-1)[..., 0].mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
