"""What is wrong with a command line or with the files that it composes, said with the next move.

Hydra's own words advise to add an unknown key by a ``+``, by which it is then taken without a word.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from lora_exp.config import ConfigError, conf_folder
from lora_exp.credentials import login_problems, redacted
from lora_exp.errors import UserError
from lora_exp.keys import nearest, unknown_key, unknown_keys, wrong_data, wrong_value
from lora_exp.peft_suite import suite_problems
from lora_exp.plugins import PluginError, import_plugins
from lora_exp.task import tasks

_FULL_ERROR = "HYDRA_FULL_ERROR"
SAVED_NAME = "rerun"  # of a config that was composed from a saved run's
# Of joblib's, submitit's and Python's own pools of processes.
_DEAD_WORKER = ("TerminatedWorkerError", "UncompletedJobError", "BrokenProcessPool")
_DEAD_WORKER_SAID = (
    "A worker process of the launcher died ({}): the jobs in it are lost, those that had ended are kept. If the memory "
    "was too small, run fewer jobs at once (hydra.launcher.n_jobs) or smaller ones"
)


def in_order(arguments: Sequence[str]) -> list[str]:
    """The same command line with its overrides first, as argparse takes none after a flag that follows others."""
    given, later = get_args_parser().parse_known_args(list(arguments))
    if given.shell_completion or not later or any(argument.startswith("-") for argument in later):
        return list(arguments)
    flags, overrides = list(arguments), [*given.overrides, *later]
    for override in overrides:
        flags.remove(override)
    return [*overrides, *flags]


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise ``ConfigError`` for the keys of a command line that are not in the schema."""
    given = get_args_parser().parse_args(list(arguments))
    if given.shell_completion:  # its one argument is no override
        return
    _refuse(_modes(given))
    roots = [conf_folder(), *([Path(given.config_dir)] if given.config_dir else [])]
    overrides = _parsed(given.overrides)
    is_elsewhere = any(override.get_key_element() == "hydra.searchpath" for override in overrides)
    # A file of the user's own may bring a plugin, and that a kind of data: checked when it is composed.
    may_bring_kinds = is_elsewhere or given.config_dir or not _plugins_imported(overrides)
    known = [override for override in overrides if not _is_group(override, roots)]
    if may_bring_kinds:
        known = [override for override in known if not override.key_or_group.startswith("data.")]
    problems = [unknown_key(override.key_or_group) for override in known]
    # Groups of a search path that Hydra alone knows: what they bring is checked when it is composed.
    found = [p for p, o in zip(problems, known, strict=True) if p and not (is_elsewhere and "." not in o.key_or_group)]
    _refuse([*found, *_numbers_for_choices(overrides, roots)])


def check_composed(composed: DictConfig) -> None:
    """The same for what Hydra has composed, its plugins imported, and for the keys that a file lets a sweep go through.

    Raises ``PluginError`` too.
    """
    import_plugins(list(composed.plugins), Path(OmegaConf.select(composed, "hydra.runtime.cwd") or Path.cwd()))
    params = OmegaConf.select(composed, "hydra.sweeper.params") or {}
    sources = OmegaConf.select(composed, "hydra.runtime.config_sources") or []
    roots = [Path(source.path) for source in sources if source.schema == "file"]
    swept = [key.lstrip("+~") for key in params]
    keys = [key for key in swept if not key.startswith("hydra.") and not any((root / key).is_dir() for root in roots)]
    unknown = [*unknown_keys(composed), *(problem for key in keys if (problem := unknown_key(key)))]
    _refuse(unknown or suite_problems(composed) or wrong_data(composed))


def check_mode(composed: DictConfig) -> None:
    """Raise ``ConfigError`` for a single run of what a file wants swept, unless the run chooses one."""
    params = OmegaConf.select(composed, "hydra.sweeper.params") or {}
    given = {override.get_key_element().lstrip("+~") for override in _parsed(composed.hydra.overrides.task)}
    left = {key: value for key, value in params.items() if key.lstrip("+~") not in given}
    if left:
        listed = " ".join(f"{key}={value}" for key, value in left.items())
        one = " ".join(f"{key}={str(value).partition(',')[0]}" for key, value in left.items())
        raise ConfigError(
            [f"this is a sweep ({listed}), and without -m one job would run: {_command('-m')}, or choose one: {one}"]
        )


def refuse_uncomposed(composed: DictConfig) -> None:
    """Raise ConfigError for a task on finished runs that a file names: their config is found by the command line."""
    name = str(composed.task)
    if tasks.problem(name) or not (tasks[name].of_runs or tasks[name].of_exports) or composed.run is None:
        return
    if OmegaConf.select(composed, "hydra.job.config_name") != SAVED_NAME:
        raise ConfigError([f"task={name} and run={composed.run} stand in a file: type both on the command line"])


def swept_keys(composed: DictConfig) -> list[str]:
    """The keys that differ between the jobs of a composed sweep, as they were typed."""
    params = OmegaConf.select(composed, "hydra.sweeper.params") or {}
    given = _parsed([*(f"{key}={value}" for key, value in params.items()), *composed.hydra.overrides.task])
    varying = {override.get_key_element(): override.is_sweep_override() for override in given}  # the last one counts
    return [key.lstrip("+~") for key, is_swept in varying.items() if is_swept]


