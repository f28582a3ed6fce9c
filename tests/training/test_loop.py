"""The loop against HF's Trainer, against itself with several lanes, and against a loss that is no number."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lora_exp import LoraConfig, LoraModel
from lora_exp.config import OptimizerConfig, TrainConfig
from lora_exp.training.loop import DivergedError, Forward, Lane, Record, evaluate, train
from lora_exp.training.objectives import causal_lm_losses, count_predictions
from lora_exp.training.optimizers import build_optimizer
from lora_exp.training.schedules import build_schedule
from lora_exp.training.timetable import Timetable

STEPS, ROWS, LENGTH = 20, 2, 12
TARGETS = ["q_proj", "v_proj", "down_proj"]


def section(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": STEPS, "warmup_steps": 3, "eval_every": 10, "max_grad_norm": 0.5, **changes})


def base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def micro_batches(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 90, (ROWS, LENGTH), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def lane(name: str, parameters: list[torch.nn.Parameter], batches: list[Any], plan: TrainConfig) -> Lane:
    times = Timetable.of(plan, None)
    optimizer = build_optimizer(parameters, OptimizerConfig("adamw", lr=2e-2, weight_decay=0.01))
    return Lane(
        name,
        parameters,
        itertools.cycle(batches),
        batches[:2],
        optimizer,
        build_schedule(optimizer, plan, times),
        times,
        plan.max_grad_norm,
    )


def forward(model: torch.nn.Module, **changes: Any) -> Forward:
    return Forward(model, causal_lm_losses, count_predictions, torch.device("cpu"), **changes)


def peft_model(folder: Path) -> peft.PeftModel:
    torch.manual_seed(1)
    wanted = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=TARGETS)
    return peft.get_peft_model(base(folder), wanted)


def native_like(reference: peft.PeftModel, folder: Path) -> LoraModel:
    """Our model with the factors of PEFT's, transposed to our layout."""
    model = LoraModel(base(folder), LoraConfig(rank=4, lora_alpha=8, target_modules=TARGETS), verbose=False)
    theirs = {name: value for name, value in reference.named_parameters() if "lora_" in name}
    for name, mine in model.adapter_parameters().items():
        key = next(k for k in theirs if _place(k) == _place(name))
        mine.data.copy_(theirs[key].detach().T)
    return model


def _place(name: str) -> tuple[str, ...]:
    """Layer number, layer name and factor: what our names and PEFT's have in common."""
    parts = [part for part in name.split(".") if part.isdigit() or part.endswith("_proj") or part.startswith("lora_")]
    return tuple(parts)


def losses(records: Iterator[Record], name: str = "default") -> list[float]:
    return [r["train/loss"] for r in records if "train/loss" in r and r["lane"] == name]


class _Logged(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def trainer_losses(model: torch.nn.Module, batches: list[Any], accumulate: int, folder: Path) -> list[float]:
    """The same training by HF's Trainer: AdamW, warm-up and cosine, clipping, in the same order."""
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch["input_ids"]]

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(rows)

    logged = _Logged()
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS, gradient_accumulation_steps=accumulate,
        learning_rate=2e-2, weight_decay=0.01, warmup_steps=3, lr_scheduler_type="cosine", max_grad_norm=0.5,
        logging_steps=1, logging_strategy="steps", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    InOrder(model, arguments, train_dataset=rows, callbacks=[logged]).train()
    return logged.losses[:STEPS]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
