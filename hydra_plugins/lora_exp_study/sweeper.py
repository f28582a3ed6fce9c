"""The sweeper of a study. Hydra finds it here, and imports it with every command: what it runs is imported later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class StudySweeper(Sweeper):
    """Tunes each arm, and confirms what it chose with fresh seeds, over any launcher. ``params`` as the basic one's."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self._params = dict(params or {})
        self._first = 0

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Returns what the launcher returned for each job."""
        from lora_exp.config import StudyConfig
        from lora_exp.sweep.study import Study

        assert self.config is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        section = OmegaConf.to_object(self.config.study)
        assert isinstance(section, StudyConfig)
        swept, fixed = self._parsed([*(f"{key}={value}" for key, value in self._params.items()), *arguments])
        returned: list[Any] = []
        Study(section, swept, fixed, int(self.config.seed), folder).run(
            lambda jobs: returned.extend(self._launch(jobs))
        )
        return returned

    def _parsed(self, arguments: Sequence[str]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
        """The values of what is swept by key, and the other overrides; the last one of a key counts."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = {each.get_key_element(): each for each in parser.parse_overrides(list(arguments))}
        swept = {key: list(each.sweep_string_iterator()) for key, each in given.items() if each.is_sweep_override()}
        fixed = {key: each for key, each in given.items() if key not in swept and key != "seed"}
        return swept, tuple(f"{key}={each.get_value_element_as_str()}" for key, each in fixed.items())

    def _launch(self, jobs: Sequence[Sequence[str]]) -> Sequence[Any]:
        """Run them to their end; one that failed is the report's to tell."""
        batch = [list(each) for each in jobs]
        self.validate_batch_is_legal(batch)
        returned = self.launcher.launch(batch, initial_job_idx=self._first)
        self._first += len(batch)
        return returned
