"""What is not in the schema is refused, however it comes, with the nearest that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., "Finished"]  # noqa: F821  # of conftest.py
ADVICE = ("To append", "use +", "HYDRA_FULL_ERROR")  # Hydra's: it would take the mistake without a word

UNKNOWN = [
    ("train.stpes=3", "train.stpes is not a key of the config: did you mean train.steps?"),
    ("optimizer.lrr=5", "optimizer.lrr is not a key of the config: did you mean optimizer.lr?"),
    ("optimizr.lr=5", "optimizr.lr is not a key of the config: did you mean optimizer.lr?"),
    ("rnak=8", "rnak is not a key of the config: did you mean rank?"),
    ("lr=1e-4", "lr is not a key of the config: did you mean optimizer.lr?"),
    ("adaptr=lora", "adaptr is not a key of the config: did you mean adapter?"),
    ("foo=1", "foo is not a key of the config: it has"),
    ("model.packaged.sha=3", "model.packaged.sha is not a key of the config: did you mean model.packaged.sha256?"),
    ("train.steps.more=3", "train.steps.more is not a key of the config: train.steps has none below it"),
    ("adapter={nam: lora}", "adapter.nam is not a key of the config: did you mean adapter.name?"),
]


@pytest.mark.parametrize("mode", [[], ["-m"], ["--cfg", "job"]], ids=["run", "sweep", "cfg"])
@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize(("override", "says"), UNKNOWN, ids=[override for override, _ in UNKNOWN])
def test_an_unknown_key_is_refused_before_anything_runs(
    cli: Cli, workplace: Path, override: str, says: str, plus: str, mode: list[str]
) -> None:
    if mode == ["--cfg", "job"] and "{" in override:
        pytest.skip("what composes is shown")
    done = cli(f"{plus}{override}", *mode)
    assert done.code == 1
    assert says in done.err
    assert not any(advice in done.err for advice in ADVICE)
    assert "Traceback" not in done.err
    assert not list((workplace / "outputs").glob("*/*/*/*")), "a job had begun"


def test_every_unknown_key_of_a_command_is_named_at_once(cli: Cli) -> None:
    done = cli("train.stpes=3", "+foo=1", "rank=4")
    assert "train.steps?" in done.err
    assert "foo is not a key" in done.err


def test_an_unknown_key_that_is_swept_is_refused(cli: Cli, workplace: Path) -> None:
    done = cli("+train.stpes=3,4", "rank=2,4", "-m")
    assert (done.code, "did you mean train.steps?" in done.err) == (1, True)
    assert not list((workplace / "outputs/sweeps").glob("*/*/*"))


FILES = {
    "experiment/nested": "# @package _global_\noptimizer: {lrr: 5}\n",
    "experiment/root": "# @package _global_\nfoo: 5\n",
    "experiment/sweep": "# @package _global_\nhydra: {sweeper: {params: {+train.stpes: '3,4'}}}\n",
    "experiment/group": "# @package _global_\ndefaults: [override /model: smolm2]\n",
    "experiment/type": "# @package _global_\ntrain: {steps: many}\n",
    "optimizer/mine": "name: adamw\nlrr: 5\n",
}


@pytest.fixture
def mine(workplace: Path) -> Path:
    """A ``--config-dir`` with mistakes in it."""
    folder = workplace / "mine"
    for name, text in FILES.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["+experiment=nested"], "optimizer.lrr (experiment/nested) is not a key of the config: did you mean"),
        (["+experiment=root"], "foo (experiment/root) is not a key of the config"),
        (["optimizer=mine"], "optimizer.lrr (optimizer/mine) is not a key of the config: did you mean optimizer.lr"),
        (["+experiment=sweep", "-m"], "train.stpes is not a key of the config: did you mean train.steps?"),
        (["+experiment=group"], "model=smolm2 is not a choice: did you mean smollm2_135m"),
        (["+experiment=type"], "train.steps=many (experiment/type) is not a whole number: such as train.steps=24"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_in_files_are_named_with_the_file(cli: Cli, mine: Path, arguments: list[str], says: str) -> None:
    done = cli("--config-dir", str(mine), *arguments)
    assert done.code == 1
    assert says in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["adapter=lra"], "adapter=lra is not a choice: did you mean lora? (adapter: dora, full, head, lora"),
        (["adapter=lora,lra", "-m"], "adapter=lra is not a choice: did you mean lora?"),
        (["model=smolm2"], "model=smolm2 is not a choice: did you mean smollm2_135m?"),
        (["tracking=mlfow"], "tracking=mlfow is not a choice: did you mean mlflow?"),
        (["+experiment=ranks"], "experiment=ranks is not a choice: did you mean rank_sweep?"),
        (["rank=abc"], "rank=abc is not a whole number: such as rank=8"),
        (["rank=3.5"], "rank=3.5 is not a whole number: such as rank=8"),
        (["rank=null"], "rank=null is not a whole number: such as rank=8"),
        (["rank=8,abc", "-m"], "rank=abc is not a whole number"),
        (["dropout=high"], "dropout=high is not a number: such as dropout=0.0"),
        (["train.gradient_checkpointing=3"], ""),
        (["train.gradient_checkpointing=often"], "train.gradient_checkpointing=often is not true or false"),
        (["optimizer.betas=3"], "optimizer.betas=3 is not a list: such as optimizer.betas=[0.9,0.999]"),
        (["optimizer.betas=[a,1]"], "optimizer.betas[0]=a is not a number: such as optimizer.betas=[0.9,0.999]"),
        (["plan=3"], "plan=3 is not a choice: use default"),
        (["rank=8,16", "-m", "--cfg", "job"], "-m and --cfg exclude each other: leave out all but one"),
        (["hydra.sweep.dirr=3"], "hydra.sweep.dirr is not a key"),
    ],
)
def test_a_wrong_choice_or_type_is_named_with_the_next_move(cli: Cli, arguments: list[str], says: str) -> None:
    done = cli(*arguments, *([] if says else ["--cfg", "job"]))
    assert done.code == (1 if says else 0)
    assert says in done.err
    assert "Traceback" not in done.err
    assert not any(advice in done.err for advice in ADVICE)


@pytest.mark.parametrize(
    "arguments",
    [
        ["+model.targets.mine=[q_proj]"],
        ["+model.architecture.rope.theta=3"],
        ["model.targets={linear: [q]}"],
        ["+experiment=smoke", "++rank=3"],
        ["hydra.job.chdir=true", "+hydra.job.env_set.NAME=x"],
        ["optimizer.betas=[0.8,0.9]", "optimizer=adamw_8bit"],
        ["hydra/job_logging=disabled"],
        ["~model.architecture.vocab_size"],
    ],
    ids=" ".join,
)
def test_what_is_open_stays_open(cli: Cli, arguments: list[str]) -> None:
    done = cli(*arguments, "--cfg", "job")
    assert (done.code, done.err) == (0, "")


def test_a_group_of_ones_own_goes_on_working(cli: Cli, workplace: Path) -> None:
    file = workplace / "mine/bundle/small.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\nrank: 3\n")
    for arguments in (["--config-dir", "mine"], [f"hydra.searchpath=[file://{workplace}/mine]"]):
        done = cli(*arguments, "+bundle=small", "--cfg", "job")
        assert "rank: 3" in done.out, done.err
    (workplace / "mine/experiment").mkdir()
    sweep = "# @package _global_\nhydra: {sweeper: {params: {+bundle: small, data.path: 'nowhere,neither'}}}\n"
    (workplace / "mine/experiment/bundles.yaml").write_text(sweep)
    done = cli("--config-dir", "mine", "+experiment=bundles", "data=text", "tracking=none", "-m")
    assert "not a key" not in done.err
    assert "nowhere" in done.err


def test_a_sweep_over_a_group_of_ones_own_is_told_by_its_choices(
    cli: Cli, workplace: Path, tiny_overrides: list[str]
) -> None:
    (workplace / "mine/bundle").mkdir(parents=True)
    for name, target in (("early", "q_proj"), ("late", "down_proj")):
        text = f"# @package _global_\nrank: {len(name)}\ntargets: [{target}]\n"
        (workplace / f"mine/bundle/{name}.yaml").write_text(text)
    done = cli("--config-dir", "mine", "+bundle=early,late", *tiny_overrides, "train.steps=1", "tracking=none", "-m")
    assert done.code == 0, done.err
    (table,) = workplace.glob("outputs/sweeps/*/*/comparison.csv")
    assert {"bundle", "rank", "targets"} <= set(table.read_text().splitlines()[0].split(","))
    told = table.with_name("verdict.md").read_text()
    assert "bundle=early" in told
    assert "rank=" not in told.partition("Recommended")[0]


def test_the_traceback_comes_when_asked_for(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="adapter/lra"):
        cli("adapter=lra")


def test_overrides_may_stand_on_both_sides_of_a_flag(cli: Cli) -> None:
    assert "rank: 4" in cli("rank=16", "--cfg", "job", "scaling=standard", "rank=4").out
    assert "did you mean rank?" in cli("seed=1,2", "-m", "rnak=4").err


def test_a_sweep_without_m_is_refused_with_the_command_to_type(cli: Cli, workplace: Path) -> None:
    done = cli("+experiment=rank_sweep", "tracking.experiment=my sweep")
    assert done.code == 1
    assert "rank=8,16,64" in done.err
    assert "lora-exp +experiment=rank_sweep 'tracking.experiment=my sweep' -m" in done.err
    assert not list((workplace / "outputs").glob("runs/*/*"))


def test_one_job_of_a_sweep_may_be_chosen(cli: Cli, tiny_overrides: list[str]) -> None:
    done = cli("+experiment=rank_sweep", *tiny_overrides, "rank=2", "task=plan", "tracking=none")
    assert done.code == 0, done.err
