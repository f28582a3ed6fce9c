"""What is trained, by our library and by PEFT, and how much of it there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_exp.backends import adapt
from lora_exp.config import Config, conf_folder
from lora_exp.schema import register, to_config

register()
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft


def config(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", list(overrides)))


def base(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder)


def smollm2_on_meta() -> torch.nn.Module:
    facts = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(facts)


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_smollm2_counts_are_those_of_peft(rank: int) -> None:
    mine = adapt(smollm2_on_meta(), config(f"rank={rank}"))
    theirs = peft.get_peft_model(smollm2_on_meta(), peft.LoraConfig(r=rank, target_modules="all-linear"))
    assert (mine.trainable, mine.total) == theirs.get_nb_trainable_parameters()
    assert mine.trainable == 305_280 * rank


@pytest.mark.parametrize(
    "overrides",
    [
        ["bias=none"],
        ["bias=all"],
        ["bias=lora_only"],
        ["targets=all-linear"],
        ["targets='.*[qv]_proj'"],
        ["dropout=0.1", "alpha=2r", "scaling=standard"],
    ],
)
def test_both_backends_train_as_much(tiny_llama: Path, overrides: list[str]) -> None:
    native, theirs = (adapt(base(tiny_llama), config(f"backend={name}", *overrides)) for name in ("native", "peft"))
    assert (native.trainable, native.total) == (theirs.trainable, theirs.total)
    assert sum(parameter.numel() for parameter in native.parameters) == native.trainable


def test_what_one_backend_saves_the_other_loads(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = torch.arange(3, 15)[None]
    for backend in ("native", "peft"):
        adapted = adapt(base(tiny_llama), config(f"backend={backend}", "rank=4"))
        with torch.no_grad():
            for parameter in adapted.parameters:
                parameter.normal_(std=0.1)
            expected = adapted.model(tokens).logits
        adapted.save(tmp_path / backend)
        reloaded = peft.PeftModel.from_pretrained(base(tiny_llama), str(tmp_path / backend))
        torch.testing.assert_close(reloaded(tokens).logits, expected, atol=1e-5, rtol=1e-5)


def saved(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_full_trains_everything_and_saves_a_model_that_loads(tiny_llama: Path, tmp_path: Path) -> None:
    adapted = adapt(base(tiny_llama), config("adapter=full"))
    assert adapted.trainable == adapted.total == sum(p.numel() for p in base(tiny_llama).parameters())
    adapted.save(tmp_path / "full")
    assert AutoConfig.from_pretrained(tmp_path / "full").hidden_size == 32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    for name, parameter in base(tiny_llama).named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)


def test_full_with_targets_trains_those_weights_alone(tiny_llama: Path, tmp_path: Path) -> None:
    adapted = adapt(base(tiny_llama), config("adapter=full", "targets=[v_proj]"))
    trained = [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad]
    assert trained == [f"model.layers.{i}.self_attn.v_proj.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    adapted.save(tmp_path / "part")
    assert set(saved(tmp_path / "part")) == set(trained)


def test_layers_that_training_bypasses_are_named(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    def after_a_step(targets: str) -> Any:
        model = base(tiny_llama)
        bypassed = model.model.layers[0].self_attn.v_proj
        # As Mamba's kernel does with out_proj: the weight is read, the layer never called.
        model.model.layers[0].self_attn.v_proj = Reader(bypassed)
        adapted = adapt(model, config(f"targets='{targets}'"))
        adapted.model(torch.arange(3, 15)[None]).logits.sum().backward()
        return adapted

    class Reader(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.inner.weight, self.inner.bias)

    after_a_step(r".*layers\.0\..*(q_proj|inner)").check_gradients()
    assert "1 adapted layers got no gradient in the first step: model.layers.0.self_attn.v_proj.inner" in caplog.text
