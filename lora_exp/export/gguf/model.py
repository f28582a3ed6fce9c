"""A whole language model as one GGUF."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gguf import GGUFWriter, TensorNameMap, get_tensor_name_map
from torch import Tensor, nn

from lora_exp.adapters import LoraModel
from lora_exp.adapters.inspection.parameter_counts import count_parameters
from lora_exp.errors import UserError
from lora_exp.export.gguf import tokenizer as tokenizers
from lora_exp.export.gguf.family import Config, Family, elsewhere, families, family_of, text_config
from lora_exp.export.gguf.quantising import FILE_TYPES, Mixture
from lora_exp.export.gguf.writing import Piece, write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

State = Mapping[str, Callable[[], Tensor]]  # a model's tensors by transformers' names, each made when it is called
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BIG = 80  # layers of a 70B Llama


def plain(model: nn.Module) -> nn.Module:
    """transformers' model, whatever is around it."""
    return model.wrapped if isinstance(model, LoraModel) else model


def merged(model: nn.Module, adapter: str | None) -> State:
    """A model's tensors with an adapter merged in, in as many digits as there are."""
    if isinstance(model, LoraModel):
        return model.merged_tensors(adapter)
    return {key: partial(_same, value) for key, value in model.state_dict().items()}


def write_model(
    path: Path,
    model: nn.Module,
    state: State,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    title: str = "",
    say: Callable[[float], object] = lambda share: None,
) -> None:
    """``state``: the tensors of ``model``, whose class and config alone are read. ``kind``: of ``FILE_TYPES``."""
    family, config = family_of(model), text_config(model)
    state = _without_tied_head(state, family)
    rows = state[_EMBEDDING]().shape[0]

    def describe(writer: GGUFWriter) -> None:
        if title:
            writer.add_name(title)
        writer.add_file_type(FILE_TYPES[kind])
        family.describe(writer, config)
        tokenizers.describe(writer, tokenizer, config, rows)

    write(path, family.name, describe, _pieces(state, family, config, kind), say)


def write_base(path: Path, folder: Path) -> None:
    """A folder in hub layout as a GGUF, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    write_model(path, model, merged(model, None), AutoTokenizer.from_pretrained(folder), "f32")


def weights_of(model: nn.Module) -> int:
    """How many weights a model has, those that it uses twice once, stored in 4 bits or not."""
    if isinstance(model, LoraModel):
        trained, whole = model.parameter_counts()
        return whole - trained
    return count_parameters((), list(model.parameters()))[1]


def check_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise UserError, with the next move, for what cannot be written."""
    base = plain(model)
    family_of(base)
    assert tokenizer is not None  # language models have one
    tokenizers.check(tokenizer, base.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def names_of(family: Family, config: Config) -> Callable[[str], str]:
    """From transformers' name of a tensor to llama.cpp's. Raises UserError for one that has none there."""
    known = get_tensor_name_map(family.arch, config.num_hidden_layers)
    return partial(_named, known, family)


def _named(known: TensorNameMap, family: Family, name: str) -> str:
    found = known.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"llama.cpp's {family.name} has no place for {name}: {elsewhere()}")
    return found


def _pieces(state: State, family: Family, config: Config, kind: str) -> list[Piece]:
    name_of = names_of(family, config)
    keys = getattr(config, "num_key_value_heads", config.num_attention_heads)
    shares = config.num_hidden_layers == _BIG and keys != config.num_attention_heads
    mixture = Mixture(kind, config.num_hidden_layers, _HEAD not in state, family.name == "llama" and shares)
    found = []
    for key, make in state.items():
        shape, name = tuple(make().shape), name_of(key)
        found.append(Piece(name, shape, mixture.type_of(name, shape), partial(_values, family, key, make, config)))
    for name, tensor in family.extra(config).items():
        shape = tuple(tensor.shape)
        found.append(Piece(name, shape, mixture.type_of(name, shape), partial(_same, tensor)))
    return found


def _values(family: Family, key: str, make: Callable[[], Tensor], config: Config) -> Tensor:
    return family.values(key, make().detach().float().cpu(), config)


def _without_tied_head(state: State, family: Family) -> State:
    """Leave out a head that has the embedding's values: llama.cpp takes those where there is no other."""
    if _HEAD not in state or torch.equal(state[_HEAD](), state[_EMBEDDING]()):
        return {key: make for key, make in state.items() if key != _HEAD}
    if not family.own_head:
        raise UserError(
            f"the run changed the embedding or the output head alone, and llama.cpp's {family.name} has one weight for "
            f"both: train neither, or use export=merged (families with two: "
            f"{', '.join(name for name in families.names() if families[name].own_head)})"
        )
    return state


def _same(tensor: Tensor) -> Tensor:
    return tensor
