"""What a plan says, against published figures and its own parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.backends import adapt
from lora_exp.config import Config, QuantizationConfig, conf_folder
from lora_exp.models import checkpoint_layers
from lora_exp.models.unloaded import facts_of, meta_model
from lora_exp.plan.architecture import quantised_names
from lora_exp.plan.estimate import Plan, Planner
from lora_exp.plan.fit import fit
from lora_exp.plan.sizes import base_bytes, quantised_bytes
from lora_exp.schema import register, to_config
from lora_exp.training.objectives import causal_lm_losses

register()
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "llama32_3b": 3_212_749_824,
    "llama31_70b": 70_553_706_496,
    "mistral_7b": 7_241_732_096,
    "qwen25_3b": 3_085_938_688,
    "qwen3_8b": 8_190_735_360,
    "gemma2_2b": 2_614_341_888,
    "phi_15": 1_418_270_720,
    "opt_67b": 6_658_473_984,
    "gpt2": 124_439_808,
    "smollm2_135m": 134_515_008,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", ["task=plan", *overrides]))


def tiny(*overrides: str) -> Config:
    made = config("device=cpu", "model.dtype=float32", "data.block_size=32", "targets=all-linear", *overrides)
    made.model.label, made.model.architecture = "llama", dict(LLAMA)
    return made


def real_model(made: Config) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(facts_of(made.model), attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def batch(made: Config) -> dict[str, Tensor]:
    ids = torch.randint(0, 300, (made.train.micro_batch_size, made.data.block_size))
    return {"input_ids": ids, "labels": ids}


def meta(name: str, *overrides: str) -> Any:
    section = config(f"model={name}", *overrides).model
    return meta_model(facts_of(section), section, torch.bfloat16)


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_the_shipped_architectures_have_the_published_parameters(name: str, total: int) -> None:
    model = meta(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    section = config(f"model={name}").model
    ends = {key.rpartition(".")[2] for key, module in model.named_modules() if isinstance(module, nn.Module)}
    assert set(section.targets["linear"]) <= ends


def test_qdora_on_llama3_trains_what_its_authors_report() -> None:
    wanted = LoraConfig(rank=8, use_dora=True, target_modules=config("model=llama3_8b").model.targets["linear"])
    assert LoraModel(meta("llama3_8b"), wanted, verbose=False).parameter_counts()[0] == 22_347_776


def test_a_rank_of_llama31_8b_costs_what_is_published() -> None:
    modules = Planner(config("model=llama3_8b", "rank=1", "train.micro_batch_size=1")).plan().modules
    attention = sum(module.trainable for module in modules if ".self_attn." in module.name)
    assert (attention, sum(module.trainable for module in modules) - attention) == (851_968, 1_769_472)


@pytest.mark.parametrize(("name", "saved_gb"), [("llama2_7b", 0.30), ("llama2_13b", 0.59)])
def test_double_quantisation_saves_0_373_bit_a_weight(name: str, saved_gb: float) -> None:
    model, single = meta(name), QuantizationConfig("nf4")
    names, weights = quantised_names(model, single), dict(model.named_parameters())
    count = sum(weights[one].numel() for one in names)
    plain, double = (
        sum(base_bytes(weights, names, section).values())
        for section in (single, QuantizationConfig("nf4", double_quant=True))
    )
    assert (plain - double) * 8 / count == pytest.approx(0.373, abs=5e-4)
    assert (plain - double) / 1e9 == pytest.approx(saved_gb, abs=5e-3)


def test_quantised_sizes_are_logical_and_the_head_is_left_alone() -> None:
    weight = torch.empty(4096, 4096, device="meta")
    assert quantised_bytes(weight, QuantizationConfig("nf4"))[0] == 4096 * 4096 // 2
    assert quantised_bytes(weight, QuantizationConfig("int8")) == (4096 * 4096, 4 * 4096)
    plan = Planner(config("model=gpt2", "quantization=nf4", "train.micro_batch_size=1")).plan()
    assert plan.total - plan.trainable == PUBLISHED["gpt2"]
    assert plan.base_bytes["nf4"] == 12 * 12 * 768 * 768 // 2
    skipping = Planner(config("model=gpt2", "quantization=nf4", "quantization.skip_modules=[lm_head,c_fc]")).plan()
    assert skipping.base_bytes["nf4"] == 8 * 12 * 768 * 768 // 2


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_the_file_is_as_large_as_planned(backend: str, tmp_path: Any) -> None:
    made = tiny(f"backend={backend}")
    adapted = adapt(real_model(made), made)
    adapted.save(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert Planner(made).plan().adapter_file_bytes == pytest.approx(size, rel=0.02)


def test_other_backends_and_full_training_are_planned_too() -> None:
    native, peft = (Planner(tiny(f"backend={backend}")).plan() for backend in ("native", "peft"))
    assert (native.trainable, native.total) == (peft.trainable, peft.total)
    assert sum(module.trainable for module in peft.modules) == peft.trainable
    full = tiny("adapter=full")
    full.targets = None
    plan = Planner(full).plan()
    assert plan.trainable == plan.total
    assert (plan.adapter_bytes, plan.gradient_bytes) == (0, 4 * plan.total)
    full.device, full.model.dtype = "auto", "auto"
    autocast = Planner(full).plan()
    assert autocast.gradient_bytes == plan.gradient_bytes
    assert autocast.step_peak_bytes < plan.step_peak_bytes


def test_flops_are_those_of_the_products() -> None:
    made = tiny("train.micro_batch_size=2")
    plan = Planner(made).plan()
    tokens, head = 2 * 32, 300 * 64
    linear = plan.by_layer_type["linear"][1] - plan.trainable - head
    attention = (2 + 5) * 2 * 2 * 32 * 32 * 64 * 3  # 2 products forward and 5 backward, of T × T × hidden, 3 layers
    first = 2 * tokens * (64 * 64 + 2 * 64 * 32 + 3 * 64 * made.rank)  # no gradient leaves the first q, k, v
    last = 4 * 2 * 31 * head  # a row's last position predicts nothing
    expected = 4 * tokens * linear + last - first + 6 * tokens * plan.trainable + attention
    assert plan.flops_per_step == pytest.approx(expected, rel=1e-6)
    made.train.gradient_checkpointing = True
    again = Planner(made).plan().flops_per_step - plan.flops_per_step
    # The embedding's output requires no gradient then either: nothing more is passed on by the first q, k and v.
    assert again == pytest.approx(2 * tokens * (linear + plan.trainable) + attention * 2 / 7, rel=1e-6)
    made.train.gradient_checkpointing = False
    made.train.grad_accum_steps = 3
    assert Planner(made).plan().flops_per_step == 3 * plan.flops_per_step


def test_checkpointing_and_shorter_batches_need_less() -> None:
    plans: list[Plan] = []
    for rows, on in ((4, False), (2, False), (2, True)):
        made = tiny(f"train.micro_batch_size={rows}")
        made.train.gradient_checkpointing = on
        plans.append(Planner(made).plan())
    assert plans[0].total_bytes > plans[1].total_bytes > plans[2].total_bytes
    assert plans[0].activation_bytes == pytest.approx(2 * plans[1].activation_bytes, rel=0.1)
    assert plans[2].flops_per_step > plans[1].flops_per_step


def test_the_largest_batch_and_rank_fit_and_the_next_do_not() -> None:
    made = tiny("plan.reserve_gib=0", "plan.gpu_gib=0.02", "rank=2", "train.micro_batch_size=2")
    planner = Planner(made)
    found = fit(planner, planner.plan(), made)
    assert found is not None
    assert found.fits
    assert found.largest_rank
    budget = made.plan.gpu_gib * 2**30  # type: ignore[operator]
    assert planner.plan(rows=found.largest_batch).total_bytes <= budget
    assert planner.plan(rows=found.largest_batch + 1).total_bytes > budget
    assert planner.plan(rank=found.largest_rank).total_bytes <= budget


def test_nothing_fits_below_the_weights() -> None:
    made = config("model=llama31_70b", "plan.gpu_gib=24", "train.micro_batch_size=1", "data.block_size=8")
    planner = Planner(made)
    found = fit(planner, planner.plan(), made)
    assert found is not None
    assert (found.fits, found.largest_batch, found.largest_rank) == (False, 0, 0)


def test_gradients_are_equal_with_and_without_checkpointing() -> None:
    made = tiny()
    data, gradients = batch(made), []
    for on in (False, True):
        model = real_model(made)
        if on:
            checkpoint_layers(model)
        adapted = adapt(model, made)
        torch.manual_seed(1)
        for parameter in adapted.parameters:
            nn.init.normal_(parameter)
        adapted.model.train()
        causal_lm_losses(adapted.model, data).total.sum().backward()
        gradients.append([parameter.grad for parameter in adapted.parameters])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
