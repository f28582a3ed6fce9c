"""Sequences that are gone on with together, one token a step; each may join, and leave, between any two steps.

Their keys and values are in one cache, padded on the left, so that the newest tokens are side by side. Positions are
each sequence's own and the padding is masked, so that a sequence is written as it would be alone.

Letters: B sequences, T slots of the longest of them, H heads, D width of a head, V words of the vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from lora_exp.adapters import LoraModel
from lora_exp.data.chat.writing import left_padded

if TYPE_CHECKING:
    from lora_exp.use.loading import Trained


class _Layer(Protocol):
    keys: Tensor
    values: Tensor


class Batch:
    """``names`` says whose adapter each sequence goes through, the routed ones side by side."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.names: list[str] = []
        self._mask = torch.zeros(0, 0, dtype=torch.long)  # (B, T)
        self._cache: Any = None
        self._options = _options(trained)

    def join(self, prompts: Sequence[Sequence[int]], names: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Read prompts, and take them in. Returns the logits (new, V) of their next tokens, in the order given, and
        where each sequence is from: ``order[i]`` was the place of the i-th now, the new ones behind those before."""
        sorted_in = sorted(range(len(names)), key=lambda index: names[index])
        back = sorted(range(len(names)), key=lambda index: sorted_in[index])
        ids, mask = left_padded([prompts[index] for index in sorted_in])
        cache = DynamicCache()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = self._forward(ids, mask, positions, cache, [names[index] for index in sorted_in])
        return logits[back], self._merge(cache, mask, list(names), torch.tensor(back))

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each sequence. Returns the logits (B, V) of the next ones."""
        positions = self._mask.sum(1, keepdim=True)
        self._mask = F.pad(self._mask, (0, 1), value=1)
        return self._forward(torch.tensor(tokens)[:, None], self._mask, positions, self._cache, self.names)

    def keep(self, places: Sequence[int]) -> None:
        """Let all others go."""
        if not places:
            self.names, self._mask, self._cache = [], self._mask[:0, :0], None
            return
        self.names = [self.names[place] for place in places]
        self._take(torch.tensor(list(places)))

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, names: Sequence[str]) -> Tensor:
        device, model = self.trained.place.device, self.trained.model
        own = {"position_ids": positions.to(device)} if "position_ids" in self._options else {}
        routed = model.route_samples(names) if isinstance(model, LoraModel) else contextlib.nullcontext()
        with torch.no_grad(), self.trained.place.compute(), routed:
            out = model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                past_key_values=cache,
                use_cache=True,
                **own,
                **self._options["kept"],
            )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _merge(self, cache: Any, mask: Tensor, names: list[str], order: Tensor) -> list[int]:
        """Put what ``order`` says is in ``cache`` behind what is here, and sort all by adapter."""
        before = len(self.names)
        if self._cache is None:
            self._cache, self._mask, places = cache, mask, order
        else:
            slots = max(self._mask.shape[1], mask.shape[1])
            for ours, theirs in zip(_layers(self._cache), _layers(cache), strict=True):
                ours.keys = torch.cat([_padded(ours.keys, slots), _padded(theirs.keys, slots)])
                ours.values = torch.cat([_padded(ours.values, slots), _padded(theirs.values, slots)])
            both = (F.pad(each, (slots - each.shape[1], 0)) for each in (self._mask, mask))
            self._mask, places = torch.cat([*both]), torch.cat([torch.arange(before), order + before])
        together = [*self.names, *names]
        by_adapter = sorted(range(len(together)), key=lambda place: together[place])
        self.names = [together[place] for place in by_adapter]
        self._take(places[by_adapter])
        return by_adapter

    def _take(self, places: Tensor) -> None:
        """Sequences in another order, or fewer of them, without slots that none has a token in."""
        self._mask = self._mask[places]
        first = int(self._mask.any(0).int().argmax())
        self._mask = self._mask[:, first:]
        for layer in _layers(self._cache):
            here = places.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[here, :, first:], layer.values[here, :, first:]


def _options(trained: Trained) -> Mapping[str, Any]:
    """What this model's forward can be told beside what all can."""
    wrapped = trained.model.wrapped if isinstance(trained.model, LoraModel) else trained.model
    known = inspect.signature(wrapped.forward).parameters
    found: dict[str, Any] = {"kept": {"logits_to_keep": 1} if "logits_to_keep" in known else {}}
    return found | ({"position_ids": True} if "position_ids" in known else {})


def _layers(cache: Any) -> list[_Layer]:
    """Those that hold keys and values: some models let a layer use another's."""
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def _padded(of: Tensor, slots: int) -> Tensor:
    """(B, H, slots, D)"""
    return F.pad(of, (0, 0, slots - of.shape[2], 0))
