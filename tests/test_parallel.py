"""What several processes are refused, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_exp.config import AdapterConfig, Config, PlanConfig, QuantizationConfig
from lora_exp.parallel import problems

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
FSDP = Config(parallel="fsdp", adapter=AdapterConfig(name="lora"), quantization=QuantizationConfig("none"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (FSDP, None),
        (replace(FSDP, parallel="auto", quantization=QuantizationConfig("nf4")), None),
        (replace(FSDP, parallel="both"), "parallel=both is not known: choose one of auto, ddp, fsdp"),
        (replace(FSDP, quantization=QuantizationConfig("int8")), "cannot share out quantization=int8's packed weights"),
        (replace(FSDP, adapter=AdapterConfig("full", trains="weights")), "adapter=full trains weights of the base"),
        (replace(FSDP, backend="peft"), "leaves PEFT unable to save"),
        (replace(FSDP, plan=PlanConfig(strict=True)), "plan.strict=true plans for one process"),
        (replace(FSDP, task="plan", quantization=QuantizationConfig("nf4")), None),
    ],
)
def test_what_sharding_cannot_do(config: Config, says: str | None, launched: pytest.MonkeyPatch) -> None:
    found = problems(config, is_parallel=True)
    assert (len(found) == 1 and says in found[0]) if says else found == []


def test_a_trainer_that_knows_one_process_alone(launched: pytest.MonkeyPatch) -> None:
    (found,) = problems(replace(FSDP, trainer="other"), is_parallel=False)
    assert found == "trainer=other trains in one process here: use trainer=native"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_USE_FSDP", "true", "give parallel=fsdp"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "give model.dtype"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "which this cannot"),
        ("ACCELERATE_MIXED_PRECISION", "no", None),
    ],
)
def test_what_accelerate_was_told_and_the_config_was_not(
    name: str, value: str, says: str | None, launched: pytest.MonkeyPatch
) -> None:
    launched.setenv(name, value)
    found = problems(replace(FSDP, parallel="auto"), is_parallel=True)
    assert (len(found) == 1 and says in found[0]) if says else found == []


@pytest.mark.parametrize("wish", ["ddp", "fsdp"])
def test_one_process_is_told_how_several_are_started(wish: str) -> None:
    (found,) = problems(replace(FSDP, parallel=wish), is_parallel=True)
    assert "start them by torchrun --nproc_per_node 2 -m lora_exp" in found
    assert problems(replace(FSDP, parallel="auto"), is_parallel=True) == []
