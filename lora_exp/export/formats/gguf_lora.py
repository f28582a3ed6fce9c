"""The adapter alone as a GGUF LoRA, to be loaded onto its base in GGUF."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lora_exp.export.format import Format, Tolerance, Wish, export_format
from lora_exp.export.formats.gguf import TOLERANCES, title_of, type_problems

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lora_exp.config import Config
    from lora_exp.use_config import ExportConfig

TYPES = ("f32", "f16", "bf16")


@export_format("gguf_lora")
class GgufLora(Format):
    runtime: ClassVar[str] = "llama.cpp, on the base as a GGUF in float32"
    needs: ClassVar[tuple[str, ...]] = ("xllamacpp",)
    extra: ClassVar[str | None] = "gguf"
    needs_base: ClassVar[bool] = True
    log_probabilities: ClassVar[bool] = True
    library: ClassVar[str] = "gguf"
    tags: ClassVar[tuple[str, ...]] = ("lora", "llama.cpp")

    def problems(self, config: Config) -> list[str]:
        return [*type_problems(config, "gguf_lora", list(TYPES)), *_base_problems(config)]

    def check(self, wish: Wish) -> None:
        from lora_exp.export.gguf.lora import pairs_of
        from lora_exp.export.gguf.model import check_model
        from lora_exp.export.tokenizing import exported_tokenizer

        pairs_of(wish.trained.model, wish.name)
        check_model(wish.trained.model, exported_tokenizer(wish.trained))

    def needed_bytes(self, wish: Wish) -> int:
        from lora_exp.export.gguf.lora import pairs_of
        from lora_exp.export.gguf.quantising import bytes_of

        pairs = pairs_of(wish.trained.model, wish.name).values()
        return bytes_of(wish.section.type, sum(pair.A.numel() + pair.B.numel() for pair in pairs))

    def write(self, wish: Wish, folder: Path) -> Mapping[str, object] | None:
        from lora_exp.export.gguf.lora import alpha_of, pairs_of, write_lora
        from lora_exp.export.gguf.model import plain

        base, kind = plain(wish.trained.model), wish.section.type
        pairs = pairs_of(wish.trained.model, wish.name)
        write_lora(folder / _file_name(wish), base, pairs, kind, title_of(wish), wish.say)
        return {"alpha": alpha_of(pairs)}

    def usage(self, wish: Wish, folder: str) -> str:
        file = f"{folder}/{_file_name(wish)}"
        return (
            "On the base as a GGUF, made by llama.cpp's `python convert_hf_to_gguf.py FOLDER`:\n\n```bash\n"
            f"llama-cli -m BASE.gguf --lora {file}\nllama-server -m BASE.gguf --lora {file}\n```\n\n"
            "The file's `adapter.lora.alpha` is such that llama.cpp's alpha / rank is the scale it was trained with."
        )

    def tolerance(self, section: ExportConfig) -> Tolerance:
        return TOLERANCES[section.type]

    def logits(self, folder: Path, tokens: Tensor, base: Path | None) -> Tensor:
        """Log-probabilities, which are logits up to a number a position; the base's GGUF is made for them and gone."""
        import tempfile
        from pathlib import Path as AnyPath

        from lora_exp.export.gguf.model import write_base
        from lora_exp.export.gguf.runtime import Llama

        assert base is not None
        with tempfile.TemporaryDirectory() as place:
            model = AnyPath(place) / "base.gguf"
            write_base(model, base)
            with Llama(model, next(folder.glob("*.gguf")), tokens.shape[1] + 1) as llama:
                return llama.log_probabilities(tokens)


def _file_name(wish: Wish) -> str:
    return f"lora-{wish.section.type}.gguf"


def _base_problems(config: Config) -> list[str]:
    """No GGUF base has the weights that a quantised run's adapter was trained on."""
    if config.quantization.name == "none" or not config.export.verify:
        return []
    return [
        f"the run was trained on a base in {config.quantization.name}, and its adapter fits those weights, which no "
        "base in GGUF has: choose export=gguf, which holds them with the adapter merged, or export.verify=false to put "
        "the adapter on other ones all the same"
    ]