def test_native_peft_and_hf_trainer_agree(tiny_llama: Path, tmp_path: Path, accumulate: int) -> None:
    batches = micro_batches(0, 4) * (STEPS * accumulate // 4)  # four rows of batches, learnt by heart
    theirs = peft_model(tiny_llama)
    native = native_like(theirs, tiny_llama)
    by_trainer = trainer_losses(copy.deepcopy(theirs), batches, accumulate, tmp_path)
    plan = section(grad_accum_steps=accumulate)
    on_peft = [p for p in theirs.parameters() if p.requires_grad]
    by_peft = losses(train(forward(theirs), [lane("default", on_peft, batches, plan)]))
    mine = list(native.adapter_parameters().values())
    by_native = losses(train(forward(native), [lane("default", mine, batches, plan)]))
    assert len(by_trainer) == len(by_native) == STEPS
    assert by_native[-1] < by_native[0]
    assert by_native == pytest.approx(by_trainer, abs=1e-5)
    assert by_peft == pytest.approx(by_trainer, abs=1e-5)


def test_the_same_seed_gives_the_same_losses_to_the_bit(tiny_llama: Path) -> None:
    def once() -> list[float]:
        torch.manual_seed(3)
        config = LoraConfig(rank=4, target_modules=TARGETS, lora_dropout=0.2)
        model = LoraModel(base(tiny_llama), config, verbose=False)
        parameters = list(model.adapter_parameters().values())
        return losses(train(forward(model), [lane("default", parameters, micro_batches(1, 5), section())]))

    assert once() == once()


def test_lanes_trained_together_equal_lanes_trained_alone(tiny_llama: Path) -> None:
    def fresh() -> LoraModel:
        torch.manual_seed(4)
        model = LoraModel(base(tiny_llama), LoraConfig(rank=2, target_modules=TARGETS), "a", verbose=False)
        model.add_adapter("b", LoraConfig(rank=6, target_modules=TARGETS, lora_alpha=3))
        return model

    def build(model: LoraModel, names: str) -> list[Lane]:
        data = {"a": micro_batches(5, 7), "b": micro_batches(6, 7)}
        return [lane(name, list(model.adapter_parameters(name).values()), data[name], section()) for name in names]

    together_model = fresh()
    routed = forward(together_model, route=lambda rows: together_model.route(dict(rows)))
    together = list(train(routed, build(together_model, "ab")))
    for name in "ab":
        alone_model = fresh()
        alone_model.set_adapter(name)
        alone = losses(train(forward(alone_model), build(alone_model, name)), name)
        assert losses(iter(together), name) == pytest.approx(alone, abs=1e-5)


def test_the_base_is_frozen_and_every_factor_learns(tiny_llama: Path) -> None:
    model = LoraModel(base(tiny_llama), LoraConfig(rank=4, target_modules=TARGETS), verbose=False)
    factors = model.adapter_parameters()
    causal_lm_losses(model, micro_batches(0, 1)[0]).total.sum().backward()
    own = {id(parameter) for parameter in factors.values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    assert all(p.grad is not None for p in factors.values())
    assert len(factors) == 2 * 2 * len(TARGETS)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_what_to_do(tiny_llama: Path) -> None:
    model = LoraModel(base(tiny_llama), LoraConfig(rank=4, target_modules=TARGETS), verbose=False)
    parameters = list(model.adapter_parameters().values())
    broken = lane("default", parameters, micro_batches(0, 3), section())

    def poison() -> None:
        parameters[0].data.fill_(torch.nan)

    records: list[Record] = []
    with pytest.raises(DivergedError, match=r"nan at optimizer step 2 .*lower optimizer\.lr"):
        records.extend(train(forward(model, check_gradients=poison), [broken]))
    assert [r["step"] for r in records if "train/loss" in r] == [1]


def test_evaluation_weighs_tokens_not_batches(tiny_llama: Path) -> None:
    model = base(tiny_llama)
    first, second = (batch["input_ids"] for batch in micro_batches(0, 2))
    masked = second.clone()
    masked[:, 4:] = -100
    batches = [{"input_ids": first, "labels": first}, {"input_ids": second, "labels": masked}]
    with torch.no_grad():
        means = [model(**batch).loss.item() for batch in batches]
    weights = [ROWS * (LENGTH - 1), ROWS * 3]
    expected = sum(m * w for m, w in zip(means, weights, strict=True)) / sum(weights)
    assert evaluate(forward(model), batches, "default")["loss"] == pytest.approx(expected, rel=1e-5)


def test_nothing_is_read_from_the_device_between_logged_steps(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LoraModel(base(tiny_llama), LoraConfig(rank=2, target_modules=TARGETS), verbose=False)
    plan = section(steps=12, log_every=6, eval_every=12)
    parameters = list(model.adapter_parameters().values())
    reads = 0
    item = torch.Tensor.item

    def counted(tensor: torch.Tensor) -> Any:
        nonlocal reads
        # AdamW reads its step counters, which live on the CPU whatever the device is.
        reads += sys._getframe(1).f_globals["__name__"].startswith("lora_exp")
        return item(tensor)

    with contextlib.closing(train(forward(model), [lane("default", parameters, micro_batches(0, 3), plan)])) as run:
        next(run)  # the baseline evaluation
        monkeypatch.setattr(torch.Tensor, "item", counted)
        assert next(run)["step"] == 6
    assert reads == 2  # the loss and the gradient norm of the logged step


def test_a_loss_that_nothing_trained_reaches_is_an_error(tiny_llama: Path) -> None:
    model = base(tiny_llama).requires_grad_(False)
    idle = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="The loss depends on no trained parameter"):
        list(train(forward(model), [lane("default", [idle], micro_batches(0, 2), section())]))


def poisoned(model: LoraModel, after: int, count: int) -> Iterator[Any]:
    """Batches, and one value of the adapter is a NaN from the one of that number on."""
    for number, batch in enumerate(micro_batches(0, count), start=1):
        if number == after:
            next(iter(model.adapter_parameters().values())).data[0, 0] = torch.nan
        yield batch


@pytest.mark.parametrize("answers_at_once", [True, False])
@pytest.mark.parametrize(("bad_step", "log_every", "eval_every"), [(1, 50, 50), (4, 50, 6), (7, 3, 50), (12, 50, 50)])
def test_the_step_that_diverged_is_named_before_anything_can_be_saved(
    answers_at_once: bool, bad_step: int, log_every: int, eval_every: int, tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The old test logged each step, where a loss that is looked at when it is logged is looked at in time."""
    monkeypatch.setattr("lora_exp.training.loop._answers_at_once", lambda device: answers_at_once)
    model = LoraModel(base(tiny_llama), LoraConfig(rank=4, target_modules=TARGETS), verbose=False)
    plan = section(steps=12, log_every=log_every, eval_every=eval_every, warmup_steps=0)
    parameters = list(model.adapter_parameters().values())
    here = lane("a", parameters, micro_batches(1, 2), plan)
    here.batches = poisoned(model, bad_step, 12)
    seen: list[Record] = []
    with pytest.raises(DivergedError, match=rf"nan at optimizer step {bad_step} \(lane a\)"):
        seen.extend(train(forward(model), [here]))
    evaluated = [record["step"] for record in seen if "eval/loss" in record]
    assert max(evaluated) < bad_step
    steps = {int(here.optimizer.state[p]["step"]) for p in parameters if p in here.optimizer.state} or {0}
    if answers_at_once:  # the step that diverged has changed no parameter
        assert steps == {bad_step - 1}


def test_where_nothing_is_logged_a_nan_is_found_all_the_same(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_exp.training.loop._answers_at_once", lambda device: False)
    monkeypatch.setattr("lora_exp.training.watch.MOST_UNSEEN", 4)
    model = LoraModel(base(tiny_llama), LoraConfig(rank=2, target_modules=TARGETS), verbose=False)
    plan = section(steps=12, log_every=0, eval_every=0, save_every=None)
    here = lane("a", list(model.adapter_parameters().values()), micro_batches(1, 2), plan)
    here.batches = poisoned(model, 6, 12)
    with pytest.raises(DivergedError, match=r"nan at optimizer step 6 \(lane a\), with a learning rate of 0\.0\d+: "):
        list(train(forward(model), [here]))
    assert here.state.step == 7  # looked at after 4 and 8 steps, before the 8th changes a parameter


def test_between_records_nothing_is_read_from_a_device_that_does_not_answer_at_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_exp.training.loop._answers_at_once", lambda device: False)
    checks: list[int] = []
    monkeypatch.setattr("lora_exp.training.loop.Watch.check", lambda watch: checks.append(len(watch._unseen)))
    model = LoraModel(base(tiny_llama), LoraConfig(rank=2, target_modules=TARGETS), verbose=False)
    plan = section(steps=9, log_every=4, eval_every=9, warmup_steps=0)
    here = lane("a", list(model.adapter_parameters().values()), micro_batches(1, 9), plan)
    list(train(forward(model), [here]))
    assert checks == [4, 8, 9]  # (what this stand-in for `check` does not empty)


def test_between_steps_and_evaluation_batches_a_training_may_be_ended(tiny_llama: Path) -> None:
    """And nowhere else: the lane's state is then true of what it has learnt and of what has been recorded."""

    class Ended(BaseException): ...

    model = LoraModel(base(tiny_llama), LoraConfig(rank=2, target_modules=TARGETS), verbose=False)
    plan = section(steps=4, eval_every=2, grad_accum_steps=2, warmup_steps=0)
    calls = [0]

    def count(most: int) -> None:
        calls[0] += 1
        if calls[0] > most:
            raise Ended

    def run(most: int) -> tuple[list[int], int, bool]:
        calls[0] = 0
        here = lane("a", list(model.adapter_parameters().values()), micro_batches(1, 9), plan)
        end = functools.partial(count, most)
        seen: list[Record] = []
        with contextlib.suppress(Ended):
            seen.extend(train(forward(model, between_batches=end, between_steps=end), [here]))
        return [record["step"] for record in seen], here.state.step, here.state.is_evaluated

    assert run(1000) == ([0, 1, 2, 2, 3, 4, 4], 4, True)
    assert calls[0] == 3 * 2 + 4 + 1  # evaluations of two batches, before each step, after the last
    assert run(1) == ([], 0, False)  # inside the first evaluation
    assert run(2) == ([0], 0, True)  # before the first step
    assert run(5) == ([0, 1, 2], 2, False)  # inside the second evaluation
    assert run(6) == ([0, 1, 2, 2], 2, True)
