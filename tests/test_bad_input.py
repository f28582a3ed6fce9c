"""Bad input: one clear error, a non-zero exit code, no traceback, nothing left RUNNING."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

from lora_exp.config import ModelConfig
from lora_exp.errors import UserError
from lora_exp.models import find_source

Cli = Callable[..., "Finished"]  # noqa: F821  # of conftest.py


def unfinished(workplace: Path) -> list[str]:
    """Runs that MLflow still believes in."""
    database = workplace / "outputs/mlflow.db"
    if not database.exists():
        return []
    client = MlflowClient(f"sqlite:///{database}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.run_id for run in client.search_runs(experiments) if run.info.status == "RUNNING"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rank=0", "rank=0 is below 1"),
        ("rank=-1", "rank=-1 is below 1"),
        ("rank=3.5", "3.5"),
        ("rank=1000000000", "1000000000"),
        ("alpha=x", "alpha=x is neither"),
        ("dropout=1.0", "dropout=1.0 is outside"),
        ("targets=[q_prog]", "q_proj"),
        ("data.path=nowhere.txt", "nowhere.txt does not exist"),
        ("data.block_size=100000", "fewer than one block of 100000"),
        ("train.micro_batch_size=99999", "more than the"),
        ("model.path=nowhere", "has no config.json"),
        ("device=quantum", "device=quantum is not a device"),
        ("model.dtype=float8", "choose one of auto"),
        ("model.dtype=float16", "float16 trains on a GPU only"),
        ("tracking.uri=http://127.0.0.1:9", "127.0.0.1:9 cannot be reached"),
        ("adapter=lroa", "lora"),
        ("rnak=8", "did you mean rank?"),
        ("task=fly", "task=fly is not known"),
    ],
)
def test_one_clear_error(cli: Cli, tiny_overrides: list[str], workplace: Path, override: str, says: str) -> None:
    done = cli(*tiny_overrides, override)
    assert done.code == 1
    assert says in done.err
    assert "Traceback" not in done.err
    assert unfinished(workplace) == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.path=nowhere.txt"], "data.path=nowhere.txt does not exist"),
        (["data.path=notes.pdf"], "none of the kinds that are read"),
        (["data.path=[]"], "data.path=[]: it names no file"),
        (["data.path={data.csv: 0}"], "data.csv has the weight 0"),
        (["data.validation_path=[data.csv,nowhere.csv]"], "data.validation_path=nowhere.csv does not exist"),
        (["data.name=org/name"], "are two sources: leave one out"),
        (["data.test_split=test"], "data.test_split=test is of a dataset of the hub: add data.name"),
        (["data.test_fraction=0.96"], "leave nothing to train on"),
        (["model.path=nowhere"], "model.path=nowhere has no config.json, as it does not exist"),
        (["model.path=."], "model.path=. has no config.json"),
        (["data.path=nowhere.txt", "model.path=nowhere"], "The config has 2 problems"),
    ],
)
def test_a_path_that_cannot_be_used_leaves_no_run_behind(
    cli: Cli, tiny_overrides: list[str], workplace: Path, overrides: list[str], says: str
) -> None:
    (workplace / "data.csv").write_text("text\nwords")
    (workplace / "notes.pdf").write_text("[]")
    done = cli(*tiny_overrides, *overrides)
    assert done.code == 1
    assert says in done.err
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    assert client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]) == []


def test_data_too_small_for_a_micro_batch_are_refused_before_the_base_is_loaded(
    cli: Cli, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_exp.models.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    done = cli(*tiny_overrides, "train.micro_batch_size=99999")
    assert done.code == 1
    assert "train.micro_batch_size=99999 is more than the" in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_here_is_named_with_those_that_are(cli: Cli, tiny_overrides: list[str]) -> None:
    done = cli(*tiny_overrides, "device=cuda:1")
    assert done.code == 1
    assert "device=cuda:1 is not on this machine (it has: 1 cpu)" in done.err


def test_the_server_is_asked_before_the_model_is_loaded(
    cli: Cli, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_exp.models.find_source", lambda *_: pytest.fail("the model was looked for"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = cli(*tiny_overrides, f"tracking.uri=http://127.0.0.1:{port}")
    assert "cannot be reached" in done.err
    assert "tracking=none" in done.err


def test_outputs_that_cannot_be_written(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    shutil.rmtree(workplace / "outputs")
    (workplace / "outputs").write_text("a file where a folder should be")
    for mode in ([], ["-m"]):
        done = cli(*tiny_overrides, *mode)
        assert done.code == 1
        assert "cannot be written" in done.err
        assert "Traceback" not in done.err


def test_a_corrupt_checkpoint(cli: Cli, tiny_overrides: list[str], tiny_llama: Path, workplace: Path) -> None:
    broken = workplace / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = cli(*tiny_overrides, f"model.path={broken}")
    assert done.code == 1
    assert "could not be loaded" in done.err
    assert f"{broken} copied anew" in done.err
    assert "pip install" not in done.err
    assert "Traceback" not in done.err
    assert unfinished(workplace) == []


def test_a_base_that_gives_nan_untrained_is_not_blamed_on_the_learning_rate(
    cli: Cli, tiny_overrides: list[str], tiny_llama: Path, workplace: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = workplace / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    done = cli(*tiny_overrides, f"model.path={broken}")
    assert done.code == 1
    assert "before anything is trained: the base's weights are damaged" in done.err
    assert "lower optimizer.lr" not in done.err


def test_a_loss_that_is_not_finite_keeps_what_was_earned(
    cli: Cli, tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli(*tiny_overrides, "optimizer.lr=1e30", "train.max_grad_norm=inf")
    assert done.code == 1
    assert "lower optimizer.lr" in done.err
    assert unfinished(workplace) == []
    (folder,) = (workplace / "outputs/runs").glob("*/*")
    assert (folder / "metrics.jsonl").read_text().count("\n") >= 1


def test_a_full_disk_is_one_line_and_leaves_nothing_running(
    cli: Cli, tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28), "adapter_model.safetensors")

    monkeypatch.setattr("lora_exp.keeping.save_adapter", full)
    done = cli(*tiny_overrides)
    assert done.code == 1
    assert "No space left on device" in done.err
    assert "Traceback" not in done.err
    assert unfinished(workplace) == []


@pytest.mark.parametrize("where", ["lora_exp.training.loop.train", "lora_exp.models.heads.AutoModelForCausalLM"])
def test_a_memory_that_is_full_comes_with_advice(
    cli: Cli, tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class Full:
        def __call__(self, *_: object, **__: object) -> None:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you …")

        from_pretrained = __call__

    monkeypatch.setattr(where, Full())
    done = cli(*tiny_overrides)
    assert done.code == 1
    assert "Out of memory on cpu" in done.err
    assert "Ways to get it" not in done.err
    assert unfinished(workplace) == []


@pytest.mark.parametrize(("place", "is_trained"), [("_prepare", False), ("summed_up", True)])
def test_an_error_claims_only_what_is_there(
    cli: Cli, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, place: str, is_trained: bool
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28), "somewhere")

    monkeypatch.setattr(f"lora_exp.run.{place}", full)
    done = cli(*tiny_overrides)
    assert "No space left on device" in done.err
    assert ("what was trained so far is in" in done.err) is is_trained


def test_a_tracking_error_before_training_speaks_of_nothing_trained(
    cli: Cli, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such table")

    monkeypatch.setattr("lora_exp.tracking.mlflow.experiment_id", broken)
    done = cli(*tiny_overrides)
    assert "no such table" in done.err
    assert "tracking=none" in done.err
    assert "trained" not in done.err


def test_an_unforeseen_error_is_named_and_its_traceback_filed(
    cli: Cli, tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr("lora_exp.run.adapt", broken)
    done = cli(*tiny_overrides)
    assert done.code == 1
    assert "RuntimeError: out of memory, say" in done.err
    assert "Traceback (" not in done.err
    (filed,) = (workplace / "outputs/runs").glob("*/*/traceback.txt")
    assert "in broken" in filed.read_text()


def _mismatched(*_: object, **__: object) -> None:
    list(zip([1, 2], [3], strict=True))  # a bug, and a ValueError, as every message is


_WHERE = (
    "packing.resident.load_data",
    "backends.native.targeted",
    "training.trainers.native.lane_of",
    "checks._place_problems",
)
BUGS = [f"lora_exp.{name}" for name in _WHERE]


@pytest.mark.parametrize("where", BUGS)
def test_a_bug_is_no_message(
    cli: Cli, tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(where, _mismatched)
    done = cli(*tiny_overrides)
    assert done.code == 1
    (filed,) = (workplace / "outputs/runs").glob("*/*/traceback.txt")
    assert "ValueError: zip() argument 2 is shorter than argument 1" in done.err
    assert f"The traceback is in {filed}" in done.err
    assert "in _mismatched" in filed.read_text()
    assert "Traceback (" not in done.err
    assert unfinished(workplace) == []


def test_a_bug_inside_of_a_librarys_call_is_no_damaged_model(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_exp.models.causal_lm as room

    source = "def broken(*_, **__):\n    list(zip([1, 2], [3], strict=True))\n"
    ours: dict[str, Any] = {}
    exec(compile(source, str(Path(room.__file__).with_name("made_up.py")), "exec"), ours)
    section = ModelConfig(path=str(tiny_llama))
    monkeypatch.setattr(room.AutoTokenizer, "from_pretrained", ours["broken"])
    with pytest.raises(ValueError, match="zip") as caught:
        room.load_tokenizer(find_source(section), section)
    assert not isinstance(caught.value, UserError)


DAMAGE = {
    "tokenizer.json": '{"version": "1.0", "model": {"type": "nonsense"}}',
    "config.json": '{"model_type": "llama", "num_attention_heads": "many"}',
}


@pytest.mark.parametrize("file", DAMAGE)
def test_files_that_a_library_cannot_read_are_said_to_be_damaged(
    cli: Cli, tiny_overrides: list[str], tiny_llama: Path, workplace: Path, file: str
) -> None:
    broken = workplace / "broken"
    shutil.copytree(tiny_llama, broken)
    (broken / file).write_text(DAMAGE[file])
    done = cli(*tiny_overrides, f"model.path={broken}", "tracking=none")
    assert done.code == 1
    assert "could not be loaded" in done.err
    assert f"{broken} copied anew" in done.err
    assert not list((workplace / "outputs/runs").glob("*/*/traceback.txt"))


def test_the_traceback_comes_when_asked_for(
    cli: Cli, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="rank=0 is below 1"):
        cli(*tiny_overrides, "rank=0")
