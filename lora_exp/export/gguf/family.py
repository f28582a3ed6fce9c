"""What a family of architectures looks like in llama.cpp: its name there, its fields, what becomes of its weights.

A file in ``families/`` says ``@family("LlamaForCausalLM")``, by transformers' class, above a class that follows
``Family``. Letters: d a head's width.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType
from torch import Tensor, nn

from lora_exp.errors import UserError
from lora_exp.registry import Registry

log = logging.getLogger(__name__)
Config = Any  # a transformers config, whose fields differ from class to class
SCALINGS = {
    "default": None,
    "linear": RopeScalingType.LINEAR,
    "yarn": RopeScalingType.YARN,
    "llama3": None,  # says all in a tensor of its own
}


class Family:
    """``interleaved``: whether llama.cpp turns neighbours of a head by one angle, where transformers turns halves.

    ``norm_shift``: what transformers adds to the weight of a norm when it is used. ``own_head``: whether the output
    head may be another weight than the embedding. ``activations``: transformers' names of the one that llama.cpp has.
    ``takes_biases``: whether its layers may have biases that a config switches on.
    """

    arch: ClassVar[MODEL_ARCH]
    activations: ClassVar[tuple[str, ...]] = ("silu", "swish")
    interleaved: ClassVar[bool] = False
    norm_shift: ClassVar[float] = 0.0
    own_head: ClassVar[bool] = True
    takes_biases: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """llama.cpp's."""
        return MODEL_ARCH_NAMES[self.arch]

    def refusals(self, config: Config) -> list[str]:
        """What of a model llama.cpp would compute otherwise, or not at all."""
        found = []
        if (activation := _activation(config)) not in self.activations:
            found.append(f"its activation is {activation}, and llama.cpp's {self.name} has {self.activations[0]}")
        if (kind := rope(config).get("rope_type", "default")) not in SCALINGS:
            found.append(f"its positions are scaled by {kind}, and we write {', '.join(SCALINGS)}")
        if (share := rope(config).get("partial_rotary_factor") or 1.0) != 1.0:
            found.append(f"it turns {share} of each head alone")
        biases = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
        if biases and not self.takes_biases:
            found.append(f"it has biases ({', '.join(biases)}), and llama.cpp's {self.name} none")
        return found

    def describe(self, writer: GGUFWriter, config: Config) -> None:
        """Add the family's fields."""
        heads = config.num_attention_heads
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
        writer.add_key_length(head_width(config))
        writer.add_value_length(head_width(config))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        self.describe_positions(writer, config)

    def describe_positions(self, writer: GGUFWriter, config: Config) -> None:
        settings = rope(config)
        writer.add_rope_dimension_count(head_width(config))
        writer.add_rope_freq_base(float(settings["rope_theta"]))
        scaling = SCALINGS[settings.get("rope_type", "default")]
        if scaling is None:
            return
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(float(settings["factor"]))
        if scaling is RopeScalingType.YARN:
            original = settings.get("original_max_position_embeddings") or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(int(original))
            writer.add_rope_scaling_yarn_beta_fast(float(settings.get("beta_fast") or 32))
            writer.add_rope_scaling_yarn_beta_slow(float(settings.get("beta_slow") or 1))

    def extra(self, config: Config) -> dict[str, Tensor]:
        """Tensors that transformers computes from the config, by llama.cpp's names."""
        if rope(config).get("rope_type") != "llama3":
            return {}
        return {"rope_freqs.weight": _frequency_divisors(config)}

    def rows(self, name: str, config: Config) -> Tensor | None:
        """The order in which llama.cpp has the output features of a weight, a bias or a B; None: as they are.

        Where neighbours are turned, feature i of a head's first half comes beside feature i of its second.
        """
        layer = name.rpartition(".")[0]
        if not self.interleaved or not layer.endswith(("q_proj", "k_proj")):
            return None
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        heads, width = keys if layer.endswith("k_proj") else config.num_attention_heads, head_width(config)
        return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).reshape(-1)

    def values(self, name: str, tensor: Tensor, config: Config) -> Tensor:
        """A tensor of the model, in float32, as llama.cpp has it."""
        if (rows := self.rows(name, config)) is not None:
            tensor = tensor[rows]
        return tensor + self.norm_shift if self.norm_shift and name.endswith("norm.weight") else tensor


families: Registry[type[Family]] = Registry("architecture", "lora_exp.export.gguf.families")
family = families.add


def family_of(model: nn.Module) -> Family:
    """Raises UserError for a model that we cannot write, with the next move."""
    name = type(model).__name__
    if families.problem(name):
        raise UserError(f"{_reason(name)}: {elsewhere()}")
    found = families[name]()
    if problems := found.refusals(text_config(model)):
        raise UserError(f"export=gguf cannot write this {name}: {'; '.join(problems)}. Next: {elsewhere()}")
    return found


def elsewhere() -> str:
    """What else leads to a GGUF."""
    return (
        "write export=merged, and convert that folder with llama.cpp's own converter: "
        "python convert_hf_to_gguf.py FOLDER"
    )


def text_config(model: nn.Module) -> Config:
    """The config of a model's language part."""
    config: Any = model.config
    return config.get_text_config()


def head_width(config: Config) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope(config: Config) -> dict[str, Any]:
    """How positions are turned; of the layers that see everything, where others see a window."""
    settings = getattr(config, "rope_parameters", None) or {}
    found: dict[str, Any] = settings.get("full_attention", settings)
    return found


def warn_of_window(config: Config) -> None:
    """Say where llama.cpp looks further back than the model was trained to."""
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        log.warning(
            f"this model looks at the last {window} tokens alone, and llama.cpp at all of them: in texts longer than "
            f"that it answers otherwise (its -c {window} keeps to them)"
        )


def _reason(name: str) -> str:
    if name.endswith("ForCausalLM"):
        return f"export=gguf writes {', '.join(families.names())}, and this is {name}"
    return f"export=gguf writes language models with a head for the next token, and this is {name}"


def _activation(config: Config) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu"))


def _frequency_divisors(config: Config) -> Tensor:
    """(d / 2,) by which llama.cpp divides each frequency: the plain frequency over the one that transformers takes."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width = head_width(config)
    scaled, _ = ROPE_INIT_FUNCTIONS[rope(config)["rope_type"]](config, torch.device("cpu"))
    plain = 1.0 / rope(config)["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / scaled
