"""Stacked experts of a mixture through the harness: trained, planned, left out with a word, by either backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from lora_exp.backends import adapt
from lora_exp.config import AdapterConfig, Config, LayerConfig, ModelConfig, OptimizerConfig, ScalingConfig
from lora_exp.data.kinds.text import Text
from lora_exp.job import read_outcome
from lora_exp.plan.estimate import Planner

Cli = Callable[..., Any]
# PEFT 0.21 asks under a name that transformers 5.23 has changed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A random two-layer Mixtral with the tiny Llama's tokenizer, as a folder in hub layout."""
    folder = tmp_path_factory.mktemp("tiny_mixtral")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    facts = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(facts).save_pretrained(folder)
    return folder


def wish(folder: Path, layer: str = "experts", **changes: Any) -> Config:
    config = Config(
        layer=LayerConfig(layer, [layer]),
        adapter=AdapterConfig("lora", "lora"),
        scaling=ScalingConfig("rslora"),
        optimizer=OptimizerConfig("adamw"),
        model=ModelConfig(label="tiny", path=str(folder)),
        data=Text(label="text", path="x.txt", block_size=16),
        device="cpu",
        rank=2,
    )
    return Config(**(vars(config) | changes))


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_mixture_trains_and_its_adapter_loads_in_peft(
    cli: Cli, workplace: Path, tiny_overrides: list[str], tiny_mixtral: Path
) -> None:
    done = cli(
        *tiny_overrides, f"model.path={tiny_mixtral}", "layer=experts", "tracking=none", "train.steps=12",
        "train.eval_every=6", "optimizer.lr=0.02", "dropout=0.1",
    )  # fmt: skip
    assert done.code == 0, done.err
    (file,) = (workplace / "outputs" / "runs").rglob("adapter_config.json")
    assert json.loads(file.read_text())["target_parameters"] == ["down_proj", "gate_up_proj"]
    base, words = loaded(tiny_mixtral).eval(), torch.randint(3, 97, (2, 12))
    before = base(words).logits
    theirs = peft.PeftModel.from_pretrained(base, file.parent).eval()
    assert not torch.allclose(theirs(words).logits, before)
    outcome = read_outcome(file.parents[1])
    assert outcome.result.eval_loss < outcome.result.eval_loss_before - 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", ["experts", "linear", "all"])
def test_a_plan_counts_what_training_does(layer: str, dtype: str, tiny_mixtral: Path) -> None:
    wanted = wish(tiny_mixtral, layer)
    wanted.model.dtype = dtype
    plan, adapted = Planner(wanted).plan(), adapt(loaded(tiny_mixtral), wanted)
    assert (plan.trainable, plan.total) == (adapted.trainable, adapted.total)
    experts = [module for module in plan.modules if module.layer_type == "experts"]
    assert len(experts) == (0 if layer == "linear" else 4)
    trained, total = plan.by_layer_type["experts"]
    assert total - trained == 2 * 4 * 3 * 32 * 48
    assert trained == sum(module.trainable for module in experts)
    assert plan.flops_per_step > 0


def test_a_plan_of_experts_counts_their_products_by_the_experts_chosen(tiny_mixtral: Path) -> None:
    """Each token meets k of the E experts: twice as many chosen are twice the products with their weights."""
    flops = []
    for chosen in (1, 2, 3):
        facts = json.loads((tiny_mixtral / "config.json").read_text()) | {"num_experts_per_tok": chosen}
        wanted = wish(tiny_mixtral, "linear")
        wanted.model = ModelConfig(label="tiny", architecture=facts)
        flops.append(Planner(wanted).plan().flops_per_step)
    tokens = wanted.train.micro_batch_size * 16 * wanted.train.grad_accum_steps
    # Forward, and backward to the inputs alone, as the weights are frozen; two layers.
    assert flops[2] - flops[1] == flops[1] - flops[0] == 2 * 2 * 2 * tokens * 3 * 32 * 48


def test_task_plan_shows_them(cli: Cli, tiny_mixtral: Path) -> None:
    done = cli("task=plan", "model=hf", f"model.path={tiny_mixtral}", "layer=experts", "tracking=none", "device=cpu",
               "data.block_size=16")  # fmt: skip
    assert done.code == 0, done.err
    assert "model.layers.*.mlp.experts.gate_up_proj" in done.out


def test_what_is_left_out_is_said_once(
    cli: Cli, tiny_overrides: list[str], tiny_mixtral: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for task in (["task=plan", "plan.gpu_gib=2"], ["train.steps=1", "train.warmup_steps=0"]):
        caplog.clear()
        done = cli(*tiny_overrides, f"model.path={tiny_mixtral}", "tracking=none", *task)
        assert done.code == 0, done.err
        assert caplog.text.count("of a mixture's experts") + (done.out + done.err).count("of a mixture's experts") == 1


def test_a_target_of_another_layer_type_is_refused(tiny_mixtral: Path) -> None:
    with pytest.raises(ValueError, match=r"names model\.layers\.0\.mlp\.experts\.gate_up_proj, which is of type exp"):
        adapt(loaded(tiny_mixtral), wish(tiny_mixtral, "linear", targets=["gate_up_proj"]))


def test_single_weights_are_targets(tiny_mixtral: Path) -> None:
    adapted = adapt(loaded(tiny_mixtral), wish(tiny_mixtral, targets=["gate_up_proj"]))
    assert adapted.trainable == 2 * 4 * 2 * (32 + 96)


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_what_a_config_leaves_out_of_a_mixture_is_said(
    backend: str, tiny_mixtral: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapt(loaded(tiny_mixtral), wish(tiny_mixtral, "linear", backend=backend))
    assert "16 weights of a mixture's experts (down_proj, gate_up_proj: 36864 parameters in all)" in caplog.text
    assert "choose the layer type experts, or all" in caplog.text


@pytest.mark.parametrize("layer", ["experts", "all"])
def test_both_backends_train_as_many(layer: str, tiny_mixtral: Path) -> None:
    ours, theirs = (
        adapt(loaded(tiny_mixtral), wish(tiny_mixtral, layer, backend=backend)) for backend in ("native", "peft")
    )
    assert (ours.trainable, ours.total) == (theirs.trainable, theirs.total)


def test_dropout_is_refused_where_peft_refuses_it(tiny_mixtral: Path) -> None:
    with pytest.raises(ValueError, match=r"with dropout=0\.1: PEFT adds A and B to the experts' weights"):
        adapt(loaded(tiny_mixtral), wish(tiny_mixtral, backend="peft", dropout=0.1))
