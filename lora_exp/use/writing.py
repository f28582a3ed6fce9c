"""A model writes: transformers' ``generate`` on a run's model, told as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import TextStreamer

from lora_exp.data.chat.writing import left_padded
from lora_exp.errors import UserError
from lora_exp.machine import signals
from lora_exp.machine.place import set_seed
from lora_exp.models.positions import most_positions
from lora_exp.use_config import GenerateConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.use.loading import Trained
    from lora_exp.use.prompts import Prompt

Say = Callable[[str], object]


@dataclass(frozen=True)
class Answer:
    """``text`` without what ended it. ``tokens``: how many were written; ``finish``: ``stop``, or ``length``."""

    text: str
    tokens: int
    finish: str


@dataclass(frozen=True)
class Writer:
    trained: Trained
    section: GenerateConfig

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.trained.tokenizer

    def write(self, name: str, prompts: Sequence[Prompt], say: Say | None = None) -> list[Answer]:
        """The answers to prompts, together, by a run's model or the base. ``say`` gets the text of a single one so far.

        The seed is set anew, so that every model draws alike and the same call writes the same.
        """
        ends = frozenset().union(*(prompt.ends for prompt in prompts), self._model_ends())
        for prompt in prompts:
            self._check_length(prompt)
        streamer = _Told(self.tokenizer, self.section.stop, say) if say is not None and len(prompts) == 1 else None
        set_seed(self.section.seed)
        with signals.at_once(), self.trained.using(name) as model:
            found = self._generated(cast(Any, model), [prompt.ids for prompt in prompts], sorted(ends), streamer)
        return [self._answer(prompt, ids, ends) for prompt, ids in zip(prompts, found, strict=True)]

    @torch.no_grad()
    def _generated(
        self, model: Any, prompts: list[list[int]], ends: list[int], streamer: TextStreamer | None
    ) -> list[list[int]]:
        ids, mask = left_padded(prompts, self._padding(ends))
        device = self.trained.place.device
        stops = {"stop_strings": list(self.section.stop), "tokenizer": self.tokenizer} if self.section.stop else {}
        with self.trained.place.compute():
            whole = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=self._wished(ends),
                streamer=streamer,
                **stops,
            )
        found: list[list[int]] = whole[:, ids.shape[1] :].tolist()
        return found

    def _wished(self, ends: list[int]) -> GenerationConfig:
        """All that decides which token is taken, so that no default of the model's own files does."""
        section = self.section
        draws = section.temperature > 0
        drawing = {"temperature": section.temperature, "top_p": section.top_p, "top_k": section.top_k or 0}
        return GenerationConfig(
            max_new_tokens=section.max_new_tokens,
            do_sample=draws,
            repetition_penalty=section.repetition_penalty,
            num_beams=1,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=self._padding(ends),
            **(drawing if draws else {}),
        )

    def _padding(self, ends: list[int]) -> int:
        own = self.tokenizer.pad_token_id
        return int(own) if own is not None else ends[0] if ends else 0

    def _model_ends(self) -> frozenset[int]:
        named = getattr(getattr(self.trained.model, "generation_config", None), "eos_token_id", None)
        return frozenset(named if isinstance(named, list) else [] if named is None else [named])

    def _check_length(self, prompt: Prompt) -> None:
        config = cast(PreTrainedModel, self.trained.model).config
        most, asked = most_positions(config.to_dict()), len(prompt.ids) + self.section.max_new_tokens
        if most is not None and asked > most:
            raise UserError(
                f"a prompt of {len(prompt.ids)} tokens and generate.max_new_tokens={self.section.max_new_tokens} are "
                f"more than the {most} positions of model={self.trained.config.model.label}: shorten one"
            )

    def _answer(self, prompt: Prompt, ids: list[int], ends: frozenset[int]) -> Answer:
        place = next((place for place, token in enumerate(ids) if token in ends), None)
        kept = ids if place is None else ids[:place]
        text, stopped = _until(self._text(prompt, kept), self.section.stop)
        return Answer(text, len(kept), "stop" if stopped or place is not None else "length")

    def _text(self, prompt: Prompt, ids: list[int]) -> str:
        """What follows the prompt: decoded with it, as a beginning alone may lose its space."""
        whole, head = (_decoded(self.tokenizer, part) for part in ([*prompt.ids, *ids], prompt.ids))
        return whole[len(head) :] if whole.startswith(head) else _decoded(self.tokenizer, ids)


class _Told(TextStreamer):
    """Tells the text so far, as far as it cannot be the beginning of what ends it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], say: Say) -> None:
        super().__init__(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
        self._said, self._stops, self._say = "", stops, say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._said += text
        shown, stopped = _until(self._said, self._stops)
        held = 0 if stream_end or stopped else max((len(stop) - 1 for stop in self._stops), default=0)
        self._say(shown[: len(shown) - held] if held else shown)


def _until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first of the stops in it, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
