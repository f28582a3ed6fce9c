"""What can be asked for by name: the base, and adapters that come and go while the server runs."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_exp.adapters import BASE, LoraModel
from lora_exp.config import TrackingConfig
from lora_exp.errors import UserError
from lora_exp.use.loading import Trained, add_run, tokenizer_of
from lora_exp.use.runs import FoundRun, find_run
from lora_exp.use.serving.asked import RefusedRequestError
from lora_exp.use.serving.engine import Engine
from lora_exp.use.serving.exact import check_routes
from lora_exp.use.serving.prompts import Prompts, prompts_of
from lora_exp.use_config import BestConfig

_NAME = re.compile(r"[\w.:/@+-]{1,200}")
_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Served:
    """One name that can be asked for. ``key``: what the model calls its adapter; ``root``: where it is from."""

    name: str
    key: str
    root: str
    prompts: Prompts
    created: int = field(default_factory=lambda: int(time.time()))


class Adapters:
    """The base by its label, and up to ``most`` adapters. ``folder``: what may be loaded while it runs lies below it.

    Names are looked up in any thread; what changes them runs in the model's, which ``engine`` is.
    """

    def __init__(self, trained: Trained, engine: Engine, names: Sequence[str], most: int, folder: Path) -> None:
        self._trained, self._engine, self._most = trained, engine, most
        self.folder = folder.expanduser().resolve()
        self._numbers = itertools.count(1)
        self.base = self._served_base()
        self._served: dict[str, Served] = {}
        engine.admit(BASE)
        for name, (key, run) in zip(_names(trained, names), trained.runs.items(), strict=True):
            self._check_new(name)
            check_routes(trained, key)
            self._serve(name, key, run)

    def __len__(self) -> int:
        return len(self._served)

    def all(self) -> list[Served]:
        return [self.base, *list(self._served.values())]

    def named(self, name: str) -> Served:
        """Raises RefusedRequestError, 404, for a name that there is not."""
        found = self.base if name == self.base.name else self._served.get(name)
        if found is None:
            have = ", ".join(each.name for each in self.all()[:8])
            raise RefusedRequestError(
                f"there is no model {name[:200]!r}: ask for one of /v1/models ({have})", 404, "model_not_found", "model"
            )
        return found

    def load(self, name: str, path: str) -> None:
        """In the model's thread: add an adapter from a folder below ``folder``. Raises UserError."""
        self._check_new(name)
        run = self._found(path)
        key = f"loaded_{next(self._numbers)}"
        add_run(self._trained, key, run)
        try:
            check_routes(self._trained, key)
            self._serve(name, key, run)
        except BaseException:
            self._remove(key)
            raise

    def unload(self, name: str) -> None:
        """In the model's thread: take an adapter out; requests for it that are in flight end with an error."""
        served = self._served.get(name)
        if served is None:
            raise RefusedRequestError(f"The lora adapter {name[:200]!r} cannot be found.", 404, "model_not_found")
        del self._served[name]
        said = f"the adapter {name!r} was unloaded while it answered"
        self._engine.drop(served.key, RefusedRequestError(said, 404, "model_not_found", "model"))
        self._remove(served.key)

    def _remove(self, key: str) -> None:
        del self._trained.runs[key]
        assert isinstance(self._trained.model, LoraModel)
        self._trained.model.delete_adapter(key)

    def _serve(self, name: str, key: str, run: FoundRun) -> None:
        prompts = prompts_of(run, tokenizer_of(self._trained, run), self._trained)
        self._served[name] = Served(name, key, run.title, prompts)
        self._engine.admit(key)

    def _served_base(self) -> Served:
        label = str(self._trained.config.model.label or self._trained.config.model.name)
        prompts = prompts_of(None, tokenizer_of(self._trained, None), self._trained)
        return Served(label, BASE, label, prompts)

    def _check_new(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UserError(f"the name {name[:200]!r} cannot be used: take letters, digits and any of _ . : / @ + -")
        if name == self.base.name:
            raise UserError(f"{name!r} is what the base is called: choose another name")
        if name in self._served:
            raise UserError(f"The lora adapter {name!r} has already been loaded.")
        if len(self._served) >= self._most:
            raise UserError(f"serve.adapters={self._most} are loaded already: unload one, or start with more")

    def _found(self, path: str) -> FoundRun:
        """The adapter in a folder. Raises UserError for one elsewhere, or that is not safetensors."""
        try:
            folder = Path(path).resolve()
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"lora_path cannot be looked at ({error}): name a folder") from error
        if not self._is_below(folder):
            raise UserError(
                f"lora_path={path} is not below serve.folder={self.folder}: copy it there, or start with run=…"
            )
        if not folder.is_dir():
            raise UserError(f"lora_path={path} is no folder: name an adapter's, or a run's")
        run = find_run(str(folder), BestConfig(), TrackingConfig(enabled=False))
        for name in _FILES:
            file = run.adapter / name
            if not file.is_file():
                raise UserError(f"lora_path={path} has no {name}: name the folder of an adapter in PEFT's format")
            if not self._is_below(file.resolve()):
                raise UserError(f"lora_path={path}: {name} is a link to a place that is not below serve.folder")
        label = run.config.get("model", {}).get("label")
        if label is not None and label != self.base.name:
            raise UserError(f"lora_path={path} was trained on {label}, and the base here is {self.base.name}")
        return run

    def _is_below(self, path: Path) -> bool:
        return path.is_relative_to(self.folder)


def _names(trained: Trained, names: Sequence[str]) -> list[str]:
    """The runs' own short names, or those that were chosen for them."""
    if names and len(names) != len(trained.runs):
        raise UserError(f"serve.names={list(names)} are {len(names)} names for {len(trained.runs)} runs: give one each")
    return list(names or trained.runs)
