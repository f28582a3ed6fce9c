"""Adapted nn.Embedding.

Letters: V entries, d embedding width, r rank, ... any shape of indices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.layers.registry import adapts, forward_override


@adapts("torch.nn.modules.sparse.Embedding")
class LoRAEmbedding(LoRALayerBase, nn.Embedding):
    """e = W[i] + scale * A[i] B: A is looked up, then projected.

    i (...), W (V, d), A (V, r), B (r, d), e (..., d). A starts at zero, B normal (PEFT's choice); no dropout.
    max_norm bounds the whole row W[i] + scale * A[i] B, so that merging changes nothing, and W is not
    renormalised in place.
    """

    layer_type = "embedding"
    out_axis = 1
    takes_dropout = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        rank: int = 8,
        lora_alpha: float = 8.0,
        use_rslora: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, *options, device=device, dtype=dtype)
        self.begin(rank, lora_alpha, 0.0, use_rslora)

    @classmethod
    def refusal(cls, module: nn.Module, rank: int) -> str | None:
        if forward_override(module) is not None and hasattr(module, "embed_scale"):
            return None  # Gemma's: the looked-up row times a constant, which low_rank follows
        return super().refusal(module, rank)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.num_embeddings, rank), (rank, self.embedding_dim)

    def initialise(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.normal_(lora_B)

    def base_forward(self, x: Tensor) -> Tensor:
        # Not the torch layer's own forward where it would renormalise W in place: the base never changes.
        return super().base_forward(x) if self.max_norm is None else self._look_up(x, self.weight)

    def matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dense_weight().T, lora_A, lora_B

    def linear_forward(self, x: Tensor) -> Tensor:
        return self.base_forward(x)

    def low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        dtype = self.weight.dtype
        out = self._look_up(x, lora_A).to(dtype) @ lora_B.to(dtype)
        scale = getattr(self, "embed_scale", None)
        return out if scale is None else out * torch.as_tensor(scale).to(out)

    def combine(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """(V, d)"""
        return lora_A @ lora_B

    def peft_factors(self, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
        """(r, V), (d, r)"""
        return {"lora_embedding_A": lora_A.T, "lora_embedding_B": lora_B.T}

    def finish(self, out: Tensor) -> Tensor:
        if self.max_norm is None:
            return out
        norm = torch.linalg.vector_norm(out.detach(), self.norm_type, dim=-1, keepdim=True)
        return out * torch.where(norm > self.max_norm, self.max_norm / (norm + 1e-7), 1.0)

    def _look_up(self, x: Tensor, table: Tensor) -> Tensor:
        return F.embedding(x, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse)
