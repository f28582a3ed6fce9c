"""Gemma 1, 2 and 3 (text)."""

from __future__ import annotations

from typing import ClassVar

from gguf import MODEL_ARCH, GGUFWriter

from lora_exp.export.gguf.family import Config, Family, family, head_width

LOCAL_BASE = 10000.0  # of the positions in layers that see a window


@family("GemmaForCausalLM")
class Gemma(Family):
    """transformers multiplies by 1 + the weight of a norm, llama.cpp by what the file has."""

    arch = MODEL_ARCH.GEMMA
    activations = ("gelu_pytorch_tanh",)
    norm_shift = 1.0
    own_head = False

    def refusals(self, config: Config) -> list[str]:
        found = super().refusals(config)
        if getattr(config, "use_bidirectional_attention", None):
            found.append("its tokens look ahead")
        return found


class WindowedGemma(Gemma):
    """Every ``period``-th layer sees everything, the others a window. ``large``: the layers of the one size that scales
    its scores by hidden_size / heads, where the others do by the head's width."""

    period: ClassVar[int]
    large: ClassVar[int]

    def refusals(self, config: Config) -> list[str]:
        found = super().refusals(config)
        layers = config.num_hidden_layers
        kinds = ["full_attention" if (n + 1) % self.period == 0 else "sliding_attention" for n in range(layers)]
        if list(config.layer_types) != kinds:
            found.append(f"llama.cpp has layers that see everything at each {self.period}th place alone")
        asked = config.hidden_size / config.num_attention_heads if layers == self.large else head_width(config)
        if config.query_pre_attn_scalar != asked:
            found.append(f"its scores are scaled by {config.query_pre_attn_scalar}, llama.cpp's by {asked:g}")
        return found

    def describe(self, writer: GGUFWriter, config: Config) -> None:
        super().describe(writer, config)
        writer.add_sliding_window(config.sliding_window)
        if getattr(config, "attn_logit_softcapping", None):
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if getattr(config, "final_logit_softcapping", None):
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


@family("Gemma2ForCausalLM")
class Gemma2(WindowedGemma):
    arch = MODEL_ARCH.GEMMA2
    period = 2
    large = 46

    def refusals(self, config: Config) -> list[str]:
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        missing = [name for name in caps if not getattr(config, name)]
        return [*super().refusals(config), *(f"llama.cpp asks for {name}" for name in missing)]


@family("Gemma3ForCausalLM")
class Gemma3(WindowedGemma):
    arch = MODEL_ARCH.GEMMA3
    own_head = True
    period = 6
    large = 62

    def refusals(self, config: Config) -> list[str]:
        found = super().refusals(config)
        if getattr(config, "attn_logit_softcapping", None):
            found.append("llama.cpp's gemma3 does not cap the scores of attention")
        local = config.rope_parameters["sliding_attention"]
        if local.get("rope_type", "default") != "default" or local["rope_theta"] != LOCAL_BASE:
            found.append(f"llama.cpp turns by {LOCAL_BASE:g}, unscaled, in layers that see a window")
        return found
