"""An MLflow model (pyfunc) that answers prompts: the merged model, with how a prompt is put to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_exp.export.format import Wish, export_format
from lora_exp.export.formats.merged import Merged

if TYPE_CHECKING:
    from torch import Tensor


@export_format("mlflow")
class Mlflow(Merged):
    runtime = "mlflow.pyfunc"
    tags: ClassVar[tuple[str, ...]] = ("lora", "merged", "mlflow")
    registers = True

    def write(self, wish: Wish, folder: Path) -> Mapping[str, object]:
        from lora_exp.tracking.models import save_answering

        facts: dict[str, object] = {}
        asked, example = prompt_of(wish)
        merged = super().write
        save_answering(folder, lambda place: facts.update(merged(wish, place)), asked, example)
        return {**facts, "prompt": asked["prompt"], "title": f"{wish.trained.config.model.label}-merged"}

    def usage(self, wish: Wish, folder: str) -> str:
        asked, example = prompt_of(wish)
        return (
            f'```python\nimport mlflow\n\nmlflow.pyfunc.load_model("{folder}").predict({[example]})\n```\n\n'
            f"`mlflow models serve -m {folder} --env-manager local` serves it on 127.0.0.1:5000 (`POST /invocations`). "
            f"A prompt is put to it as {_SAID[asked['prompt']]}."
        )

    def logits(self, folder: Path, tokens: Tensor, base: Path | None) -> Tensor:
        from lora_exp.export.answers import logits_of
        from lora_exp.tracking.models import answering_model

        model = answering_model(folder)
        return logits_of(model, tokens.to(next(model.parameters()).device))


_SAID = {
    "chat": "a user's message, by the tokenizer's chat template",
    "text": "it is, to be continued",
    "classes": "a text, to be classified",
}


def prompt_of(wish: Wish) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a prompt is put to the model that the run trained, and an example of an input."""
    from lora_exp.data import kind_of

    kind = kind_of(wish.trained.config.data)
    if kind.new_head:
        asked = {"prompt": "classes", "max_length": kind.positions, "ending": kind.ending(wish.trained.tokenizer)}
        return asked, {"text": "The match ended in a draw."}
    chats = kind.chat_template(wish.trained.tokenizer) is not None
    asked = {"prompt": "chat" if chats else "text"}
    return asked, {"prompt": "What is a ship for?" if chats else "In the beginning"}
