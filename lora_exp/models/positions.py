"""How many positions a language model has, from its config.json: what ``data.block_size`` must not exceed."""

from __future__ import annotations

from collections.abc import Mapping

# Kinds that look each position up in a table, and fail beyond its end. (Rotary and ALiBi positions have no end.)
_FROM_ZERO = {
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small",
    "codegen", "ctrl", "electra", "ernie", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "marian", "mbart",
    "megatron-bert", "mvp", "openai-gpt", "opt", "pegasus", "plbart", "prophetnet", "rembert", "roc_bert", "roformer",
    "trocr", "xlm",
}  # fmt: skip
# Their positions start behind that of the padding.
_FROM_PADDING = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


def most_positions(facts: Mapping[str, object]) -> int | None:
    """The longest block that the model can take at all; None if there is no such limit, or it is not known."""
    kind, length = facts.get("model_type"), trained_positions(facts)
    if length is not None and kind in _FROM_PADDING:
        padding = facts.get("pad_token_id")
        return length - (padding if isinstance(padding, int) else 1) - 1
    return length if kind in _FROM_ZERO else None


def trained_positions(facts: Mapping[str, object]) -> int | None:
    """The longest block that the model was made for, whatever its kind; None if the facts do not say."""
    inner = facts.get("text_config")
    known = inner if isinstance(inner, Mapping) else facts
    values = [known.get(key) for key in ("n_positions", "max_position_embeddings")]
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def length_problem(facts: Mapping[str, object], size: int, label: str | None, field: str = "block_size") -> str | None:
    """Why rows of this ``size``, which ``data.FIELD`` sets, cannot be trained on; None if they can."""
    most = most_positions(facts)
    if most is None or size <= most:
        return None
    return f"data.{field}={size} is more than the {most} positions of model={label}: set it to {most} or less"
