"""Whenever the process ends while a folder is replaced, a whole one is there or is put back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from lora_exp.backends import Adapted
from lora_exp.keeping import save_adapter
from lora_exp.machine import saving
from lora_exp.machine.saving import recover, replace_folder
from lora_exp.training.loop import DivergedError


class Killed(BaseException):
    """Stands for SIGKILL: nothing of our own runs after it."""


def write(version: str, folder: Path) -> None:
    folder.mkdir()
    for name in ("weights", "config"):
        (folder / name).write_text(version)


def version_of(folder: Path) -> str:
    """The one version that both files are of."""
    (version,) = {(folder / name).read_text() for name in ("weights", "config")}
    return version


def killed_after(calls: int, folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Replace ``folder``, but end before the file operation of that number. Returns whether it came to it."""
    made = 0

    def counted(original):  # type: ignore[no-untyped-def]
        def call(*given, **named):  # type: ignore[no-untyped-def]
            nonlocal made
            made += 1
            if made > calls:
                raise Killed
            return original(*given, **named)

        return call

    with monkeypatch.context() as patched:
        for owner, name in ((os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (saving, "_exchanged")):
            patched.setattr(owner, name, counted(getattr(owner, name)))
        patched.setattr(saving.shutil, "rmtree", counted(saving.shutil.rmtree))
        patched.setattr(Path, "write_text", counted(Path.write_text))
        try:
            replace_folder(folder, lambda new: write(version, new))
        except Killed:
            return True
    return False


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_end_at_any_moment_leaves_a_whole_folder(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(saving, "_renameat2", lambda: None)
    for calls in range(100):
        folder = tmp_path / f"{calls}/adapter"
        folder.parent.mkdir()
        replace_folder(folder, lambda new: write("old", new))
        was_killed = killed_after(calls, folder, "new", monkeypatch)
        if exchanges and sys.platform == "linux":
            assert version_of(folder) in ("old", "new")  # there, without anybody's help
        recover(folder)
        assert version_of(folder) in ("old", "new")
        assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
        assert killed_after(2, folder, "third", monkeypatch)  # and the next save does not lose it either
        recover(folder)
        assert version_of(folder) in ("old", "new")
        if not was_killed:
            assert version_of(folder) == "new"
            break
    assert calls > 5


def test_a_failure_while_writing_keeps_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    replace_folder(folder, lambda new: write("old", new))

    def fail(new: Path) -> None:
        write("half", new)
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        replace_folder(folder, fail)
    assert version_of(folder) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders")
def test_linux_exchanges_in_one_step(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other ü"
    write("1", one)
    write("2", other)
    assert saving._exchanged(one, other)
    assert (version_of(one), version_of(other)) == ("2", "1")
    assert not saving._exchanged(one, tmp_path / "absent")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_holds_no_number_is_never_saved_over_a_good_one(value: float, tmp_path: Path) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    adapted = Adapted(torch.nn.Module(), parameters, 12, 12, lambda new: write(str(parameters[1].sum().item()), new))
    folder = tmp_path / "adapter"
    save_adapter(adapted, folder)
    parameters[1].data[1, 0] = value
    with pytest.raises(DivergedError, match=r"lower optimizer\.lr"):
        save_adapter(adapted, folder)
    assert version_of(folder) == "4.0"
