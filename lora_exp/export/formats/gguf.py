"""The merged model as one GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lora_exp.export.format import Format, Tolerance, Wish, export_format

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lora_exp.config import Config
    from lora_exp.use_config import ExportConfig

# What rounding to a type changes of a log-probability at most, and of the whole distribution on average (nats).
TOLERANCES = {
    "f32": Tolerance(0.02, 1e-5),
    "f16": Tolerance(0.05, 1e-4),
    "bf16": Tolerance(0.5, 5e-3),
    "q8_0": Tolerance(0.5, 5e-3),
    "q4_k_m": Tolerance(8.0, 0.5),
}


@export_format("gguf")
class Gguf(Format):
    runtime: ClassVar[str] = "llama.cpp"
    needs: ClassVar[tuple[str, ...]] = ("xllamacpp",)
    extra: ClassVar[str | None] = "gguf"

    def problems(self, config: Config) -> list[str]:
        return type_problems(config, "gguf", list(TOLERANCES))

    def check(self, wish: Wish) -> None:
        from lora_exp.export.gguf.model import check_model

        check_model(wish.trained.model, wish.trained.tokenizer)

    def needed_bytes(self, wish: Wish) -> int:
        from lora_exp.export.gguf.model import weights_of
        from lora_exp.export.gguf.quantising import bytes_of

        return bytes_of(wish.section.type, weights_of(wish.trained.model))

    def write(self, wish: Wish, folder: Path) -> None:
        from lora_exp.export.gguf import model, tokenization

        trained, kind = wish.trained, wish.section.type
        title = f"{trained.config.model.label} {wish.name}"
        with trained.using(wish.name) as adapted:
            state = model.merged(adapted, wish.name)
            path = folder / f"model-{kind}.gguf"
            model.write_model(path, model.plain(adapted), state, trained.tokenizer, kind, title, wish.say)
        tokenization.save(folder, trained.tokenizer)

    def tolerance(self, section: ExportConfig) -> Tolerance:
        return TOLERANCES[section.type]

    def logits(self, folder: Path, tokens: Tensor, base: Path | None) -> Tensor:
        """Log-probabilities, which are logits up to a number a position."""
        from lora_exp.export.gguf import tokenization
        from lora_exp.export.gguf.runtime import Llama

        with Llama(next(folder.glob("*.gguf"))) as llama:
            tokenization.check(folder, llama.tokenize)
            return llama.log_probabilities(tokens)


def type_problems(config: Config, name: str, types: list[str]) -> list[str]:
    """What is wrong with ``export.type``, and with a model that has no GGUF."""
    found = []
    if config.export.type not in types:
        found.append(f"export.type={config.export.type} is none of export={name}: choose one of {', '.join(types)}")
    if config.model.kind != "causal_lm":
        found.append(
            f"export={name} is for language models, and model={config.model.label} is a {config.model.kind}: choose "
            "export=merged"
        )
    return found
