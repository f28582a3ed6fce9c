"""Llama (SmolLM 1 and 2 are Llamas), Mistral and SmolLM3."""

from __future__ import annotations

from gguf import MODEL_ARCH, GGUFWriter

from lora_exp.export.gguf.family import Config, Family, family, warn_of_window

EVERY = 4  # llama.cpp's: each fourth layer of SmolLM3 turns nothing


@family("LlamaForCausalLM")
class Llama(Family):
    arch = MODEL_ARCH.LLAMA
    interleaved = True
    takes_biases = True

    def describe(self, writer: GGUFWriter, config: Config) -> None:
        super().describe(writer, config)
        writer.add_vocab_size(config.vocab_size)


@family("MistralForCausalLM")
class Mistral(Llama):
    """llama.cpp runs it as a Llama."""

    def describe(self, writer: GGUFWriter, config: Config) -> None:
        super().describe(writer, config)
        warn_of_window(config)


@family("SmolLM3ForCausalLM")
class SmolLM3(Llama):
    arch = MODEL_ARCH.SMOLLM3
    takes_biases = False

    def refusals(self, config: Config) -> list[str]:
        expected = [int((layer + 1) % EVERY != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) == expected:
            return super().refusals(config)
        return [*super().refusals(config), f"llama.cpp has positions in all its layers but each {EVERY}th"]
