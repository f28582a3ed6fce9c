"""Whether a tensor still holds the values that it held.

torch counts a tensor's in-place changes, but not those of fused optimizers, of other libraries' kernels and of
`.data`. So values are compared with values: small tensors with a copy, large ones by sums over their bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 1 << 16  # bytes
_RUN = 127  # 64-bit words to one sum; odd, so that the same change to all of them cannot add up to none


class Fingerprint:
    """What tensors held when it was taken; cheap to ask on a CPU, where nothing waits for the answer.

    Small tensors are copied. Of large ones the 64-bit words of each KiB are added up, which reads memory once: a
    change is overlooked only if it leaves every sum as it was, such as words that change places within their KiB.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be met in training
            self._places = [place(tensor) for tensor in tensors]
            self._values = [[part.clone() for part in _summary(tensor)] for tensor in tensors]

    def __reduce__(self) -> tuple[type[Fingerprint], tuple[tuple[()]]]:
        return Fingerprint, ((),)  # a copy's tensors lie elsewhere, so it holds none of these

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors` are the same ones with the same values."""
        if [place(tensor) for tensor in tensors] != self._places:  # often decides, at no cost
            return False
        return all(
            torch.equal(part, known)
            for tensor, values in zip(tensors, self._values, strict=True)
            for part, known in zip(_summary(tensor), values, strict=True)
        )


def place(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's values lie, and how often torch itself changed them: differs if they do, but not always."""
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _summary(tensor: Tensor) -> Sequence[Tensor]:
    """The tensor itself, or its sums and the few values that fill none."""
    if tensor.nbytes <= _SMALL:
        return (tensor,)
    flat = _flat(tensor)
    per_word = 8 // flat.itemsize
    skipped = -flat.storage_offset() % per_word  # up to where memory can be read as 64-bit words
    stop = skipped + (len(flat) - skipped) // (per_word * _RUN) * per_word * _RUN
    return flat[skipped:stop].view(torch.int64).view(-1, _RUN).sum(1), flat[:skipped], flat[stop:]


def _flat(tensor: Tensor) -> Tensor:
    """All values in one dimension, in the order of memory where they lie densely."""
    plain = tensor.detach().as_subclass(Tensor)
    if not plain.is_contiguous():
        plain = plain.permute(sorted(range(plain.dim()), key=plain.stride, reverse=True)).contiguous()
    return plain.view(-1)
