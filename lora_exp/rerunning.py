"""Commands about saved runs: their own values are composed, whatever the defaults are by now.

``rerun=FOLDER`` runs one again. ``run=…`` of a task on finished runs (``task=export run=best``) takes the first's.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_exp.composing import SAVED_NAME
from lora_exp.config import ConfigError, TrackingConfig, conf_folder
from lora_exp.determining import OF_A_TASK, OF_ONE_COMMAND
from lora_exp.task import Task, tasks
from lora_exp.use.runs import PROVENANCE, FoundRun, base_named, find_export, find_run, names_of
from lora_exp.use_config import BestConfig

_KEY = "rerun="
_OF_ONE_TASK = ("plan", "trainer", "parallel", *OF_A_TASK, *OF_ONE_COMMAND)
_CHOSEN_ALWAYS = ("export",)  # has no meaning without a choice, and an older run has none
_USED = "outputs/used/${now:%Y-%m-%d}/${now:%H-%M-%S-%f}"  # where tasks on finished runs have their own folders
_Section = TypeVar("_Section", BestConfig, TrackingConfig)


@contextlib.contextmanager
def saved_config_composed(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The command line turned into what makes Hydra compose the config of the run that it names, if it names one.

    Hydra's own settings stay this package's, and other overrides go on top. Raises UserError.
    """
    _refuse_bare_config(arguments)
    asked = [argument for argument in arguments if argument.startswith(_KEY)]
    others = [argument for argument in arguments if not argument.startswith(_KEY)]
    if asked:
        folder = Path(asked[-1].removeprefix(_KEY)).expanduser()
        primary = _primary(_saved(folder, "rerun"), OF_ONE_COMMAND, others)
    elif not (_task_of(others).of_runs or _task_of(others).of_exports):
        yield others
        return
    elif runs := _found(others):
        others = [argument for argument in others if not argument.startswith("run=")]
        primary = _of_runs(runs, others)
    else:  # about the base alone, which no run's config is needed for
        folders = {"hydra.run.dir": _USED, "hydra.sweep.dir": _USED}
        yield [*others, *(f"{key}={value}" for key, value in folders.items() if not _typed(others, key))]
        return
    with tempfile.TemporaryDirectory() as place:
        OmegaConf.save(primary, Path(place) / f"{SAVED_NAME}.yaml")
        yield [*others, "--config-path", place, "--config-name", SAVED_NAME]


def _task_of(arguments: Sequence[str]) -> type[Task]:
    """The command line's task; one that is not known is said when it is composed."""
    asked = [str(value) for value in _values(arguments, "task=")]
    return tasks[asked[-1]] if asked and not tasks.problem(asked[-1]) else Task


def _found(arguments: Sequence[str]) -> list[FoundRun]:
    """The finished runs that a command line is about: ``run=A run=B``, or ``run=[A,B]``."""
    named = list(dict.fromkeys(name for value in _values(arguments, "run=") for name in names_of(value)))
    if _task_of(arguments).of_exports:
        return [find_export(name) for name in named]
    best = _filled(BestConfig(), "best", arguments)
    tracking = _filled(_chosen_tracking(arguments), "tracking", arguments)
    return list(dict.fromkeys(find_run(name, best, tracking) for name in named))


def _filled(section: _Section, key: str, arguments: Sequence[str]) -> _Section:
    """The section with what the command line gives its fields; a wrong type is said when it is composed."""
    for field in fields(section):
        if given := _values(arguments, f"{key}.{field.name}="):
            setattr(section, field.name, given[-1])
    return section


def _chosen_tracking(arguments: Sequence[str]) -> TrackingConfig:
    """The file of ``tracking`` that a command line chooses: it says where runs are looked up."""
    chosen, section = _values(arguments, "tracking="), TrackingConfig()
    known, _ = get_args_parser().parse_known_args(list(arguments))
    roots = [*([Path(known.config_dir)] if known.config_dir else []), conf_folder()]
    files = [root / f"tracking/{chosen[-1]}.yaml" for root in roots] if chosen else []
    for file in (file for file in files if file.is_file()):
        loaded = OmegaConf.load(file)
        for field in fields(section):
            if isinstance(loaded, DictConfig) and field.name in loaded:
                setattr(section, field.name, loaded[field.name])
        break
    return section


def _values(arguments: Sequence[str], key: str) -> list[Any]:
    """What the command line gives ``key``, in order. Raises ConfigError for several to go through."""
    found = []
    for argument in arguments:
        if not argument.startswith(key):
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            continue  # Hydra says so itself
        if override.is_sweep_override():
            instead = ": several runs are a list, run=[A,B], or run=A run=B" if key == "run=" else " here"
            raise ConfigError([f"{argument} is not swept{instead}"])
        value = override.value()
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        found.append(argument.removeprefix(key) if is_number and key == "run=" else value)  # an id of digits alone
    return found


