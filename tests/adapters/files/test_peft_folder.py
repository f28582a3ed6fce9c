"""PEFT's folders, both ways: the same logits, strict keys, refusals with reasons."""

import copy
import json
import logging

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel

KINDS = {
    "llama": [["q_proj", "down_proj"], ["embed_tokens", "v_proj"], "all-linear", r".*layers\.1\..*_proj"],
    "gpt2": [["c_attn", "c_fc"], ["wte", "c_proj"]],
    "bert": [["query", "word_embeddings"]],
    "t5": [["q", "wo"]],
}
CASES = [(kind, targets) for kind, wishes in KINDS.items() for targets in wishes]


def logits(model, inputs):
    with torch.no_grad():
        result = model.eval()(**inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


def assert_both_ways(base, config, inputs, randomised, folder):
    """Ours -> PEFT -> ours, the same logits at each step; in float64, where order of addition is no excuse."""
    base = base.double()
    plain, ours = copy.deepcopy(base), LoraModel(base, config, verbose=False)
    randomised(ours)
    ours.save_pretrained(folder / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder / "ours")
    torch.testing.assert_close(logits(theirs, inputs), logits(ours, inputs), atol=1e-12, rtol=1e-11)
    theirs.save_pretrained(folder / "theirs")
    back = LoraModel.from_pretrained(plain, folder / "theirs", verbose=False)
    torch.testing.assert_close(logits(back, inputs), logits(ours, inputs), atol=0, rtol=0)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_transformers(kind, targets, dora, make_transformer, inputs_for, randomised, tmp_path):
    config = LoraConfig(rank=3, target_modules=targets, use_dora=dora, lora_alpha=5, lora_dropout=0.1)
    assert_both_ways(make_transformer(kind), config, inputs_for(kind), randomised, tmp_path)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_vision_with_biases_and_saved_head(bias, dora, vision, images, randomised, tmp_path):
    vision(images)  # its norm sees a batch first
    config = LoraConfig(
        rank=2, target_modules=["stem", "conv"], use_dora=dora, bias=bias, modules_to_save=["head", "norm"]
    )
    assert_both_ways(vision, config, {"x": images.double()}, randomised, tmp_path)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_shared_biases(bias, make_transformer, inputs_for, randomised, tmp_path):
    config = LoraConfig(rank=2, target_modules=["query"], bias=bias)
    assert_both_ways(make_transformer("bert"), config, inputs_for("bert"), randomised, tmp_path)


def test_patterns(tiny, tokens, randomised, tmp_path):
    config = LoraConfig(
        rank=4,
        rank_pattern={"layers.0.q_proj": 2},
        alpha_pattern={"v_proj": 3},
        modules_to_save=["lm_head"],
        layers_to_transform=[0],
        exclude_modules=r".*\.1\.v_proj",
    )
    assert_both_ways(tiny, config, {"tokens": tokens}, randomised, tmp_path)


def test_half_precision_base(tiny, tokens, randomised, tmp_path):
    config = LoraConfig(rank=4, modules_to_save=["lm_head"], bias="all")
    model = LoraModel(tiny.bfloat16(), config, verbose=False)
    assert {p.dtype for p in model.adapter_parameters().values()} == {torch.float32}
    randomised(model)
    plain = copy.deepcopy(model).merge_and_unload()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(plain(tokens), model(tokens), atol=0.1, rtol=0.1)
    assert model(tokens).dtype == torch.bfloat16


def saved(base, folder, **options):
    model = LoraModel(base, LoraConfig(rank=2, **options), verbose=False)
    model.save_pretrained(folder)
    return model


def test_the_folder(tiny, tmp_path):
    model = saved(tiny, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["peft_type"] == "LORA"
    assert model.base_sha256() in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_loading_is_strict(tiny, make_tiny, tmp_path):
    saved(tiny, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.layers.0.q_proj.lora_A.weight"

    def fails(changed, match):
        save_file(changed, path)
        with pytest.raises(ValueError, match=match):
            LoraModel.from_pretrained(make_tiny(), tmp_path, verbose=False)

    fails({k: v for k, v in tensors.items() if k != key}, "missing: .*layers.0.q_proj.lora_A")
    fails({**tensors, "base_model.model.other.lora_A.weight": torch.ones(2, 2)}, "unexpected: .*other")
    fails({**tensors, key: torch.ones(2, 3)}, r"\(2, 3\), not \(2, 16\)")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="cut short"):
        LoraModel.from_pretrained(make_tiny(), tmp_path, verbose=False)
    path.unlink()
    with pytest.raises(ValueError, match="not there"):
        LoraModel.from_pretrained(make_tiny(), tmp_path, verbose=False)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        LoraModel.from_pretrained(make_tiny(), tmp_path, verbose=False)


def test_another_base_is_said_once_or_refused(tiny, make_tiny, tmp_path, caplog):
    plain = copy.deepcopy(tiny)
    saved(tiny, tmp_path)
    with caplog.at_level(logging.WARNING):
        LoraModel.from_pretrained(plain, tmp_path, strict_base=True, verbose=False)
        assert not caplog.records
        LoraModel.from_pretrained(make_tiny(), tmp_path, verbose=False)
        assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="other base weights"):
        LoraModel.from_pretrained(make_tiny(), tmp_path, strict_base=True, verbose=False)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    ],
)
def test_what_peft_cannot_hold_is_refused(conv, reason, tmp_path):
    model = LoraModel(nn.Sequential(conv), LoraConfig(rank=2, layer_types=("conv2d",)), verbose=False)
    with pytest.raises(ValueError, match=f"{reason}.*save_model"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_what_we_do_not_have_is_refused(change, match, tiny, make_tiny, tmp_path):
    saved(tiny, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=match):
        LoraModel.from_pretrained(make_tiny(), tmp_path, verbose=False)
