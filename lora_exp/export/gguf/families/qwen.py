"""Qwen2 (also 2.5) and Qwen3, without experts."""

from __future__ import annotations

from gguf import MODEL_ARCH, GGUFWriter

from lora_exp.export.gguf.family import Config, Family, family, warn_of_window


@family("Qwen2ForCausalLM")
class Qwen2(Family):
    arch = MODEL_ARCH.QWEN2

    def describe(self, writer: GGUFWriter, config: Config) -> None:
        super().describe(writer, config)
        if config.use_sliding_window:
            warn_of_window(config)


@family("Qwen3ForCausalLM")
class Qwen3(Qwen2):
    arch = MODEL_ARCH.QWEN3
