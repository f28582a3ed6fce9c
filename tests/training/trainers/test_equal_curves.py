"""The three trainers on the same work: one loss curve, whatever the config asks for."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_exp import models
from lora_exp.backends import Origin, adapt
from lora_exp.checks import check
from lora_exp.config import Config
from lora_exp.data import Data, kind_of, load_data
from lora_exp.data.kinds.text import Text
from lora_exp.errors import UserError
from lora_exp.machine import signals
from lora_exp.machine.distributed import ALONE
from lora_exp.machine.place import Place, set_seed
from lora_exp.training.best import Best
from lora_exp.training.loop import DivergedError, Record
from lora_exp.training.objectives import IGNORED
from lora_exp.training.timetable import Timetable, micro_batches_of
from lora_exp.training.trainer import Work, trainers

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says so where it lacks an optional kernel
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft
]
SPEEDS = {"train/tokens_per_s", "train/images_per_s"}
LOSSES = {"train/loss", "eval/loss", "train/lr"}
STEPS = 30
CPU = torch.device("cpu")
MakeWork = Callable[..., Work]


@dataclasses.dataclass
class Answers(Text):
    """Rows of several lengths, of which some tokens are not learnt."""

    def collate(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
        pad = torch.nn.utils.rnn.pad_sequence
        return {name: pad([row[name] for row in rows], True, value) for name, value in fill.items()}


@dataclasses.dataclass
class Packed(Text):
    """Rows of two samples each, which do not see each other: their positions restart."""

    def collate(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        tokens = torch.stack([row["input_ids"] for row in rows]).long()
        half = tokens.shape[1] // 2
        labels = tokens.clone()
        labels[:, half] = IGNORED
        positions = torch.cat([torch.arange(half), torch.arange(tokens.shape[1] - half)]).expand_as(tokens)
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def settings(*overrides: str) -> Config:
    from hydra import compose, initialize_config_dir

    from lora_exp.config import conf_folder
    from lora_exp.schema import register, to_config

    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", list(overrides)))


@pytest.fixture
def make_work(workplace: Path, tiny_llama: Path, text_file: Path) -> MakeWork:
    """The work of a config on the tiny model, seeded as a run seeds it."""

    def make(*overrides: str, place: Place = Place(CPU, torch.float32), kind: type[Text] | None = None) -> Work:  # noqa: B008
        config = settings(
            "model=hf", f"model.path={tiny_llama}", "data=text", f"data.path={text_file}", "data.block_size=16",
            "device=cpu", "rank=4", "optimizer.lr=1e-3", f"train.steps={STEPS}", "train.micro_batch_size=2",
            "train.eval_blocks=4", "train.eval_every=15", *overrides,
        )  # fmt: skip
        check(config)
        source = models.find_source(config.model)
        data = load_data(config.data, lambda: models.load_tokenizer(source, config.model))
        base = models.load_base(source, config.model, place, data.shape, config.quantization)
        if config.train.gradient_checkpointing:
            models.checkpoint_layers(base)
        set_seed(config.seed)
        adapted = adapt(base, config, Origin())
        own = kind_of(config.data) if kind is None else kind(**dataclasses.asdict(config.data))
        data = answers() if kind is Answers else data
        section, optimizer = config.train, config.optimizer
        rows = micro_batches_of(len(data.train), section.micro_batch_size, section.drop_last)  # type: ignore[arg-type]
        best = Best(patience=section.early_stopping, min_delta=section.min_delta)
        return Work(
            adapted, data, own, place, section, optimizer, config.seed, Timetable.of(section, rows), best, ALONE
        )

    return make


def answers() -> Data:
    """40 rows of 4 to 15 tokens, the first third of each not learnt."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(4, 16, (40,), generator=generator).tolist()
    rows = []
    for length in lengths:
        tokens = torch.randint(3, 300, (length,), generator=generator)
        labels = torch.where(torch.arange(length) < length // 3, IGNORED, tokens)
        rows.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones(length, dtype=torch.long)})
    return Data(rows[:32], rows[32:], "rows")  # type: ignore[arg-type]


def records(name: str, work: Work) -> list[Record]:
    found: list[Record] = []
    trainers[name]().train(work, found.append)
    return found


def largest_gap(some: list[Record], others: list[Record], names: set[str] | None = None) -> float:
    """Of these figures (None: of any but speeds); what is recorded, when and in which order must be the same."""
    assert [record["step"] for record in some] == [record["step"] for record in others]
    gaps = [0.0]
    for one, other in zip(some, others, strict=True):
        assert one.keys() <= other.keys()
        looked_at = one.keys() - SPEEDS - {"lane"} if names is None else one.keys() & names
        gaps += [abs(one[name] - other[name]) for name in looked_at]
    return max(gaps)


