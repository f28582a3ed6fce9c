"""PEFT's folders of finished runs: PEFT reads them, vLLM's limits are said, and ours reads what PEFT wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lora_exp.export.formats.peft import refusal, vllm_problems

Cli = Callable[..., Any]
Finished = Callable[..., Path]
EXPORTS = Path("outputs/exports")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's and transformers'


@pytest.mark.parametrize("more", [("adapter=lora",), ("adapter=dora", "layer=all"), ("bias=all",), ("start=pissa",)])
def test_peft_reads_it_with_the_merged_models_answers(
    more: tuple[str, ...], cli: Cli, finished: Finished, tiny_llama: Path, answers: Any
) -> None:
    run = finished(*more)
    command = ["task=export", f"run={run}", "tracking=none", "export.verify=false"]
    for kind in ("peft", "merged"):
        done = cli(*command, f"export={kind}", "export.dtype=float32")
        assert done.code == 0, done.err
    tokens = torch.randint(3, 300, (2, 9))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = answers(base, tokens)
    theirs = answers(peft.PeftModel.from_pretrained(base, EXPORTS / "day-run-peft").eval(), tokens)
    merged = AutoModelForCausalLM.from_pretrained(EXPORTS / "day-run-merged", dtype=torch.float32)
    assert (theirs - plain).abs().max() > 1e-3
    assert (theirs - answers(merged, tokens)).abs().max() <= 1e-4
    assert AutoTokenizer.from_pretrained(EXPORTS / "day-run-peft").eos_token == "</s>"


def test_ours_exports_what_peft_wrote(cli: Cli, workplace: Path, tiny_llama: Path, answers: Any) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    made = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_rslora=True))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    made.save_pretrained(workplace / "theirs/lone")
    tokens = torch.randint(3, 300, (2, 9))
    expected = answers(made.eval(), tokens)
    done = cli(
        "task=export", f"run={workplace}/theirs/lone", "export=merged", f"model.path={tiny_llama}", "tracking=none"
    )
    assert done.code == 0, done.err
    assert "sentences of lora_exp's own, as the adapter lies without its run" in done.out
    merged = AutoModelForCausalLM.from_pretrained(EXPORTS / "theirs-lone-merged", dtype=torch.float32)
    assert (answers(merged, tokens) - expected).abs().max() <= 1e-4


def test_a_classifier_keeps_its_head_and_the_names_of_its_classes(
    cli: Cli, workplace: Path, tiny_llama: Path, answers: Any
) -> None:
    rows = [
        {"text": f"the {word} is here {number}", "label": label}
        for label, word in enumerate(["ox", "king", "sea"])
        for number in range(12)
    ]
    (workplace / "rows.jsonl").write_text("\n".join(json.dumps({**row, "label": f"c{row['label']}"}) for row in rows))
    done = cli(
        "model=hf", f"model.path={tiny_llama}", "model.label=tiny", "data=text_classification", "device=cpu",
        f"data.path={workplace}/rows.jsonl", "data.val_fraction=0.3", "data.max_length=8", "train.steps=6",
        "train.warmup_steps=1", "optimizer.lr=1e-2", "tracking=none", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.code == 0, done.err
    for kind in ("peft", "merged"):
        done = cli("task=export", "run=run", f"export={kind}", "tracking=none", f"export.path={kind}")
        assert done.code == 0, done.err
    merged = AutoModelForSequenceClassification.from_pretrained("merged", dtype=torch.float32)
    assert merged.config.id2label == {0: "c0", 1: "c1", 2: "c2"}
    tokens = torch.randint(3, 300, (2, 7))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama, config=merged.config, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, "peft").eval()
    assert (answers(theirs, tokens) - answers(merged, tokens)).abs().max() <= 1e-4
    assert "vLLM takes no modules_to_save" in json.loads(Path("peft/provenance.json").read_text())["vllm"]


@pytest.mark.parametrize("adapter", ["full", "lora_fa"])
def test_what_peft_cannot_hold_is_refused_or_exact(adapter: str, cli: Cli, finished: Finished) -> None:
    run = finished(f"adapter={adapter}")
    done = cli("task=export", f"run={run}", "export=peft", "tracking=none")
    if adapter == "full":
        assert done.code == 1
        assert "adapter=full trained the base itself: use export=merged" in done.err
    else:
        assert done.code == 0, done.err


def test_the_reason_comes_from_the_librarys_own_rules(
    model_of: Any, adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_exp.adapters.variants.peft_format import PeftFormat

    model = adapted(model_of("llama"), target_modules=["q_proj"])
    assert refusal(model, "default") is None
    monkeypatch.setattr(PeftFormat, "refusal", lambda *_: "it is of tomorrow")
    assert refusal(model, "default") == "it is of tomorrow"


def test_what_vllm_does_not_take_is_said() -> None:
    plain = {"peft_type": "LORA", "use_dora": False, "modules_to_save": None, "bias": "none"}
    assert vllm_problems(plain) == []
    for key, value, word in (
        ("use_dora", True, "DoRA"), ("modules_to_save", ["score"], "modules_to_save"), ("bias", "all", "biases"),
        ("peft_type", "VERA", "VERA"), ("target_parameters", ["x"], "target_parameters"),
    ):  # fmt: skip
        assert word in " ".join(vllm_problems({**plain, key: value}))