def expect_schemas() -> None:
    """For a process that composes: Hydra warns where a file of ours has the name of a plugin's schema, as those for its
    launchers have, so that the schema checks them."""
    warnings.filterwarnings("ignore", r"\s*'hydra/(launcher|sweeper)/\w+' is validated against ConfigStore schema")


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """For Hydra's main: say in our words what is wrong, and exit with 1."""
    expect_schemas()
    if os.environ.get(_FULL_ERROR) == "1":
        yield
        return
    os.environ[_FULL_ERROR] = "1"  # Hydra then raises what it would print
    try:
        yield
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        sys.stderr.write(f"{message}\n")
        sys.exit(1)
    finally:
        os.environ.pop(_FULL_ERROR, None)


@contextlib.contextmanager
def printed_without_logins(arguments: Sequence[str]) -> Iterator[None]:
    """For a config that is printed and not run (``--cfg``, ``--info``), of which no callback hears."""
    given = get_args_parser().parse_args(list(arguments))
    if not given.cfg and not given.info:
        yield
        return
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        yield
    if given.cfg and (problems := login_problems(_values(shown.getvalue()))):
        raise ConfigError(problems)
    sys.stdout.write(redacted(shown.getvalue()))


def _values(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # a single value
        return text


def explain(error: Exception) -> str | None:
    """What a person can do about an error of Hydra's, or None for one that is not foreseen."""
    if isinstance(error, UserError):
        return redacted(str(error))
    if type(error).__name__ in _DEAD_WORKER:
        return _DEAD_WORKER_SAID.format(str(error).strip().splitlines()[0])
    place = _place(str(error))
    if isinstance(error, MissingConfigException) and error.options:
        return _wrong_choice(error, place)
    cause = next((e for e in (error.__cause__, error.__context__) if isinstance(e, OmegaConfBaseException)), None)
    if type(error).__name__ == "ConfigCompositionException" and cause is not None and isinstance(cause.full_key, str):
        if isinstance(cause, ValidationError):
            return wrong_value(cause.full_key, cause.value, place)
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return unknown_key(cause.full_key, place) or _not_there(cause)
    return str(error).strip() if isinstance(error, HydraException) else None


def _plugins_imported(overrides: Sequence[Override]) -> bool:
    """Whether the plugins that a command line names are there; one that fails is said when a job has a folder."""
    named = [override.value() for override in overrides if override.key_or_group == "plugins"]
    try:
        for value in named:
            import_plugins([str(name) for name in value] if isinstance(value, list) else [], Path.cwd())
    except PluginError:
        return False
    return True


def _modes(given: argparse.Namespace) -> list[str]:
    """Hydra's own words for two flags of which one counts come with a traceback."""
    flags = {"--run": given.run, "-m": given.multirun, "--cfg": given.cfg, "--info": given.info}
    asked = [flag for flag, is_given in flags.items() if is_given]
    return [f"{' and '.join(asked)} exclude each other: leave out all but one"] if len(asked) > 1 else []


def _parsed(arguments: Sequence[str]) -> list[Override]:
    try:
        return list(OverridesParser.create().parse_overrides(list(arguments)))
    except HydraException:  # Hydra says so itself
        return []


def _is_group(override: Override, roots: Sequence[Path]) -> bool:
    key = override.key_or_group
    is_named = "/" in key or override.package is not None or any((root / key).is_dir() for root in roots)
    return is_named or key.partition(".")[0] == "hydra" or override.is_delete()


def _numbers_for_choices(overrides: Sequence[Override], roots: Sequence[Path]) -> Iterator[str]:
    for override in overrides:
        files = sorted(file.stem for root in roots for file in (root / override.key_or_group).glob("*.yaml"))
        if files and isinstance(value := override.value(), (int, float)):
            yield f"{override.key_or_group}={value} is not a choice: use {', '.join(files)}"


def _wrong_choice(error: MissingConfigException, place: str) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    options = list(error.options or [])
    near = nearest(choice, options)
    meant = (
        f"did you mean {' or '.join(near)}? ({group}: {', '.join(options)})" if near else f"use {', '.join(options)}"
    )
    extra = choice.partition("_")[0]  # as of submitit_local
    if group.startswith("hydra/") and extra in _extras():
        meant = f"pip install 'lora_exp[{extra}]' brings it"
    return f"{group}={choice}{place} is not a choice: {meant}"


def _extras() -> list[str]:
    """What can be installed beside this package."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.metadata("lora_exp").get_all("Provides-Extra") or []
    return []


def _not_there(cause: OmegaConfBaseException) -> str:
    """A key of Hydra's own sections, or of an open mapping, that is not there."""
    known = [str(key) for key in cause.parent_node] if isinstance(cause.parent_node, DictConfig) else []
    above = str(cause.full_key).rpartition(".")[0]
    near = [f"{above}.{name}".lstrip(".") for name in nearest(str(cause.key), known)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"+{cause.full_key}=… adds it"
    return f"{cause.full_key} is not a key of the config: {hint}"


def _command(*more: str) -> str:
    """The command line that was typed, with ``more``."""
    name = "python -m lora_exp" if Path(sys.argv[0]).name in ("__main__.py", "-m") else Path(sys.argv[0]).name
    return f"{name} {shlex.join([*sys.argv[1:], *more])}"


def _place(message: str) -> str:
    file = re.match(r"In '([^']+)'", message)
    return f" ({file[1]})" if file and file[1] != "config" else ""


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
