"""A folder in the form of PEFT's method_comparison: read as it is, run by the harness, written in its form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
Cli = Callable[..., Any]
# As huggingface/peft has them at 5d602fd, but for the sizes.
DEFAULTS = {
    "model_id": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "max_seq_length": 768, "batch_size": 2,
    "batch_size_eval": 50, "max_steps": 4, "eval_steps": 2, "compile": False, "use_gc": False, "seed": 0,
    "grad_norm_clip": 1.0, "optimizer_type": "AdamW", "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine", "use_amp": False, "autocast_adapter_dtype": True, "attn_implementation": None,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
    "query_template": "Question: {query} Think step by step.\nAnswer:", "init_kv_cache_prefix": None,
}  # fmt: skip
OFT = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "block_share": False,
    "coft": False, "eps": 6e-05, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": False,
    "init_weights": True, "layers_pattern": None, "layers_to_transform": None, "module_dropout": 0.0,
    "modules_to_save": None, "oft_block_size": 0, "peft_type": "OFT", "r": 8, "rank_pattern": {}, "revision": None,
    "target_modules": ["q_proj", "v_proj"], "task_type": None,
}  # fmt: skip
IA3 = {
    "auto_mapping": None, "base_model_name_or_path": None, "exclude_modules": None, "fan_in_fan_out": False,
    "feedforward_modules": None, "inference_mode": False, "init_ia3_weights": True, "modules_to_save": None,
    "peft_type": "IA3", "revision": None, "target_modules": None, "task_type": None,
}  # fmt: skip


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    root = tmp_path / "suite"
    write(root / "default_training_params.json", DEFAULTS)
    write(root / "experiments/oft/llama-r8/adapter_config.json", OFT)
    write(root / "experiments/ia3/llama-lr_0.001+x/adapter_config.json", IA3)
    write(root / "experiments/ia3/llama-lr_0.001+x/training_params.json", {"optimizer_kwargs": {"lr": 1e-3}})
    write(root / "experiments/full-finetuning/lr/training_params.json", {"optimizer_kwargs": {"lr": 1e-5}})
    return root


def write(file: Path, facts: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts))


def here(tiny_overrides: list[str]) -> list[str]:
    """A model and data that are there; what trains is the suite's."""
    return [override for override in tiny_overrides if not override.startswith("train.")] + ["train.eval_blocks=4"]


def test_a_suite_runs_and_is_written_in_its_form(
    suite: Path, cli: Cli, tiny_overrides: list[str], tiny_llama: Path, workplace: Path, text_file: Path
) -> None:
    sweep = workplace / "sweep"
    (workplace / "other.txt").write_text(text_file.read_text()[::-1])
    done = cli(
        "-m", "+experiment=peft_suite", f"suite={suite}", *here(tiny_overrides), "tracking=none",
        "data.test_fraction=0.1", "data.forget=other.txt", f"hydra.sweep.dir={sweep}",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = {file.stem: json.loads(file.read_text()) for file in (sweep / "results").glob("*.json")}
    assert sorted(found) == ["full-finetuning--lr", "ia3--llama-lr_0.001+x", "oft--llama-r8"]
    lines = {name: each["run_info"]["train_config"]["optimizer_kwargs"] for name, each in found.items()}
    assert [(each["lr"], each["weight_decay"]) for _, each in sorted(lines.items())] == [
        (1e-5, 0.01), (1e-3, 0.01), (1e-4, 0.1),
    ]  # fmt: skip
    assert found["full-finetuning--lr"]["run_info"]["peft_config"] is None
    oft = found["oft--llama-r8"]
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        peft.OFTConfig(r=8, oft_block_size=0, target_modules=["q_proj", "v_proj"]),
    )
    counts = oft["train_info"]["num_trainable_params"], oft["train_info"]["num_total_params"]
    assert counts == theirs.get_nb_trainable_parameters()
    assert oft["run_info"]["peft_config"]["peft_type"] == "OFT"
    assert as_pefts_reader_takes_it(oft)["forgetting"] == pytest.approx(0, abs=1e-2)
    ia3 = json.loads((sweep / "1/result.json").read_text())
    assert ia3["values"]["suite_experiment"] == "ia3/llama-lr_0.001+x"
    assert (ia3["values"]["train.steps"], ia3["values"]["train.warmup_ratio"]) == (4, 0.1)


def as_pefts_reader_takes_it(row: dict[str, Any]) -> dict[str, Any]:
    """The fields that method_comparison/processing.py reads, of the types that it makes of them."""
    run, train, meta = row["run_info"], row["train_info"], row["meta_info"]
    last: dict[str, Any] = train["metrics"][-1]
    assert train["status"] == "success"
    for name in ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"):
        assert isinstance(train[name], int)
    assert isinstance(train["file_size"], int)
    for value in (run["total_time"], train["train_time"], last["train loss"]):
        assert float(value) > 0
    assert run["experiment_name"].count("/") == 1
    assert {"created_at", "peft_branch", "train_config"} <= run.keys()
    assert "model_id" in run["train_config"]
    packages = ("peft", "transformers", "datasets", "torch", "bitsandbytes")
    assert {f"{name}-version" for name in packages} <= meta["package_info"].keys()
    assert "system_info" in meta
    assert "test accuracy" in last
    assert (last["step"], last["train samples"], last["train total tokens"]) == (4, 8, 8 * 16)
    return last


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optimizer_type": "riemannian"}, "optimizer_type=riemannian is not here"),
        ({"optimizer_kwargs": {"lr": 1e-4, "reg": 1}}, "optimizer_kwargs has reg"),
        ({"use_amp": True}, "use_amp=true is not here"),
        ({"dtype": "int8"}, "dtype=int8 is a quantised base"),
    ],
)
def test_what_is_not_done_here_is_said_before_anything_runs(
    change: dict[str, Any], says: str, suite: Path, cli: Cli, tiny_overrides: list[str]
) -> None:
    write(suite / "experiments/oft/llama-r8/training_params.json", change)
    one = [f"suite={suite}", "suite_experiment=oft/llama-r8", *here(tiny_overrides), "tracking=none"]
    done = cli("+experiment=peft_suite", *one)
    assert done.code == 1
    assert f"suite_experiment=oft/llama-r8: {says}" in done.err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "suite is not set: add suite=FOLDER"),
        (["suite=nowhere"], "suite=nowhere has no experiments/METHOD/NAME/adapter_config.json"),
    ],
)
def test_a_suite_that_is_none(given: list[str], says: str, cli: Cli, tiny_overrides: list[str]) -> None:
    done = cli("-m", "+experiment=peft_suite", *given, *here(tiny_overrides), "tracking=none")
    assert done.code == 1
    assert says in done.err


def test_one_experiment_alone(suite: Path, cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    one = [f"suite={suite}", "suite_experiment=oft/llama-r8", *here(tiny_overrides), "tracking=none"]
    done = cli("+experiment=peft_suite", *one, f"hydra.run.dir={workplace / 'one'}", "train.steps=2")
    assert done.code == 0, done.err
    (file,) = (workplace / "one/results").glob("*.json")
    assert json.loads(file.read_text())["run_info"]["train_config"]["max_steps"] == 2
    done = cli("+experiment=peft_suite", f"suite={suite}", "suite_experiment=oft/none", *one[2:])
    assert done.code == 1
    assert "suite_experiment=oft/none is not in suite=" in done.err
