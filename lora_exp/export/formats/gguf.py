"""The merged model as one GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lora_exp.export.format import Format, Tolerance, Wish, export_format

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lora_exp.config import Config
    from lora_exp.use_config import ExportConfig

# What rounding to a type changes of a log-probability at most, unlikely entries' too, which mean little, and of the
# whole distribution on average (nats). f32: llama.cpp looks some functions up in a table of float16.
TOLERANCES = {
    "f32": Tolerance(0.02, 1e-5),
    "f16": Tolerance(0.1, 1e-4),
    "bf16": Tolerance(1.0, 1e-2),
    "q8_0": Tolerance(4.0, 0.02),
    "q4_k_m": Tolerance(20.0, 1.0),
}


@export_format("gguf")
class Gguf(Format):
    runtime: ClassVar[str] = "llama.cpp"
    needs: ClassVar[tuple[str, ...]] = ("xllamacpp",)
    extra: ClassVar[str | None] = "gguf"
    log_probabilities: ClassVar[bool] = True
    library: ClassVar[str] = "gguf"
    tags: ClassVar[tuple[str, ...]] = ("lora", "llama.cpp")

    def problems(self, config: Config) -> list[str]:
        return type_problems(config, "gguf", list(TOLERANCES))

    def check(self, wish: Wish) -> None:
        from lora_exp.export.gguf.model import check_model
        from lora_exp.export.tokenizing import exported_tokenizer

        check_model(wish.trained.model, exported_tokenizer(wish.trained))

    def needed_bytes(self, wish: Wish) -> int:
        from lora_exp.export.gguf.model import weights_of
        from lora_exp.export.gguf.quantising import bytes_of

        return bytes_of(wish.section.type, weights_of(wish.trained.model))

    def write(self, wish: Wish, folder: Path) -> Mapping[str, object] | None:
        from lora_exp.export.gguf import model, tokenization
        from lora_exp.export.tokenizing import exported_tokenizer

        trained, kind = wish.trained, wish.section.type
        tokenizer = exported_tokenizer(trained)
        assert tokenizer is not None
        with trained.using(wish.name) as adapted:
            state = model.merged(adapted, wish.name)
            path = folder / file_name(wish)
            model.write_model(path, model.plain(adapted), state, tokenizer, kind, title_of(wish), wish.say)
        tokenization.save(folder, tokenizer)
        return None

    def usage(self, wish: Wish, folder: str) -> str:
        file = f"{folder}/{file_name(wish)}"
        return (
            f"With [llama.cpp](https://github.com/ggml-org/llama.cpp):\n\n```bash\nllama-cli -m {file}\n"
            f"llama-server -m {file}\n```\n\nOr what is built on it: Ollama (`FROM ./{file_name(wish)}` in a Modelfile)"
            ", LM Studio, `xllamacpp` and `llama-cpp-python`."
        )

    def tolerance(self, section: ExportConfig) -> Tolerance:
        return TOLERANCES[section.type]

    def logits(self, folder: Path, tokens: Tensor, base: Path | None) -> Tensor:
        """Log-probabilities, which are logits up to a number a position."""
        from lora_exp.export.gguf import tokenization
        from lora_exp.export.gguf.runtime import Llama

        with Llama(next(folder.glob("*.gguf")), context=tokens.shape[1] + 1) as llama:
            tokenization.check(folder, llama.tokenize)
            return llama.log_probabilities(tokens)


def file_name(wish: Wish) -> str:
    return f"model-{wish.section.type}.gguf"


def title_of(wish: Wish) -> str:
    """What the file says that it is."""
    return f"{wish.trained.config.model.label} {wish.name}"


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
