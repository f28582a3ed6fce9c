"""`adapter=peft_method`: PEFT's own configs, counts, losses and files, and one message for what a method cannot do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

from lora_exp.backends import Origin, adapt
from lora_exp.checks import check
from lora_exp.config import Config, conf_folder
from lora_exp.errors import UserError
from lora_exp.schema import register, to_config
from lora_exp.training.objectives import causal_lm_losses

register()
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
Cli = Callable[..., Any]
LAYERS = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "OFT": {"r": 8, "oft_block_size": 0},
    "IA3": {},
    "VERA": {"r": 16},
    "LOHA": {"r": 4},
    "MISS": {"r": 4},
    "C3A": {"block_size": 16},
    "LOKR": {"r": 4},
    "FOURIERFT": {"n_frequency": 40},
}
CLASSES = {str(key.value): kind for key, kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def config(method: str | None, options: dict[str, Any], *overrides: str) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        named = [f"adapter.method={method}"] if method else []
        set_options = [
            f"adapter.options.{name}={json.dumps(value).replace(' ', '')}" for name, value in options.items()
        ]
        composed = compose("config", ["backend=peft", "adapter=peft_method", *named, *set_options, *overrides])
    return to_config(composed)


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("method", METHODS)
def test_counts_and_files_are_those_of_peft(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    options = METHODS[method]
    adapted = adapt(base(tiny_llama), config(method, options, f"targets=[{','.join(LAYERS)}]"))
    theirs = peft.get_peft_model(base(tiny_llama), CLASSES[method](target_modules=LAYERS, **options))
    assert (adapted.trainable, adapted.total) == theirs.get_nb_trainable_parameters()
    assert sum(parameter.numel() for parameter in adapted.parameters) == adapted.trainable > 0
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        for parameter in adapted.parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.model.eval()
        changed = adapted.model(input_ids=tokens).logits
    adapted.save(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(base(tiny_llama), str(tmp_path)).eval()
    torch.testing.assert_close(reloaded(input_ids=tokens).logits, changed, rtol=1e-4, atol=1e-5)
    with adapted.without():
        torch.testing.assert_close(adapted.model(input_ids=tokens).logits, base(tiny_llama)(tokens).logits)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_virtual_tokens_predict_nothing(method: str, tiny_llama: Path) -> None:
    adapted = adapt(base(tiny_llama), config(method, {"num_virtual_tokens": 3}))
    adapted.model.eval()
    tokens = torch.randint(3, 300, (2, 10))
    ours = causal_lm_losses(adapted.model, {"input_ids": tokens, "labels": tokens})
    others = tokens.index_fill(1, torch.tensor([0]), -100)  # PEFT has virtual tokens predict the row's first one
    theirs = adapted.model(input_ids=tokens, labels=others).loss
    torch.testing.assert_close(ours.total.sum() / ours.count.sum(), theirs)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft, of a Llama's norms
def test_without_targets_a_method_takes_what_the_other_arms_have_or_is_made_for(tiny_llama: Path) -> None:
    given = ["model=hf", f"model.path={tiny_llama}"]
    linear = adapt(base(tiny_llama), config("MISS", {"r": 4}, *given))
    theirs = peft.get_peft_model(base(tiny_llama), peft.MissConfig(r=4, target_modules="all-linear"))
    assert linear.trainable == theirs.get_nb_trainable_parameters()[0]
    norms = adapt(base(tiny_llama), config("LN_TUNING", {}, *given))
    assert norms.trainable == 5 * 32


def test_a_file_of_pefts_names_its_own_targets(tiny_llama: Path, tmp_path: Path) -> None:
    peft.LoHaConfig(r=3, target_modules=["o_proj"]).save_pretrained(tmp_path)
    made = config(None, {}, f"adapter.config={tmp_path}", "adapter.options.alpha=6")
    assert (made.adapter.name, made.adapter.method, made.adapter.config) == ("loha", "LOHA", None)
    adapted = adapt(base(tiny_llama), made)
    theirs = peft.get_peft_model(base(tiny_llama), peft.LoHaConfig(r=3, target_modules=["o_proj"]))
    assert (adapted.trainable, adapted.total) == theirs.get_nb_trainable_parameters()
    assert adapted.model.peft_config["default"].alpha == 6  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("method", "options", "overrides", "says"),
    [
        (None, {}, [], "names no method: add adapter.method=OFT"),
        ("OFFT", {}, [], "adapter.method=OFFT is none of PEFT's: did you mean"),
        ("IA3", {"rr": 3}, [], "rr is no option of PEFT's IA3"),
        ("OFT", {"r": 8}, [], "refuses its options: You can only specify either r"),
        ("LORA", {"init_lora_weights": "eva"}, [], "init_lora_weights=eva looks at data before training"),
        ("LORA", {"init_lora_weights": "corda"}, [], "init_lora_weights=corda looks at data before training"),
        ("LORA", {"init_lora_weights": "lora_ga"}, [], "init_lora_weights=lora_ga looks at data before training"),
        ("PREFIX_TUNING", {}, [], "add adapter.options.num_virtual_tokens=20"),
        ("IA3", {}, ["rank=4"], "rank=4 is not an option of PEFT's IA3"),
        ("IA3", {}, ["optimizer.lora_plus_ratio=4"], "is for a factor B, which adapter=ia3 has not"),
        ("IA3", {}, ["start=pissa"], "start=pissa has no meaning with adapter=ia3"),
        ("IA3", {}, ["backend=native"], "or backend=peft for a method of PEFT's"),
    ],
)
def test_what_a_config_shows_is_said_at_once(
    method: str | None, options: dict[str, Any], overrides: list[str], says: str, tiny_llama: Path, text_file: Path
) -> None:
    given = ["model=hf", f"model.path={tiny_llama}", "data=text", f"data.path={text_file}", *overrides]
    with pytest.raises(UserError) as caught:
        check(config(method, options, *given))
    assert says in str(caught.value)


def test_a_rank_may_be_handed_on(tiny_llama: Path, text_file: Path) -> None:
    given = ["model=hf", f"model.path={tiny_llama}", "data=text", f"data.path={text_file}", "rank=4"]
    made = config("LOHA", {}, *given, "adapter.options.r=${rank}")
    check(made)
    assert made.adapter.options == {"r": 4}


@pytest.mark.parametrize(
    ("method", "options", "overrides", "says"),
    [
        ("ADALORA", {"total_step": 10}, [], "has to be told of each optimizer step"),
        ("LOHA", {}, ["targets=[q_proj,nothing]"], "targets names no module of this model: 'nothing'"),
        ("LOHA", {}, ["targets=[embed_tokens]"], "refuses this model"),
        ("PREFIX_TUNING", {"num_virtual_tokens": 2}, ["targets=[q_proj]"], "has no meaning with"),
        ("PSOFT", {"r": 64}, [], "refuses this model"),
        ("POLY", {}, [], "does not compute on data=bible (task_ids should not be None"),
    ],
)
def test_what_the_model_shows_is_said(
    method: str, options: dict[str, Any], overrides: list[str], says: str, tiny_llama: Path
) -> None:
    def show(model: torch.nn.Module, rows: int) -> None:
        model(input_ids=torch.arange(3, 9)[None].repeat(rows, 1))

    with pytest.raises(UserError) as caught:
        adapt(base(tiny_llama), config(method, options, *overrides), Origin(show=show))
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 3}'])
def test_a_file_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter\.config=.*a\.json"):
        config(None, {}, f"adapter.config={tmp_path / 'a.json'}")


def test_a_sweep_over_files_stands_for_itself(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    for name, made in {"a": peft.IA3Config(), "b": peft.OFTConfig(oft_block_size=4)}.items():
        (workplace / f"{name}.json").write_text(json.dumps(made.to_dict(), default=str).replace("PeftType.", ""))
    done = cli(
        "-m", *tiny_overrides, "backend=peft", "adapter=peft_method", "adapter.config=a.json,b.json", "tracking=none",
        f"hydra.sweep.dir={workplace / 'sweep'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    saved = yaml.safe_load((workplace / "sweep/1/config.yaml").read_text())["adapter"]
    assert (saved["name"], saved["config"], saved["options"]["oft_block_size"]) == ("oft", None, 4)
    values = json.loads((workplace / "sweep/1/result.json").read_text())["values"]
    assert values["adapter"] == "oft"
    assert values["adapter.options.oft_block_size"] == 4
    assert "rank" not in values


def test_a_plan_counts_as_peft_does(cli: Cli, tiny_overrides: list[str], workplace: Path, tiny_llama: Path) -> None:
    given = ["backend=peft", "adapter=peft_method", "adapter.method=MISS", "adapter.options.r=4", "tracking=none"]
    done = cli(*tiny_overrides, *given, "task=plan", f"hydra.run.dir={workplace / 'plan'}")
    assert done.code == 0, done.err
    planned = json.loads((workplace / "plan/result.json").read_text())["result"]
    theirs = peft.get_peft_model(base(tiny_llama), peft.MissConfig(r=4, target_modules="all-linear"))
    assert (planned["trainable"], planned["total"]) == theirs.get_nb_trainable_parameters()
    done = cli(*tiny_overrides, *given[:2], "adapter.method=FROD", "tracking=none", "task=plan")
    assert done.code == 1
    assert "adapter.method=FROD cannot be planned" in done.err
