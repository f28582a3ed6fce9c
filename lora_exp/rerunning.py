"""``rerun=FOLDER``: what a saved run was configured with, value by value, whatever the defaults are by now."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from lora_exp.config import ConfigError, conf_folder

_KEY = "rerun="
_NAME = "rerun"
_OF_ONE_RUN = ("resume",)  # where it went on from is no part of what it was


@contextlib.contextmanager
def saved_config_composed(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The command line with ``rerun=FOLDER`` turned into what makes Hydra compose that folder's config.

    Hydra's own settings stay this package's, and other overrides go on top. Raises ConfigError.
    """
    _refuse_bare_config(arguments)
    asked = [argument for argument in arguments if argument.startswith(_KEY)]
    others = [argument for argument in arguments if not argument.startswith(_KEY)]
    if not asked:
        yield others
        return
    folder = Path(asked[-1].removeprefix(_KEY)).expanduser()
    _refuse_groups(folder, others)
    with tempfile.TemporaryDirectory() as place:
        OmegaConf.save(_primary(_saved(folder)), Path(place) / f"{_NAME}.yaml")
        yield [*others, "--config-path", place, "--config-name", _NAME]


def _saved(folder: Path) -> DictConfig:
    for file in (folder / "config.yaml", folder / ".hydra/config.yaml"):
        if file.is_file() and isinstance(loaded := OmegaConf.load(file), DictConfig) and _is_saved(loaded):
            return loaded
    raise ConfigError(
        [f"rerun={folder} has no config.yaml of a run: name a job's folder, such as outputs/runs/DATE/TIME"]
    )


def _is_saved(loaded: DictConfig) -> bool:
    """A resolved config has values where one to be composed has a list of defaults."""
    return "defaults" not in loaded and "model" in loaded and "adapter" in loaded


def _primary(saved: DictConfig) -> dict[str, Any]:
    own = OmegaConf.to_container(OmegaConf.load(conf_folder() / "config.yaml"), resolve=False)
    assert isinstance(own, dict)
    hydra = {**own["hydra"], "searchpath": [f"file://{conf_folder()}"]}
    groups = [
        group for group in own["defaults"] if isinstance(group, dict) and next(iter(group)).startswith("override")
    ]
    values = OmegaConf.to_container(saved, resolve=False)
    assert isinstance(values, dict)
    kept = {str(key): value for key, value in values.items() if key not in _OF_ONE_RUN}
    return {"defaults": ["schema", *groups, "_self_"], **kept, "hydra": hydra}


def _refuse_groups(folder: Path, others: Sequence[str]) -> None:
    named = [argument for argument in others if (conf_folder() / argument.partition("=")[0].lstrip("+~")).is_dir()]
    if named:
        raise ConfigError(
            [
                f"{named[0]} chooses a file, but rerun={folder} has every value already: change values (rank=4), or "
                f"type what was typed ({folder / 'overrides.txt'}) with {named[0]}"
            ]
        )


def _refuse_bare_config(arguments: Sequence[str]) -> None:
    """A saved config given to Hydra as it is lacks what Hydra needs: its own settings, and the types."""
    given, _ = get_args_parser().parse_known_args(list(arguments))
    if not given.config_path:
        return
    file = Path(given.config_path) / f"{(given.config_name or 'config').removesuffix('.yaml')}.yaml"
    if file.is_file() and isinstance(loaded := OmegaConf.load(file), DictConfig) and _is_saved(loaded):
        folder = file.parent.parent if file.parent.name == ".hydra" else file.parent
        raise ConfigError([f"{file} is a saved run's: run it again by rerun={folder}, without --config-path"])
