"""``task=generate``: prompts answered by base and adapters, next to each other."""

from __future__ import annotations

from pathlib import Path

from lora_exp.config import Config
from lora_exp.data import kind_of
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.task import Task, task
from lora_exp.use_config import GenerateConfig


@task("generate")
class Generate(Task):
    result = UseResult
    of_runs = True

    def problems(self, config: Config) -> list[str]:
        section, data = config.generate, kind_of(config.data)
        found = [*_prompt_problems(section), *_sampling_problems(section)]
        if data.unit != "tokens":
            found.append(f"task=generate is for language models, and data={data.label} ({data.kind}) is for others")
        if config.run is None and not section.base:
            found.append("generate.base=false leaves nobody to answer without a run: add run=… or leave it out")
        if section.out and Path(section.out).expanduser().exists() and not section.overwrite:
            found.append(f"generate.out={section.out} is there: name another file, or add generate.overwrite=true")
        return found

    def run(self, config: Config, job: Job) -> UseResult:
        with signals.at_once():
            from lora_exp.use.generating import generate

        return generate(config, job)


def _prompt_problems(section: GenerateConfig) -> list[str]:
    found = []
    given = [f"generate.{key}" for key in ("prompt", "file", "held_out") if getattr(section, key) is not None]
    if len(given) > 1:
        found.append(f"{' and '.join(given)} are two sources of prompts: leave all but one out")
    prompts = section.prompt if isinstance(section.prompt, list) else [section.prompt]
    if section.prompt is not None and not (prompts and all(isinstance(each, str) for each in prompts)):
        found.append(f"generate.prompt={section.prompt} is neither text nor a list of texts: quote each in the list")
    if section.file not in (None, "-") and not Path(str(section.file)).expanduser().is_file():
        found.append(f"generate.file={section.file} is no file: name a text file, a .jsonl, or - for standard input")
    for key in ("held_out", "max_new_tokens", "batch"):
        if (value := getattr(section, key)) is not None and value < 1:
            found.append(f"generate.{key}={value} is below 1")
    if section.chat is False and section.system:
        found.append("generate.system has no meaning with generate.chat=false: leave one out")
    return found


def _sampling_problems(section: GenerateConfig) -> list[str]:
    found = []
    if not section.temperature >= 0:
        found.append(f"generate.temperature={section.temperature} is below 0: 0 takes the likeliest token, 0.7 draws")
    if not 0 < section.top_p <= 1:
        found.append(f"generate.top_p={section.top_p} is outside (0, 1]")
    if section.top_k is not None and section.top_k < 1:
        found.append(f"generate.top_k={section.top_k} is below 1: leave it out for all tokens")
    if not section.repetition_penalty > 0:
        found.append(f"generate.repetition_penalty={section.repetition_penalty} must be above 0: 1 changes nothing")
    if section.temperature == 0 and (section.top_p < 1 or section.top_k is not None):
        found.append("generate.top_p and generate.top_k have no meaning at temperature 0: add generate.temperature=0.7")
    if not all(isinstance(each, str) and each for each in section.stop):
        found.append(f"generate.stop={section.stop} is no list of texts")
    if not 0 <= section.seed < 2**32:
        found.append(f"generate.seed={section.seed} is outside [0, 2**32)")
    return found
