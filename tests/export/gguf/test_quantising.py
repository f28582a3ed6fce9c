"""Number formats: what they hold, and which weight gets which."""

from __future__ import annotations

from collections import Counter

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from lora_exp.errors import UserError
from lora_exp.export.gguf.quantising import Mixture, _by_llama_cpp, encode, shape_in_bytes


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)


# The largest error of a weight in a block, as a share of the block's largest value.
ERRORS = {
    Type.F32: 0.0,
    Type.F16: 5e-4,
    Type.BF16: 4e-3,
    Type.Q8_0: 4.5e-3,
    Type.Q6_K: 0.04,
    Type.Q5_0: 0.04,
    Type.Q4_K: 0.09,
}


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.name)
def test_what_is_encoded_can_be_read(kind: Type, values: np.ndarray) -> None:
    """The reader is the gguf package's, written by others than the quantiser."""
    pytest.importorskip("xllamacpp")
    found = encode(values, kind)
    assert found.shape == shape_in_bytes(values.shape, kind)
    again = gguf.dequantize(found, kind).reshape(values.shape)
    assert np.abs(again - values).max() <= ERRORS[kind] * np.abs(values).max()


def test_llama_cpp_is_called_rightly(values: np.ndarray) -> None:
    """q8_0 by llama.cpp's function, byte for byte that by the gguf package."""
    pytest.importorskip("xllamacpp")
    assert np.array_equal(_by_llama_cpp(values, Type.Q8_0), gguf.quantize(values, Type.Q8_0))


def test_values_that_a_format_cannot_hold(values: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"of 7e.04, above what float16 holds: choose export.type=bf16"):
        encode(np.full((2, 2), 7e4, np.float32), Type.F16)
    with pytest.raises(UserError, match="not finite"):
        encode(np.full((2, 2), np.nan, np.float32), Type.F32)


def _types(kind: str, layers: int, columns: int, inner: int, tied: bool, **options: bool) -> Counter[str]:
    mixture, found = Mixture(kind, layers, tied, **options), Counter[str]()
    ends = ["token_embd.weight"] + ([] if tied else ["output.weight"])
    found.update(mixture.type_of(name, (100, columns)).name for name in ends)
    found.update([mixture.type_of("output_norm.weight", (columns,)).name])
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            found[mixture.type_of(f"blk.{layer}.{name}.weight", (100, columns)).name] += 1
        found[mixture.type_of(f"blk.{layer}.ffn_down.weight", (100, inner)).name] += 1
        found.update(
            mixture.type_of(f"blk.{layer}.{name}.weight", (columns,)).name for name in ("attn_norm", "ffn_norm")
        )
    return found


def test_the_mixture_is_that_of_published_files() -> None:
    """What llama.cpp prints when it loads a Llama 2 7B in Q4_K_M: f32 65, q4_K 193, q6_K 33 tensors."""
    assert _types("q4_k_m", 32, 4096, 11008, tied=False) == {"F32": 65, "Q4_K": 193, "Q6_K": 33}


def test_rows_that_blocks_do_not_divide() -> None:
    """SmolLM2's 576 is no multiple of 256, its 1536 is; and 48 not even of 32."""
    found = _types("q4_k_m", 30, 576, 1536, tied=True)
    assert set(found) == {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}
    assert Mixture("q4_k_m", 2, False).type_of("blk.0.attn_q.weight", (8, 48)) is Type.F16
    assert Mixture("q8_0", 2, False).type_of("blk.0.attn_q.weight", (8, 48)) is Type.F16


def test_the_70b_has_wide_values() -> None:
    plain, wide = (Mixture("q4_k_m", 80, False, wide) for wide in (False, True))
    assert plain.type_of("blk.10.attn_v.weight", (8, 256)) is Type.Q4_K
    assert wide.type_of("blk.10.attn_v.weight", (8, 256)) is Type.Q5_K
    assert wide.type_of("blk.10.ffn_down.weight", (8, 256)) is Type.Q4_K


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_k_m"])
def test_vectors_and_norms_stay_float32(kind: str) -> None:
    mixture = Mixture(kind, 4, False)
    for name, shape in {"blk.0.attn_q.bias": (64,), "blk.0.attn_norm.weight": (64,), "rope_freqs.weight": (8,)}.items():
        assert mixture.type_of(name, shape) is Type.F32