PEFT = "backend=peft"
TABLE = {
    "plain": [],
    "accumulation, clipping": ["train.grad_accum_steps=3", "train.max_grad_norm=0.05"],
    "schedule, decay, no clipping": ["train.warmup_steps=4", "train.schedule=linear", "train.max_grad_norm=inf",
                                     "optimizer.weight_decay=0.1", "optimizer.betas=[0.8,0.9]"],
    "DoRA": ["adapter=dora"],
    "gradient checkpointing, dropout": ["train.gradient_checkpointing=true", "dropout=0.1"],
    "PEFT, DoRA, dropout": [PEFT, "adapter=dora", "dropout=0.1"],
    "PEFT, a new head": [PEFT, "model.modules_to_save=[lm_head]"],
    "all weights": ["adapter=full"],
}  # fmt: skip
HF_ALONE = {
    "a new head": ["model.modules_to_save=[lm_head]"],
    "an adapted head": ["targets=[q_proj,lm_head]"],
    "LoRA+": ["optimizer.lora_plus_ratio=4"],
    "8-bit optimizer": ["optimizer=adamw_8bit"],
    "intervals": ["train.log_every=7", "train.eval_every=4", "train.metrics=[perplexity]"],
}
FEW = 8  # steps, where a difference would be seen in the first


def both(name: str, make: Callable[[str], Work]) -> tuple[list[Record], list[Record], Work, Work]:
    """The records of the native trainer and of another, and their work; each is made just before it is trained."""
    native = make("native")
    expected = records("native", native)
    theirs = make(name)
    return expected, records(name, theirs), native, theirs


@pytest.mark.parametrize("case", [*TABLE, *HF_ALONE])
def test_hf_trains_to_the_bit_as_native(case: str, make_work: MakeWork) -> None:
    overrides = ["optimizer.lr=1e-2", f"train.steps={FEW}", *(TABLE | HF_ALONE)[case]]
    expected, found, native, theirs = both("hf", lambda name: make_work(*overrides, f"trainer={name}"))
    assert largest_gap(expected, found) == 0
    assert all(map(torch.equal, native.adapted.parameters, theirs.adapted.parameters))


@pytest.mark.parametrize("case", TABLE)
def test_trls_own_loss_gives_the_same_curve(case: str, make_work: MakeWork) -> None:
    pytest.importorskip("trl")
    steps = STEPS if case in ("plain", "accumulation, clipping") else FEW
    expected, found, _, _ = both(
        "trl_sft", lambda name: make_work(f"train.steps={steps}", *TABLE[case], f"trainer={name}")
    )
    assert largest_gap(expected, found, LOSSES) <= 1e-4
    assert largest_gap(expected, found, {"train/grad_norm"}) <= 1e-3


@pytest.mark.parametrize("name", ["hf", "trl_sft"])
@pytest.mark.parametrize("kind", [Answers, Packed])
def test_tokens_that_are_not_learnt_and_packed_rows(name: str, kind: type[Text], make_work: MakeWork) -> None:
    """By unequal numbers of learnt tokens a mean of micro batches' means would be another loss."""
    if name == "trl_sft":
        pytest.importorskip("trl")
    overrides = [f"train.steps={FEW}", "train.grad_accum_steps=4"]
    expected, found, _, _ = both(name, lambda other: make_work(*overrides, f"trainer={other}", kind=kind))
    assert largest_gap(expected, found, LOSSES) <= (0 if name == "hf" else 1e-4)


@pytest.mark.parametrize("name", ["hf", "trl_sft"])
def test_epochs_end_in_a_smaller_step_of_a_smaller_batch(name: str, make_work: MakeWork) -> None:
    """32 rows by 3 are 11 micro batches, by 4 of these 3 steps an epoch."""
    if name == "trl_sft":
        pytest.importorskip("trl")
    overrides = ["train.epochs=2", "train.micro_batch_size=3", "train.grad_accum_steps=4", "train.eval_every='1 epoch'"]
    overrides += ["train.steps=null", "train.warmup_ratio=0.2"]
    expected, found, _, _ = both(name, lambda other: make_work(*overrides, f"trainer={other}", kind=Answers))
    assert [record["step"] for record in expected if "eval/loss" in record] == [0, 3, 6]
    assert [record["train/epoch"] for record in found if "train/loss" in record][2::3] == [1, 2]
    assert largest_gap(expected, found, LOSSES) <= (0 if name == "hf" else 1e-4)


