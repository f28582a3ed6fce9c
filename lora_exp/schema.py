"""What Hydra composes into, and its one conversion to dataclasses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from lora_exp import peft_suite
from lora_exp.config import DEFAULT_STEPS, Config, ConfigError, DataConfig, conf_folder, data_kinds
from lora_exp.method_file import with_method


@dataclass
class _Schema(Config):
    """What Hydra composes into. Which fields ``data`` has is known when its kind is, so that all are let in here."""

    data: Any = field(default_factory=lambda: asdict(DataConfig()))


def register() -> None:
    """Put the schema where the defaults list of ``conf/config.yaml`` finds it."""
    schema = OmegaConf.structured(_Schema)
    OmegaConf.set_struct(schema.data, False)
    OmegaConf.set_struct(schema.adapter.options, False)
    ConfigStore.instance().store(name="schema", node=schema)
    peft_suite.register()
    OmegaConf.register_new_resolver("lora_exp.choices", _choices, replace=True)


def _choices(group: str) -> str:
    """A group's choices, for ``--help``."""
    return ", ".join(sorted(file.stem for file in (conf_folder() / group).glob("*.yaml")))


def to_config(composed: DictConfig) -> Config:
    """Turn what Hydra composed into dataclasses, once. Raises ``ConfigError`` for values that are not set,
    UserError for a method's file that cannot be read."""
    composed = with_method(composed)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError([f"{key} is not set: add {key}=VALUE" for key in missing])
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    config = Config(**vars(config) | {"data": data_section(composed.data)})
    model = config.model
    model.label = model.label or model.name or (Path(model.path).name if model.path else None)
    if config.train.steps is None and config.train.epochs is None:
        config.train.steps = DEFAULT_STEPS
    return config


def saved_config(file: Path) -> Config:
    """The config that a run has written. Raises ConfigError for one of another version, that lacks a value."""
    given, older = OmegaConf.load(file), {"export": {"format": ""}}  # an older one has no exports
    composed = OmegaConf.merge(ConfigStore.instance().load("schema.yaml").node, older, given)
    assert isinstance(composed, DictConfig)
    return to_config(composed)


def data_section(composed: DictConfig) -> DataConfig:
    """``data`` as its kind has it. Raises UserError for an unknown kind, OmegaConf's errors for a field or a value."""
    given = OmegaConf.to_container(composed, resolve=True)
    kind = data_kinds[str(composed.kind)]
    section = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    assert isinstance(section, DataConfig)
    return section
