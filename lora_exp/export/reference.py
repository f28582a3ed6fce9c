"""What a trained model answers, and how far another's answers are from that.

Letters: N texts, T tokens a text, V entries of the vocabulary (or classes), K of them that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lora_exp.adapters.files.safetensors import read_tensors
from lora_exp.errors import UserError
from lora_exp.export.format import Tolerance

FILE = "verification.safetensors"
_TINY = 1e-9
_KEPT = 256  # entries a position, in the copy that an export keeps


@dataclass(frozen=True)
class Reference:
    """The answers to ``tokens`` (N, T): ``values`` (..., K) are the logits of the entries ``indices`` (..., K).

    ``normaliser`` (...,) is the log of the sum of all entries' exponentials, ``rest`` (...,) the log-probability of all
    that are not kept, -inf if none is left out. ``...`` is (N, T), or (N,) of a classifier.
    """

    tokens: Tensor
    indices: Tensor
    values: Tensor
    normaliser: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Figures:
    """``max_logit``: the largest absolute difference, of logits, or of log-probabilities where no more is known.

    ``mean_kl``: KL(trained ‖ read) in nats, the mean over all positions; what was not kept counts as one entry.
    ``loss``: of the next tokens by what was read, ``trained_loss`` by the trained model, where all entries are kept.
    """

    max_logit: float
    mean_kl: float
    loss: float | None = None
    trained_loss: float | None = None

    @property
    def known(self) -> dict[str, float]:
        """Those that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def within(self, tolerance: Tolerance) -> bool:
        """False for NaN."""
        return self.max_logit <= tolerance.max_logit and self.mean_kl <= tolerance.max_kl


def reference_of(tokens: Tensor, logits: Tensor, kept: int | None = None) -> Reference:
    """Of logits (..., V), with the likeliest ``kept`` entries of each position; None: all of them."""
    logits = logits.detach().to("cpu", torch.float32)
    normaliser = logits.logsumexp(-1)
    if kept is None or kept >= logits.shape[-1]:
        indices = torch.arange(logits.shape[-1], dtype=torch.int32).expand(logits.shape)
        return Reference(tokens.cpu(), indices, logits, normaliser, torch.full_like(normaliser, -torch.inf))
    values, indices = logits.topk(kept, -1)
    rest = _rest(logits, indices) - normaliser
    return Reference(tokens.cpu(), indices.to(torch.int32), values, normaliser, rest)


def shortened(reference: Reference, kept: int = _KEPT) -> Reference:
    """The likeliest entries of a reference that holds all."""
    return reference_of(reference.tokens, reference.values, kept)


def compare(reference: Reference, answers: Tensor, log_probabilities: bool = False) -> Figures:
    """``answers`` (..., V): logits; or log-probabilities, NaN of entries that the runtime does not tell.

    Raises UserError for answers to something else.
    """
    expected = (*reference.normaliser.shape,)
    answers = answers.detach().to("cpu", torch.float32)
    if answers.shape[:-1] != expected or answers.shape[-1] <= int(reference.indices.max()):
        raise UserError(
            f"the export answers with {tuple(answers.shape)} where the trained model gave {expected} positions of "
            f"{reference.values.shape[-1]} entries or more: it is not that model"
        )
    if log_probabilities:
        return _compare_told(reference, answers)
    indices = reference.indices.long()
    normaliser = answers.logsumexp(-1)
    found = answers.gather(-1, indices)
    p = reference.values - reference.normaliser[..., None]
    q = found - normaliser[..., None]
    difference = reference.values - found
    kl = (p.exp() * (p - q)).sum(-1)
    if bool(reference.rest.isfinite().any()):
        q_rest = _rest(answers, indices) - normaliser
        kl = kl + reference.rest.exp() * (reference.rest - q_rest)
    losses = _losses(reference, answers)
    return Figures(float(difference.abs().max()), float(kl.mean().clamp_min(0)), *losses)


def _compare_told(reference: Reference, answers: Tensor) -> Figures:
    """By the log-probabilities that the runtime tells, which are of its likeliest entries.

    Of another it is known to be at most the least of them: beyond that it differs by as much as that is below ours. In
    the KL all that is not known on both sides counts as one entry.
    """
    p = (reference.values - reference.normaliser[..., None]).double()
    q = answers.gather(-1, reference.indices.long()).double()
    told = ~q.isnan()
    least = answers.double().nan_to_num(torch.inf).amin(-1, keepdim=True)  # inf of a place without any answer
    difference = torch.where(told, (p - q).abs(), torch.where(least.isinf(), torch.inf, (p - least).clamp_min(0)))
    kl = torch.where(told, p.exp() * (p - q), 0).sum(-1)
    p_rest, q_rest = (1 - torch.where(told, each.exp(), 0).sum(-1) for each in (p, q))
    whole = told.all(-1) & ~reference.rest.isfinite()
    rest = p_rest.clamp_min(_TINY) * (p_rest.clamp_min(_TINY) / q_rest.clamp_min(_TINY)).log()
    return Figures(float(difference.max()), float(torch.where(whole, kl, kl + rest).mean().clamp_min(0)))


def save(reference: Reference, file: Path) -> None:
    """All of it, as safetensors."""
    named = {name: tensor.contiguous().clone() for name, tensor in vars(reference).items()}
    save_file(named, file)


def read(file: Path) -> Reference:
    """Raises UserError for a file that is none."""
    tensors: Mapping[str, Tensor] = read_tensors(file)[0]
    if set(tensors) != set(Reference.__dataclass_fields__):
        raise UserError(f"{file} holds no answers to compare with: copy the export anew")
    return Reference(**tensors)


def _losses(reference: Reference, answers: Tensor) -> tuple[float, float] | tuple[()]:
    """Of what was read and of the trained model, of a language model whose entries are all kept."""
    tokens = reference.tokens
    if answers.dim() != 3 or answers.shape != reference.values.shape or tokens.shape != answers.shape[:2]:
        return ()
    if not torch.equal(reference.indices[0, 0], torch.arange(answers.shape[-1], dtype=torch.int32)):
        return ()
    following = tokens[:, 1:].flatten()
    read, trained = (F.cross_entropy(logits[:, :-1].flatten(0, 1), following) for logits in (answers, reference.values))
    return float(read), float(trained)


def _rest(logits: Tensor, indices: Tensor) -> Tensor:
    """The log of the sum of the exponentials of all entries but ``indices``, (...,)."""
    return logits.scatter(-1, indices.long(), -torch.inf).logsumexp(-1)
