"""The command line as a Hydra user expects it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf

from lora_exp import __version__
from lora_exp.config import DEFAULT_STEPS, conf_folder
from lora_exp.job import read_outcome

Cli = Callable[..., "Finished"]  # noqa: F821  # of conftest.py
HEAVY = ("torch", "transformers", "mlflow", "datasets", "peft", "matplotlib")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "rank=8,16,64 -m"),
        (["--cfg", "job"], 0, "rank: 8"),
        (["rank=0"], 1, "rank=0 is below 1"),
        (["rank=3.5"], 1, "3.5"),
        (["adapter=lroa"], 1, "lora"),
        (["rnak=8"], 1, "did you mean rank?"),
        (["rank=8,abc", "-m"], 1, "abc"),
    ],
)
def test_help_and_config_errors_answer_without_heavy_imports(
    arguments: list[str], code: int, says: str, workplace: Path
) -> None:
    program = (
        "import atexit, sys; from lora_exp.__main__ import main\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules]))\n"
        f"sys.argv = ['lora-exp', *{arguments!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "HEAVY []" in done.stdout
    assert "Traceback" not in done.stderr


def test_help_shows_groups_knobs_and_examples(cli: Cli) -> None:
    done = cli("--help")
    for word in ("adapter: dora, full, head, lora", "scaling: rslora, standard", "targets=", "Examples",
                 "lora_exp.tracking.ui"):  # fmt: skip
        assert word in done.out


def test_help_is_true(cli: Cli) -> None:
    """Every choice of the groups it explains is there, and the defaults in brackets are the config's."""
    text = cli("--help").out.partition("The knobs")[2]
    for group in ("adapter", "layer", "scaling", "quantization", "tracking"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {group}=")]
        assert all(file.stem in line for file in (conf_folder() / group).glob("*.yaml"))
    default = OmegaConf.create(cli("--cfg", "job").out)
    knobs = re.findall(r"^  ([\w.]+)=\S+ .*\[(.*)\]$", text, re.MULTILINE)
    assert len(knobs) >= 12
    for key, shown in knobs:
        value = OmegaConf.select(default, key)
        name = value.get("label", value.get("name")) if OmegaConf.is_config(value) else value
        if key == "tracking":
            name = "mlflow" if value.enabled else "none"
        if key == "model":
            name = f"{default.model.label}, {default.data.label}"
        derived = {"targets": "the model's own", "train.steps": str(DEFAULT_STEPS)}  # null there
        assert shown == derived.get(key, str(name)), key


def test_version_is_ours_and_names_the_libraries(cli: Cli) -> None:
    done = cli("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"lora_exp {__version__} (Python ")
    assert "torch 2" in done.out


def test_the_font_cache_is_not_reported(workplace: Path) -> None:
    logs = conf_folder() / "hydra"
    for kind in ("hydra_logging", "job_logging"):
        file = logs / kind / "lora_exp.yaml"
        done = subprocess.run(
            [sys.executable, "-c", FONTS, str(file)], capture_output=True, text=True, check=False,
            env={**os.environ, "MPLCONFIGDIR": str(workplace / kind)},
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FONTS = """
import logging.config, sys
from omegaconf import OmegaConf
settings = OmegaConf.to_container(OmegaConf.load(sys.argv[1]))
settings["handlers"].pop("file", None)
settings["root"]["handlers"] = ["console"]
logging.config.dictConfig(settings)
import lora_exp.plots
"""


def test_a_run_leaves_everything_it_promises(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    done = cli(*tiny_overrides, "rank=4")
    assert done.code == 0, done.err
    assert "Initial Parameters" in done.out
    assert "|| Trainable Proportion" in done.out
    (folder,) = (workplace / "outputs/runs").glob("*/*")
    outcome = read_outcome(folder)
    assert outcome is not None
    assert outcome.result is not None
    assert outcome.status == "FINISHED"
    assert outcome.result.eval_loss < outcome.result.eval_loss_before
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "eval/loss" in r] == [0, 2, 4]
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 3, 4]
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    run = client.get_run(outcome.result.run_id)
    assert run.info.status == "FINISHED"
    for name in ("rank", "alpha", "scale", "scaling", "adapter", "layer", "quantization", "model", "data",
                 "optimizer.lr", "seed", "backend"):  # fmt: skip
        assert name in run.data.params
    for name in ("params/trainable", "params/total", "params/trainable_percent", "adapter_bytes", "train/loss",
                 "train/lr", "train/grad_norm", "train/tokens_per_s", "eval/loss", "eval/perplexity",
                 "eval/loss_before", "peak_memory_gib", "wall_s"):  # fmt: skip
        assert name in run.data.metrics, name
    assert run.data.metrics["eval/loss"] == pytest.approx(outcome.result.eval_loss)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert len(run.data.tags["base_files_sha256"]) == 64
    assert "version.torch" in run.data.tags
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert artifacts >= {"config.yaml", "overrides.txt", "adapter", "metrics.jsonl", "loss_curve.png"}
    assert "rank: 4" in (folder / "config.yaml").read_text()


def test_a_sweep_is_a_parent_run_with_its_jobs_as_children(
    cli: Cli, tiny_overrides: list[str], workplace: Path
) -> None:
    done = cli(*tiny_overrides, "rank=2,4", "scaling=standard,rslora", "-m")
    assert done.code == 0, done.err
    assert "Sweep, best first" in done.out
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lora_exp").experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("lora_exp.kind") == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.data.tags["sweep_id"] for run in runs}) == 1
    table = parent.data.tags["mlflow.note.content"]
    assert "| job | rank | scaling |" in table
    assert "| seed |" not in table
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    pictures = {f"loss_{rest}.png" for rest in (
        "curves", "against_rank", "against_scaling", "against_parameters", "against_time", "against_memory"
    )}  # fmt: skip
    assert artifacts == {"comparison.csv", "comparison.md", "report.html", "verdict.json", "verdict.md", *pictures}


def test_one_failed_job_does_not_stop_the_others(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    done = cli(*tiny_overrides, "rank=2,1000000000,4", "-m")
    assert done.code == 1
    assert "rank" in done.err
    assert "Traceback" not in done.err
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lora_exp").experiment_id])
    is_parent = {run.info.run_id: run.data.tags.get("lora_exp.kind") == "sweep" for run in runs}
    by_rank = {"parent" if is_parent[run.info.run_id] else run.data.params["rank"]: run.info.status for run in runs}
    assert by_rank == {"parent": "FAILED", "2": "FINISHED", "1000000000": "FAILED", "4": "FINISHED"}
    assert "FAILED: " in done.out


def test_experiments_and_config_dir_work(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    mine = workplace / "mine" / "experiment"
    mine.mkdir(parents=True)
    (mine / "small.yaml").write_text("# @package _global_\nrank: 3\nscaling: {name: standard}\n")
    done = cli("--config-dir", str(mine.parent), "+experiment=small", *tiny_overrides, "tracking=none", "train.steps=1",
               "train.warmup_steps=0")  # fmt: skip
    assert done.code == 0, done.err
    (folder,) = (workplace / "outputs/runs").glob("*/*")
    outcome = read_outcome(folder)
    assert outcome is not None
    assert (outcome.values["rank"], outcome.values["scaling"]) == (3, "standard")


def test_shell_completion_knows_the_groups(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "lora-exp scaling=")
    monkeypatch.setenv("COMP_POINT", "17")
    done = cli("-sc", "query=bash")
    assert set(done.out.split()) == {"scaling=rslora", "scaling=standard"}
