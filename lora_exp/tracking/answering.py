"""A model in MLflow's registry that answers prompts. This file is copied into the model, and there needs no lora_exp.

Columns in: ``prompt``, or ``messages``, a list of {role, content}; of a classifier ``text``. Out: ``answer``, or
``label`` and ``score``. ``facts.json`` beside the model says how a prompt is put to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pandas
from mlflow.pyfunc.model import PythonModel


class Answering(PythonModel):
    """``model`` and ``tokenizer`` are transformers'."""

    def load_context(self, context: Any) -> None:
        import torch
        import transformers

        folder = Path(context.artifacts["model"])
        self.facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        given: dict[str, Any] = {"dtype": torch.float32 if device == "cpu" else "auto"}
        if hasattr(config, "quantization_config"):
            given = {"device_map": {"": device}}
        self.model = kind.from_pretrained(folder, **given).eval().requires_grad_(False)
        if "device_map" not in given:
            self.model.to(device)

    # Without types, from which MLflow would make a signature in the place of the one that it is given.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        rows = model_input.to_dict("records") if isinstance(model_input, pandas.DataFrame) else list(model_input)
        if self.facts["prompt"] == "classes":
            return pandas.DataFrame([self._classified(row["text"]) for row in rows])
        return pandas.DataFrame({"answer": [self._answer(self._tokens(row), params or {}) for row in rows]})

    def _tokens(self, row: dict[str, Any]) -> Any:
        """(1, T): by the chat template of a model that learnt from chats, else the text as it is."""
        messages, prompt = row.get("messages"), row.get("prompt")
        asked: list[dict[str, str]] = []
        if messages is not None and not isinstance(messages, float):  # NaN is a table's gap
            asked = [dict(each) for each in messages]
        elif not isinstance(prompt, str):
            raise ValueError("give each row a prompt, or messages: a list of {role, content}")
        elif self.facts["prompt"] == "text":
            return self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        else:
            asked = [{"role": "user", "content": prompt}]
        if not self.tokenizer.chat_template:
            raise ValueError("this model has no chat template: give each row a prompt")
        text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def _answer(self, tokens: Any, params: dict[str, Any]) -> str:
        import torch

        tokens, temperature = tokens.to(self.model.device), float(params.get("temperature", 0.0))
        sampling = {"temperature": temperature, "top_p": float(params.get("top_p", 1.0))} if temperature else {}
        written = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=int(params.get("max_new_tokens", 64)),
            do_sample=bool(temperature),
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
            **sampling,
        )
        return str(self.tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True))

    def _classified(self, text: str) -> dict[str, Any]:
        given = self._ended(text)
        scores = self.model(**given.to(self.model.device)).logits[0].softmax(-1)
        best = int(scores.argmax())
        return {"label": self.model.config.id2label[best], "score": float(scores[best])}

    def _ended(self, text: str) -> Any:
        """(1, T): cut and ended as in training; what else a token of the suffix has is the token's before it."""
        suffix, after = self.facts["ending"]
        given = self.tokenizer(text, truncation=True, max_length=self.facts["max_length"] - len(suffix))
        end = len(given["input_ids"]) - after
        for name, ids in given.items():
            more = suffix if name == "input_ids" else ids[end - 1 : end] * len(suffix)
            given[name] = [[*ids[:end], *more, *ids[end:]]]
        return given.convert_to_tensors("pt")


if __name__ != "lora_exp.tracking.answering":  # run by MLflow, as the model's code
    mlflow.models.set_model(Answering())
