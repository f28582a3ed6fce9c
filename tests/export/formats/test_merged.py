"""Merged exports of runs that trained something else than an adapter, or on something else than dense weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

Cli = Callable[..., Any]
Finished = Callable[..., Path]
Facts = Callable[[Path], dict[str, Any]]
TARGET = Path("outputs/exports/day-run-merged")


def exported(cli: Cli, run: Path, *more: str) -> str:
    done = cli("task=export", f"run={run}", "export=merged", "tracking=none", *more)
    assert done.code == 0, done.err
    return str(done.out)


def test_all_weights_that_were_trained(cli: Cli, finished: Finished, provenance: Facts) -> None:
    run = finished("adapter=full", "model.dtype=float32")
    exported(cli, run)
    assert provenance(TARGET)["verification"]["max_logit"] <= 1e-4
    trained, written = load_file(run / "adapter/model.safetensors"), load_file(TARGET / "model.safetensors")
    assert trained.keys() == written.keys()
    assert all(torch.equal(trained[name], written[name]) for name in trained)


def test_it_generates_with_a_cache_by_its_own_tokenizer(cli: Cli, finished: Finished) -> None:
    exported(cli, finished())
    model = AutoModelForCausalLM.from_pretrained(TARGET)
    assert model.config.use_cache is True
    assert GenerationConfig.from_pretrained(TARGET).eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokens = tokenizer("And the king", return_tensors="pt")["input_ids"]
    assert (
        model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > tokens.shape[1]
    )


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_quantised_base_is_dense_and_equal(
    bits: str, cli: Cli, finished: Finished, provenance: Facts, even_llama: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    run = finished(f"quantization={bits}", f"model.path={even_llama}")
    exported(cli, run, "export.dtype=float32")
    facts = provenance(TARGET)
    assert facts["verification"]["max_logit"] <= 1e-4
    assert facts["merging"]["survived"] == pytest.approx(1)
    assert {tensor.dtype for tensor in load_file(TARGET / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
def test_bits_again_say_what_survived(
    bits: str, cli: Cli, finished: Finished, provenance: Facts, even_llama: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    run = finished(f"model.path={even_llama}")
    exported(cli, run, f"export.quantise={bits}")
    facts = provenance(TARGET)
    survived = facts["quantising"]["survived"]
    assert facts["quantising"]["layers"] == 14
    assert (0.9 if bits == "int8" else 0.2) < survived < 1.6
    assert facts["verification"]["max_logit"] > 0
    model = AutoModelForCausalLM.from_pretrained(TARGET, device_map={"": "cpu"})
    assert type(model.model.layers[0].mlp.up_proj).__name__ == ("Linear8bitLt" if bits == "int8" else "Linear4bit")
    assert type(model.lm_head).__name__ == "Linear"
    assert not list(TARGET.glob(".*"))


def test_a_model_that_is_none_of_transformers_is_refused_plainly(cli: Cli) -> None:
    from lora_exp.config import Config, ExportConfig, ModelConfig
    from lora_exp.export.format import formats

    config = Config(model=ModelConfig(kind="efficientnet_lite", label="lite0"), export=ExportConfig(format="merged"))
    (problem,) = formats["merged"]().problems(config)
    assert "model=lite0 (efficientnet_lite) is none of its architectures: use export=peft" in problem
