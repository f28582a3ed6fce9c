"""Changes taken apart are what merging adds; cut to a rank they are the best of it, and PEFT loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.adapters.inspection.changes import changes, unmeasured
from lora_exp.adapters.inspection.traversal import lora_layers
from lora_exp.adapters.shrinking import add_shrunk
from lora_exp.errors import UserError

KINDS = [("lora", {}, "default"), ("lora", {}, "pissa"), ("dora", {}, "default"), ("vera", {}, "default"),
         ("lora_fa", {}, "default"), ("lora", {"use_rslora": False, "lora_alpha": 3.0}, "default")]  # fmt: skip


def trained(base: nn.Module, variant: str, start: str = "default", **more: Any) -> LoraModel:
    torch.manual_seed(1)
    model = LoraModel(base, LoraConfig(rank=5, variant=variant, start=start, **more), verbose=False)
    with torch.no_grad():
        for parameter in model.adapter_parameters().values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval()
    return model


@pytest.mark.parametrize(("variant", "more", "start"), KINDS)
def test_changes_are_what_merging_adds_and_a_cut_is_its_best(
    variant: str, more: dict[str, Any], start: str, tiny_llama: Path, tmp_path: Path
) -> None:
    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_llama)

    model = trained(base(), variant, start, target_modules=["q_proj", "down_proj"], bias="lora_only", **more)
    found = {change.layer: change for change in changes(model.wrapped, "default")}
    add_shrunk(model, "default", "cut", 2, found)
    for name, layer in lora_layers(model.wrapped):
        delta = layer.adapter_named("default").merged(layer) - layer.dense_weight()
        change = found[name]
        torch.testing.assert_close(change.U * change.S @ change.V.T, delta, rtol=1e-4, atol=1e-5)
        U, S, Vt = torch.linalg.svd(delta)  # by Eckart and Young no matrix of rank 2 is nearer
        torch.testing.assert_close(change.S, S[: len(change.S)], rtol=1e-4, atol=1e-4)
        best = U[:, :2] * S[:2] @ Vt[:2]
        torch.testing.assert_close(layer.delta_weight("cut"), best, rtol=1e-3, atol=1e-4)
    tokens = torch.arange(3, 15)[None]
    own = model(tokens).logits
    add_shrunk(model, "default", "whole", 32, found)
    model.set_adapter("whole")
    torch.testing.assert_close(model(tokens).logits, own, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path, "cut")
    model.set_adapter("cut")
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-4)


class Mixed(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.look, self.spread = nn.Embedding(11, 8), nn.Conv1d(8, 6, 3, groups=groups)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.spread(self.look(tokens).mT)
        return out


def test_embeddings_and_convolutions_are_cut_too() -> None:
    model = trained(Mixed(1), "lora", layer_types=("all",))
    found = {change.layer: change for change in changes(model.wrapped, "default")}
    assert set(found) == {"look", "spread"}
    tokens = torch.arange(11)[None]
    own = model(tokens)
    add_shrunk(model, "default", "whole", 6, found)
    model.set_adapter("whole")
    torch.testing.assert_close(model(tokens), own, rtol=1e-3, atol=1e-4)


def test_a_weight_of_many_matrices_is_refused() -> None:
    torch.manual_seed(0)
    model = LoraModel(Mixed(2), LoraConfig(rank=4, layer_types=("all",)), verbose=False)
    assert unmeasured(model.wrapped, "default") == ["spread"]
    with pytest.raises(UserError, match="spread has many matrices in one weight"):
        add_shrunk(model, "default", "cut", 2, {})
    assert list(model.configs) == ["default"]
