"""Stacked experts against PEFT's `target_parameters`: outputs, gradients, merged weights, files both ways."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_exp.adapters import LoraConfig, LoraModel

BOTH = ["gate_up_proj", "down_proj"]
KINDS = ("mixtral", "qwen3_moe", "gpt_oss")

pytestmark = pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")


@pytest.fixture
def words() -> torch.Tensor:
    return torch.randint(1, 29, (4, 6))


def logits(model, words) -> torch.Tensor:
    return model(words).logits


def twin_of(base, **options):
    asked = {"r": 3, "target_modules": [], "target_parameters": BOTH, "use_rslora": True, "lora_alpha": 8}
    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{**asked, **options}))


def wrappers(twin) -> dict[str, torch.nn.Module]:
    """PEFT's wrapper of each parameter, by the parameter's name."""
    found = {}
    for name, module in twin.base_model.model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            owner = name.replace(".base_layer", "")
            found[f"{owner}.{module.parameter_name}"] = module
    return found


def as_theirs(side: str, value: torch.Tensor) -> torch.Tensor:
    """A (E, in, r) as (E r, in); B (E, r, out) as (out, r E): by hand, independent of our file code."""
    if side == "lora_A":
        return torch.cat([one.T for one in value])
    return value.permute(2, 1, 0).reshape(value.shape[2], -1)


def copy_over(model, twin) -> None:
    theirs = wrappers(twin)
    with torch.no_grad():
        for key, value in model.adapter_parameters().items():
            name, _, side = key.rpartition(".")
            getattr(theirs[name], side)["default"].weight.copy_(as_theirs(side, value))


@pytest.mark.parametrize("targets", [BOTH, ["gate_up_proj"], ["down_proj"]], ids=["both", "up", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same(kind, targets, words, mixture, adapted):
    base = mixture(kind)
    model = adapted(mixture(kind), target_modules=targets)
    twin = twin_of(base, target_parameters=targets)
    copy_over(model, twin)
    assert model.parameter_counts() == twin.get_nb_trainable_parameters()
    mine, theirs = logits(model, words), logits(twin, words)
    torch.testing.assert_close(mine, theirs)
    mine.square().mean().backward()
    theirs.square().mean().backward()
    found = wrappers(twin)
    for key, value in model.adapter_parameters().items():
        name, _, side = key.rpartition(".")
        grad = getattr(found[name], side)["default"].weight.grad
        torch.testing.assert_close(as_theirs(side, value.grad), grad, msg=key)
    ours, other = model.merge_and_unload().state_dict(), twin.merge_and_unload().state_dict()
    assert set(ours) == set(other)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, other[name], msg=name)


@pytest.mark.parametrize(
    "targets",
    [BOTH, ["gate_up_proj"], ["down_proj", "q_proj"], ["layers.1.mlp.experts.gate_up_proj", "layers.0.mlp.experts"]],
    ids=["both", "up", "down and q", "one each"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_we_write(kind, targets, words, tmp_path, mixture, adapted):
    model = adapted(mixture(kind), target_modules=targets, layer_types=["experts"], lora_dropout=0.1)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(mixture(kind), tmp_path)
    torch.testing.assert_close(logits(theirs.eval(), words), logits(model, words), rtol=1e-6, atol=1e-7)
    again = LoraModel.from_pretrained(mixture(kind), tmp_path, verbose=False).eval()
    torch.testing.assert_close(logits(again, words), logits(model, words), rtol=1e-6, atol=1e-7)
    assert set(again.adapter_parameters()) == set(model.adapter_parameters())
    assert again.configs["default"].lora_dropout == 0.1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_parameters": ["gate_up_proj"], "target_modules": ["q_proj", "v_proj"]},
        {"target_parameters": ["experts.down_proj"], "target_modules": r".*\.q_proj", "use_rslora": False},
        {"target_parameters": ["model.layers.1.mlp.experts.down_proj"]},
        {"rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    ],
    ids=["both", "with layers", "with an expression", "one", "patterns"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_we_read_what_peft_writes(kind, options, words, tmp_path, mixture):
    torch.manual_seed(1)
    theirs = twin_of(mixture(kind), **options, init_lora_weights=False).eval()
    theirs.save_pretrained(tmp_path)
    model = LoraModel.from_pretrained(mixture(kind), tmp_path, verbose=False).eval()
    torch.testing.assert_close(logits(model, words), logits(theirs, words), rtol=1e-6, atol=1e-7)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_is_no_stack_is_refused_by_name(tmp_path, mixture):
    twin_of(mixture(), target_parameters=["q_proj.weight"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target_parameters name model\.layers\.0\.self_attn\.q_proj\.weight"):
        LoraModel.from_pretrained(mixture(), tmp_path)


def test_a_file_of_another_rank_is_refused(tmp_path, mixture, adapted):
    adapted(mixture()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 5}))
    with pytest.raises(ValueError, match=r"experts\.\w+ of rank 3, where adapter_config.json asks for 5"):
        LoraModel.from_pretrained(mixture(), tmp_path)


def test_adapters_with_other_targets_are_files_of_their_own(randomised, words, tmp_path, mixture, adapted):
    """PEFT's names follow from which parameters one adapter has; ours are the same beside another adapter."""
    model = adapted(mixture())
    model.add_adapter("b", LoraConfig(rank=2, target_modules=["gate_up_proj"]))
    randomised(model, "b")
    model.save_pretrained(tmp_path, "b")
    model.set_adapter("b")
    theirs = peft.PeftModel.from_pretrained(mixture(), tmp_path)
    torch.testing.assert_close(logits(theirs.eval(), words), logits(model, words), rtol=1e-6, atol=1e-7)
