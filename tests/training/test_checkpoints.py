"""A checkpoint is there whole or not at all; one that is damaged is told from a whole one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from lora_exp.errors import UserError
from lora_exp.training import checkpoints as module
from lora_exp.training.checkpoints import Checkpoints
from lora_exp.training.nested import joined, parted

FILES = ["facts.json", "state.json", "tensors.safetensors", "sha256.json"]


def state(step: int) -> dict[str, Any]:
    return {"weight": torch.full((64,), float(step)), "nested": {1: (step, [torch.arange(3), None]), "1": 0.1 * step}}


def kept(folder: Path, steps: int = 3, keep: int = 2) -> Checkpoints:
    made = Checkpoints(folder, keep, lambda: {"run_id": "x"})
    for step in range(1, steps + 1):
        made.save(step, state(step))
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x"], 3: (1, (2,)), "3": [[], {}]},
        {"nan": [float("inf"), float("-inf")], "tiny": 5e-324, "third": 1 / 3},
        (torch.zeros(()), torch.arange(4, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.bfloat16).T),
        {1: torch.zeros(1), "1": torch.ones(1)},
    ],
)
def test_nested_state_comes_back_as_it_was(value: Any) -> None:
    plain, tensors = parted(value)
    assert repr(joined(json.loads(json.dumps(plain)), tensors)) == repr(value)  # types, dtypes and order, too


@pytest.mark.parametrize("value", [{"a": {object}}, numpy.float64, {(1, 2): 0}])
def test_what_would_have_to_be_pickled_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        parted(value)


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    made = Checkpoints(tmp_path, 2)
    for step in range(1, 7):
        made.save(step, state(step), best=3 if step >= 3 else None)
    assert names(tmp_path) == ["step_00000003", "step_00000005", "step_00000006"]
    found = made.newest()
    assert found is not None
    torch.testing.assert_close(dict(found.state()), state(6), rtol=0, atol=0)


def test_none_at_all_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere").newest() is None


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(bytes(raw))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(
    damage: str, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = kept(tmp_path)
    DAMAGES[damage](tmp_path / "step_00000003" / file)
    found = made.newest()
    assert found is not None
    assert found.step == 2
    assert "The checkpoint of step 3 is passed over" in caplog.text
    made.forget_after(found.step)
    made.save(3, state(3))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000002", "step_00000003"]


def test_nothing_but_damaged_ones_is_an_error_that_names_each(tmp_path: Path) -> None:
    made = kept(tmp_path)
    flip(tmp_path / "step_00000002/state.json")
    (tmp_path / "step_00000003/facts.json").unlink()
    with pytest.raises(UserError, match=r"step 3: facts.json is missing; step 2: state.json is not what was written"):
        made.newest()


@pytest.mark.parametrize("call", ["save_file", "_sync", "file_sha256"])
def test_a_failure_while_writing_leaves_those_before(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kept(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, call, full)
        with pytest.raises(OSError, match="No space left"):
            made.save(4, state(4))
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    found = made.newest()
    assert found is not None
    assert found.step == 3


@pytest.mark.parametrize("at", range(1, 9))
def test_a_process_that_ends_while_it_writes_leaves_those_before(at: int, tmp_path: Path) -> None:
    """At each write to the disk in turn, in a process that does not clean up behind itself."""
    kept(tmp_path)
    pid = os.fork()
    if pid == 0:
        calls = 0
        real = module._sync

        def sync(path: Path) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                os._exit(9)
            real(path)

        module._sync = sync
        Checkpoints(tmp_path, 2).save(4, state(4))
        os._exit(0)
    os.waitpid(pid, 0)
    made = Checkpoints(tmp_path, 2)
    found = made.newest()
    assert found is not None
    assert found.step in (3, 4)
    torch.testing.assert_close(dict(found.state()), state(found.step), rtol=0, atol=0)
    made.save(5, state(5))
    assert names(tmp_path)[-1] == "step_00000005"
    assert len(names(tmp_path)) == 2  # of a half-written one nothing is left


def test_files_are_on_the_disk_before_their_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = module._sync
    monkeypatch.setattr(module, "_sync", lambda path: (synced.append(path.name), real(path)))
    Checkpoints(tmp_path).save(1, state(1))
    assert synced == [*FILES[:3], FILES[3], ".step_00000001.writing", tmp_path.name]


def test_what_shares_memory_is_written_for_each(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    given = {"one": shared, "same": shared, "part": shared[2:4], "turned": shared.view(2, 3).T, "none": torch.zeros(0)}
    Checkpoints(tmp_path).save(1, given)
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    state = found.state()
    assert state.keys() == given.keys()
    assert all(torch.equal(state[name], value) for name, value in given.items())


def test_its_files_are_open_to_whom_the_umask_says(tmp_path: Path) -> None:
    kept(tmp_path)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "step_00000003").iterdir()}
    assert len(modes) == 1