def _of_runs(runs: Sequence[FoundRun], others: Sequence[str]) -> dict[str, Any]:
    """The first run's config, to be used; of an adapter that lies alone, the defaults with the base that it names."""
    first = runs[0]
    if first.folder is not None or (first.adapter / PROVENANCE).is_file():
        primary = _primary(_saved(first.folder or first.adapter, "run"), _OF_ONE_TASK, others)
    else:
        model = None if _typed(others, "model") else _base_choice(first.adapter)
        primary = _composed({}, _groups() | ({"model": model} if model else {}))
        if model == "hf":
            primary["model"] = {"name": base_named(first.adapter)}
    primary["run"] = [str(run.place) for run in runs]
    primary["hydra"] = {**primary["hydra"], "run": {"dir": _USED}, "sweep": {**primary["hydra"]["sweep"], "dir": _USED}}
    return primary


def _base_choice(adapter: Path) -> str:
    """The file of ``conf/model`` whose model an adapter is for; ``hf``, which takes a name, if none is."""
    named = base_named(adapter)
    if named is None and not (adapter / "adapter_config.json").is_file():
        raise ConfigError(
            [f"run={adapter} holds a model and no adapter: use it as a base, model=hf model.path={adapter}"]
        )
    for file in sorted((conf_folder() / "model").glob("*.yaml")):
        raw = OmegaConf.to_container(OmegaConf.load(file))  # a name may be an interpolation of the whole config
        if named and isinstance(raw, dict) and raw.get("name") == named:
            return file.stem
    return "hf"


def _saved(folder: Path, key: str) -> DictConfig:
    for file in (folder / "config.yaml", folder / ".hydra/config.yaml"):
        if file.is_file() and isinstance(loaded := OmegaConf.load(file), DictConfig) and _is_saved(loaded):
            return loaded
    if (exported := _exported(folder)) is not None:
        return exported
    raise ConfigError(
        [f"{key}={folder} has no config.yaml of a run: name a job's folder, such as outputs/runs/DATE/TIME"]
    )


def _exported(folder: Path) -> DictConfig | None:
    """The config that an export keeps, of the run that it was made of."""
    try:
        kept = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["config"]
        loaded = OmegaConf.create(kept)
    except (OSError, ValueError, LookupError, TypeError, OmegaConfBaseException):
        return None
    return loaded if isinstance(loaded, DictConfig) and _is_saved(loaded) else None


def _is_saved(loaded: DictConfig) -> bool:
    """A resolved config has values where one to be composed has a list of defaults."""
    return "defaults" not in loaded and "model" in loaded and "adapter" in loaded


def _primary(saved: DictConfig, left_out: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """A config to compose: the ``saved`` values, but for those ``left_out`` and groups that are chosen anew."""
    values = OmegaConf.to_container(saved, resolve=False)
    assert isinstance(values, dict)
    kept = {str(key): value for key, value in values.items() if key not in left_out}
    anew = {
        group: choice
        for group, choice in _groups().items()
        if _typed(others, group) or (group not in kept and group in _CHOSEN_ALWAYS)
    }
    return _composed({key: value for key, value in kept.items() if key not in anew}, anew)


def _composed(values: Mapping[str, Any], groups: Mapping[str, str]) -> dict[str, Any]:
    own = _own()
    hydra = {**own["hydra"], "searchpath": [f"file://{conf_folder()}"]}
    overriding = [each for each in own["defaults"] if isinstance(each, dict) and _is_override(each)]
    chosen = [{group: choice} for group, choice in groups.items()]
    return {"defaults": ["schema", *chosen, *overriding, "_self_"], **values, "hydra": hydra}


def _groups() -> dict[str, str]:
    """Each group with its default choice."""
    listed = [each for each in _own()["defaults"] if isinstance(each, dict) and not _is_override(each)]
    return {str(group): str(choice) for each in listed for group, choice in each.items()}


def _own() -> dict[str, Any]:
    own = OmegaConf.to_container(OmegaConf.load(conf_folder() / "config.yaml"), resolve=False)
    assert isinstance(own, dict)
    return {str(key): value for key, value in own.items()}


def _is_override(entry: Mapping[str, Any]) -> bool:
    return str(next(iter(entry))).startswith("override")


def _typed(others: Sequence[str], group: str) -> bool:
    """Whether a file of a group is chosen on the command line."""
    return any(argument.startswith(f"{group}=") for argument in others)


def _refuse_bare_config(arguments: Sequence[str]) -> None:
    """A saved config given to Hydra as it is lacks what Hydra needs: its own settings, and the types."""
    given, _ = get_args_parser().parse_known_args(list(arguments))
    if not given.config_path:
        return
    file = Path(given.config_path) / f"{(given.config_name or 'config').removesuffix('.yaml')}.yaml"
    if file.is_file() and isinstance(loaded := OmegaConf.load(file), DictConfig) and _is_saved(loaded):
        folder = file.parent.parent if file.parent.name == ".hydra" else file.parent
        raise ConfigError([f"{file} is a saved run's: run it again by rerun={folder}, without --config-path"])