def test_it_stops_early_where_native_does(make_work: MakeWork) -> None:
    overrides = ["train.early_stopping=2", "train.min_delta=9", "train.eval_every=2", "train.steps=20"]
    expected, found, _, _ = both("hf", lambda other: make_work(*overrides, f"trainer={other}"))
    assert largest_gap(expected, found) == 0
    assert found[-1]["step"] == 6  # the best of 2, and two without such a gain


PLACES = {
    "bfloat16 base": Place(CPU, torch.bfloat16),
    "autocast": Place(CPU, torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("name", ["hf", "trl_sft"])
@pytest.mark.parametrize("where", PLACES)
def test_in_16_bits(name: str, where: str, make_work: MakeWork) -> None:
    """TRL's logits are rounded to 16 bits at another place than ours: that is its difference."""
    if name == "trl_sft":
        pytest.importorskip("trl")
    overrides = ["train.steps=4", "adapter=dora"]
    expected, found, _, _ = both(name, lambda other: make_work(*overrides, f"trainer={other}", place=PLACES[where]))
    assert largest_gap(expected, found, LOSSES) <= (0 if name == "hf" else 1e-3)


@pytest.mark.parametrize("name", ["hf", "trl_sft"])
@pytest.mark.parametrize("backend", ["native", "peft"])
def test_on_a_quantised_base(name: str, backend: str, make_work: MakeWork, even_llama: Path) -> None:
    """transformers refuses adapters over it that are not PEFT's; TRL rounds what it trains to bfloat16."""
    pytest.importorskip("bitsandbytes")
    if name == "trl_sft":
        pytest.importorskip("trl")
    overrides = ["train.steps=4", "quantization=nf4", f"backend={backend}", f"model.path={even_llama}"]
    expected, found, _, theirs = both(name, lambda other: make_work(*overrides, f"trainer={other}"))
    assert largest_gap(expected, found, LOSSES) <= (0 if name == "hf" else 1e-4)
    assert {parameter.dtype for parameter in theirs.adapted.parameters} == {torch.float32}


def test_trl_says_its_metrics_too(make_work: MakeWork) -> None:
    pytest.importorskip("trl")
    found = records("trl_sft", make_work("train.steps=2", "train.log_every=1", "trainer=trl_sft"))
    assert [set(record) >= {"train/entropy", "train/mean_token_accuracy"} for record in found] == [0, 1, 1, 0]


@pytest.mark.parametrize("targets", ["targets=[q_proj,lm_head]", "model.modules_to_save=[lm_head]"])
def test_trl_refuses_a_head_that_is_more_than_its_weight(targets: str, make_work: MakeWork) -> None:
    pytest.importorskip("trl")
    with pytest.raises(UserError, match=r"trl_sft computes its loss from the output head's weight.*use trainer=hf"):
        records("trl_sft", make_work(targets, "trainer=trl_sft"))


@pytest.mark.parametrize("name", ["hf", "trl_sft"])
def test_nothing_is_left_of_the_trainer(name: str, make_work: MakeWork, workplace: Path) -> None:
    """Neither in the model nor in the current folder, the environment or the generators."""
    if name == "trl_sft":
        pytest.importorskip("trl")
    work = make_work("train.steps=2", f"trainer={name}")
    model = work.adapted.model
    before = {module: dict(vars(module)).keys() for module in model.modules()}
    config, environment = str(model.config), dict(os.environ)
    there = sorted(workplace.rglob("*"))
    records(name, work)
    assert {module: dict(vars(module)).keys() for module in model.modules()} == before
    assert str(model.config) == config
    assert dict(os.environ) == environment
    assert sorted(workplace.rglob("*")) == there


@pytest.mark.parametrize("name", ["native", "hf"])
def test_what_diverged_is_not_trained_further(name: str, make_work: MakeWork) -> None:
    work = make_work("train.steps=5", "optimizer.lr=1e30", "train.warmup_steps=0", f"trainer={name}")
    with pytest.raises(DivergedError, match=r"train/\w+ became \w+ at optimizer step 2 .*lower"):
        records(name, work)
    assert all(parameter.isfinite().all() for parameter in work.adapted.parameters)


@pytest.mark.parametrize("name", ["native", "hf", "trl_sft"])
def test_who_keeps_the_records_can_end_the_training(name: str, make_work: MakeWork) -> None:
    if name == "trl_sft":
        pytest.importorskip("trl")
    found: list[Record] = []

    def keep(record: Record) -> None:
        found.append(record)
        if record["step"] == 3:
            raise signals.Stopped(15)

    with pytest.raises(signals.Stopped):
        trainers[name]().train(make_work("train.steps=5", f"trainer={name}"), keep)
    assert [record["step"] for record in found] == [0, 1, 2, 3]
