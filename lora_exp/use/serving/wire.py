"""Bodies of requests as OpenAI's clients send them, strictly: what is not heeded is refused, never left out unsaid."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_Text = Annotated[str, Field(min_length=1)]
_Tokens = list[Annotated[int, Field(ge=0, lt=2**31)]]
_NEUTRAL: dict[str, tuple[object, ...]] = {  # what clients send that changes nothing
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
}


def _is_text(value: object) -> bool:
    """Whether all text in it can be written as UTF-8."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return all(_is_text(each) for each in [*value, *value.values()])
    return not isinstance(value, list) or all(map(_is_text, value))


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        """Leave out what says nothing; refuse what would have to change the answer, and cannot."""
        if not isinstance(values, dict):
            return values
        if not _is_text(values):
            raise ValueError("it holds half of a character (a lone surrogate): send whole ones")
        given = {key: value for key, value in values.items() if value is not None}
        for key in [key for key in given if key in _NEUTRAL]:
            if given[key] not in _NEUTRAL[key]:
                raise ValueError(f"{key} is not supported here: leave it out")
            del given[key]
        return given


class StreamOptions(Body):
    include_usage: bool = False


class Sampled(Body):
    """What completions and chats have in common."""

    model: _Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=4)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def counts_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Sampled):
    prompt: str | _Tokens | list[str] | list[_Tokens]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each a text, or tokens."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        found: list[str] | list[list[int]] = given
        return found


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("messages")
    @classmethod
    def _ends_with_a_question(cls, messages: list[Message]) -> list[Message]:
        if messages[-1].role == "assistant":
            raise ValueError("the last message is the assistant's already: end with the one to be answered")
        return messages

    @model_validator(mode="after")
    def _asks_for_top(self) -> Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class LoadAdapter(Body):
    """As vLLM has it."""

    lora_name: _Text
    lora_path: _Text


class UnloadAdapter(Body):
    lora_name: _Text
