"""An adapter alone as a GGUF LoRA.

llama.cpp adds alpha / r times BA to a weight, r being the rank of that pair and alpha one number of the file: there is
no rank-stabilised scaling in it. So alpha is written such that the runtime's scale is ours, and where layers have
different ones, B carries the difference.

Letters: r rank, V entries of the vocabulary, d an embedding's width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from gguf import GGUFType, GGUFWriter, Keys
from torch import Tensor, nn

from lora_exp.adapters import LoraModel
from lora_exp.adapters.inspection.low_rank import LowRank
from lora_exp.errors import UserError
from lora_exp.export.gguf.family import Config, Family, family_of, text_config
from lora_exp.export.gguf.model import names_of
from lora_exp.export.gguf.quantising import FILE_TYPES, Type
from lora_exp.export.gguf.writing import Piece, write

TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16}
MERGED = "use export=gguf, which merges all of it into the weights"
Pairs = Mapping[str, LowRank]  # by layer


def pairs_of(model: nn.Module, name: str) -> Pairs:
    """The adapter's pairs of factors. Raises UserError, with the next move, for what a GGUF LoRA cannot say."""
    if not isinstance(model, LoraModel):
        raise UserError(f"a GGUF LoRA is of an adapter, and this run trained the base's own weights: {MERGED}")
    try:
        pairs = model.low_rank(name)
    except UserError as error:
        raise UserError(f"a GGUF LoRA cannot hold all of this: {error}. Next: {MERGED}") from error
    for layer, pair in pairs.items():
        if pair.layer_type not in ("linear", "embedding"):
            raise UserError(f"a GGUF LoRA is of linear layers and embeddings, and {layer} is another: {MERGED}")
        if _is_tied(model.wrapped, layer):
            raise UserError(
                f"{layer} is embedding and output head at once in this base, and a GGUF LoRA on it would change both "
                f"where the adapter changes one: {MERGED}"
            )
    return pairs


def alpha_of(pairs: Pairs) -> float:
    """What the file says: that of most layers, so that their B stays as it was trained."""
    return Counter(pair.scale * pair.A.shape[0] for pair in pairs.values()).most_common(1)[0][0]


def write_lora(
    path: Path, model: nn.Module, pairs: Pairs, kind: str, title: str = "", say: Callable[[float], object] | None = None
) -> None:
    """``model``: transformers', whose class and config are read. ``kind``: of ``TYPES``."""
    family, config = family_of(model), text_config(model)
    alpha = alpha_of(pairs)

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(FILE_TYPES[kind])
        if title:
            writer.add_name(title)

    write(path, family.name, describe, _pieces(pairs, alpha, family, config, kind), say or (lambda share: None))


def _pieces(pairs: Pairs, alpha: float, family: Family, config: Config, kind: str) -> list[Piece]:
    name_of = names_of(family, config)
    found = []
    for layer, pair in pairs.items():
        key = f"{layer}.weight"
        rank, factor = pair.A.shape[0], pair.scale * pair.A.shape[0] / alpha
        is_embedding = pair.layer_type == "embedding"
        A = pair.A.T if is_embedding else pair.A  # llama.cpp looks up rows (V, r) of an embedding's
        rows = family.rows(key, config)
        B = pair.B if rows is None else pair.B[rows.to(pair.B.device)]
        made = {"a": (tuple(A.shape), partial(_scaled, A, 1.0)), "b": (tuple(B.shape), partial(_scaled, B, factor))}
        assert B.shape[-1] == rank
        for letter, (shape, make) in made.items():
            found.append(Piece(f"{name_of(key)}.lora_{letter}", shape, TYPES[kind], make))
    return found


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor.float() * factor


def _is_tied(model: nn.Module, layer: str) -> bool:
    """Whether a layer is the embedding or the head of a model that has one weight for both."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    return ends[0].weight is ends[1].weight and model.get_submodule(layer) in ends
