"""Merged models in plain transformers against the adapted ones, in float32: whatever was adapted, and how."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from lora_exp.adapters.starts.registry import start_names
from lora_exp.adapters.variants.registry import variant_names
from lora_exp.errors import UserError
from lora_exp.export.merging import cast_parameters, merged_model, save_plain, stored_dtype

CLOSE = 1e-4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WAYS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LINEAR},
    "embedding": {"target_modules": ["embed_tokens"]},
    "all": {"target_modules": [*LINEAR, "embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both sides": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora on all": {"target_modules": [*LINEAR, "embed_tokens"], "variant": "dora"},
    "biases": {"target_modules": LINEAR, "bias": "all"},
    "biases of adapted": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rslora": {"target_modules": LINEAR, "use_rslora": True, "lora_alpha": 32},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"]},
    "bert": {"target_modules": ["query", "value", "dense", "word_embeddings", "decoder"], "bias": "all"},
    "bert classifier": {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    "t5": {"target_modules": ["q", "v", "wi", "wo", "shared"]},
    "mixtral": {"target_modules": ["q_proj", "gate_up_proj", "down_proj"]},
    "resnet": {"target_modules": ["convolution"]},
}


def read_by_transformers(folder: Path) -> torch.nn.Module:
    """As somebody else would, by what the folder says alone."""
    facts = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, facts.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def difference(model: Any, tokens: torch.Tensor, answers: Callable[..., torch.Tensor], folder: Path) -> float:
    """Between an adapted model and what transformers loads of its folder; the folder is written here."""
    expected = answers(model, tokens)
    with model.disable_adapter():
        assert (answers(model, tokens) - expected).abs().max() > 1e-2  # else there is nothing to see
    save_plain(merged_model(model, "default", torch.float32).model, folder, 5.0)
    return float((answers(read_by_transformers(folder), tokens) - expected).abs().max())


@pytest.mark.parametrize("kind", ["llama", "tied llama"])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_adapt(
    kind: str, way: str, model_of: Any, inputs_for: Any, adapted: Any, answers: Any, tmp_path: Path
) -> None:
    model = adapted(model_of(kind), **WAYS[way])
    assert difference(model, inputs_for(kind), answers, tmp_path) <= CLOSE
    tied = transformers.AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    touches = way in ("embedding", "all", "head", "both sides", "dora on all", "saved head")
    assert tied == (kind == "tied llama" and not touches)


def taken(model_of: Any, adapted: Any) -> set[tuple[str, str]]:
    """The pairs that the library does not refuse by a message."""
    found = set()
    for variant, start in itertools.product(variant_names(), start_names()):
        with contextlib.suppress(UserError):
            adapted(model_of("llama"), target_modules=["q_proj"], variant=variant, start=start)
            found.add((variant, start))
    assert {name for name, _ in found} == set(variant_names())
    return found


@pytest.mark.parametrize("variant", variant_names())
@pytest.mark.parametrize("start", start_names())
def test_each_variant_and_start(
    variant: str, start: str, model_of: Any, inputs_for: Any, adapted: Any, answers: Any, tmp_path: Path
) -> None:
    if start == "loftq":
        pytest.skip("has quantised bases alone: below")
    if (variant, start) not in taken(model_of, adapted):
        pytest.skip("the library refuses the two together")
    model = adapted(model_of("llama"), target_modules=["q_proj", "up_proj"], variant=variant, start=start)
    assert difference(model, inputs_for("llama"), answers, tmp_path) <= CLOSE


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_architecture(
    kind: str, model_of: Any, inputs_for: Any, adapted: Any, answers: Any, tmp_path: Path
) -> None:
    model = adapted(model_of(kind), **FAMILIES[kind])
    assert difference(model, inputs_for(kind), answers, tmp_path) <= CLOSE


def test_names_of_classes_stay(model_of: Any, inputs_for: Any, adapted: Any, answers: Any, tmp_path: Path) -> None:
    model = adapted(model_of("bert classifier"), **FAMILIES["bert classifier"])
    save_plain(merged_model(model, "default", torch.float32).model, tmp_path, 5.0)
    pipe = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert pipe.config.id2label == {0: "no", 1: "yes", 2: "maybe"}


def test_large_models_are_several_files(model_of: Any, adapted: Any, tmp_path: Path) -> None:
    model = adapted(model_of("llama"), target_modules=LINEAR)
    save_plain(merged_model(model, "default", torch.float32).model, tmp_path, 2e-5)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert all((tmp_path / name).stat().st_size < 4e4 for name in files)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_stored_and_what_rounding_took_is_said(
    dtype: torch.dtype, model_of: Any, adapted: Any, tmp_path: Path
) -> None:
    model = adapted(model_of("tied llama"), target_modules=["q_proj"])
    base = model.wrapped.model.layers[0].self_attn.q_proj.weight.detach().clone()
    delta = model.wrapped.model.layers[0].self_attn.q_proj.delta_weight().detach()
    found = merged_model(model, "default", dtype)
    save_plain(found.model, tmp_path, 5.0)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118
        stored = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
    torch.testing.assert_close(stored, (base + delta).to(dtype), rtol=0, atol=0)
    assert transformers.AutoConfig.from_pretrained(tmp_path).dtype == dtype
    assert stored_dtype(sorted(tmp_path.glob("*.safetensors"))) == dtype
    assert found.rounding.layers == 2
    assert 0 < found.rounding.relative_error < 0.1
    assert found.rounding.survived == pytest.approx(1, abs=0.01)


def test_what_a_model_must_have_in_float32_stays_so(model_of: Any) -> None:
    model = model_of("t5")
    cast_parameters(model, torch.float16)
    assert {p.dtype for name, p in model.named_parameters() if ".wo." in name} == {torch.float32}
    assert model.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.float16


@pytest.mark.parametrize("way", ["linear", "all", "dora on all", "biases"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bases_become_dense_ones(
    kind: str, way: str, even_llama: Path, adapted: Any, answers: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from lora_exp.config import ModelConfig, QuantizationConfig
    from lora_exp.machine.place import Place
    from lora_exp.models import Source, load_base

    place, section = Place(torch.device("cpu"), torch.float32), ModelConfig(label="even", path=str(even_llama))
    base = load_base(Source(str(even_llama)), section, place, None, QuantizationConfig(kind))
    model = adapted(base, **WAYS[way])
    assert difference(model, torch.randint(3, 300, (3, 12)), answers, tmp_path) <= CLOSE
    assert not hasattr(transformers.AutoConfig.from_pretrained(tmp_path), "quantization_config")
