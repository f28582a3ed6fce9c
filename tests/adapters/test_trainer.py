"""transformers' Trainer around a LoraModel, with its defaults: columns and labels are found as on the base."""

import copy
import inspect
import pickle

import pytest
import torch

from lora_exp.adapters import LoraConfig, LoraModel


def dataset(columns):
    from datasets import Dataset

    rows = [[1, 5, 7, 3], [2, 9, 4, 4], [6, 6, 1, 8], [3, 1, 2, 2]]
    made = {"input_ids": rows, "attention_mask": [[1] * 4] * 4, "text": ["a b"] * 4, "idx": [0, 1, 2, 3]}
    return Dataset.from_dict({**made, **columns(rows)})


def kinds():
    import transformers as hf

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 29}
    llama = hf.LlamaConfig(**small, intermediate_size=24, pad_token_id=0)
    bert = hf.BertConfig(**small, intermediate_size=24, num_labels=2)
    return {
        "lm": (hf.LlamaForCausalLM, llama, lambda rows: {"labels": rows}),
        "classifier": (hf.BertForSequenceClassification, bert, lambda rows: {"label": [0, 1, 1, 0]}),
        "answers": (
            hf.BertForQuestionAnswering,
            bert,
            lambda rows: {"start_positions": [0, 1, 2, 3], "end_positions": [1, 2, 3, 3]},
        ),
    }


def trainer_for(model, data, folder, **options):
    import transformers as hf

    arguments = hf.TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return hf.Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["lm", "classifier", "answers"])
def test_trainer_with_its_defaults(kind, tmp_path):
    make, config, columns = kinds()[kind]
    torch.manual_seed(0)
    base = make(config)
    data = dataset(columns)
    expected = trainer_for(copy.deepcopy(base), data, tmp_path)
    model = LoraModel(base, LoraConfig(rank=2), verbose=False)
    trainer = trainer_for(model, data, tmp_path)
    assert trainer.label_names == expected.label_names
    assert trainer.model_accepts_loss_kwargs == expected.model_accepts_loss_kwargs
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], rel=1e-5)
    before = {key: p.clone() for key, p in model.adapter_parameters().items()}
    trainer.train()
    assert any(not torch.equal(p, before[key]) for key, p in model.adapter_parameters().items())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_label_smoothing_shifts_the_labels_of_a_language_model(tmp_path):
    make, config, columns = kinds()["lm"]
    torch.manual_seed(0)
    base = make(config)
    data = dataset(columns)
    expected = trainer_for(copy.deepcopy(base), data, tmp_path, label_smoothing_factor=0.1).evaluate()
    model = LoraModel(base, LoraConfig(rank=2), verbose=False)
    found = trainer_for(model, data, tmp_path, label_smoothing_factor=0.1).evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


class Named(LoraModel):
    """A user's own subclass."""


@pytest.mark.parametrize("kind", [LoraModel, Named])
@pytest.mark.parametrize("way", ["as it is", "deepcopy", "pickle", "pickle of a copy"])
def test_forward_has_the_wrapped_models_signature(way, kind, tiny, tokens, randomised):
    model = kind(tiny, LoraConfig(rank=2), verbose=False)
    randomised(model)
    expected = model(tokens)
    if "copy" in way:
        model = copy.deepcopy(model)
    if "pickle" in way:
        model = pickle.loads(pickle.dumps(model))
    assert isinstance(model, kind)
    assert inspect.signature(model.forward) == inspect.signature(tiny.forward)
    assert list(inspect.signature(type(model).forward).parameters) == ["self", "tokens"]
    assert torch.equal(model(tokens), expected)
    assert torch.equal(model(tokens=tokens), expected)
    assert repr(model).startswith("LoraTinyNet(\n  (wrapped): TinyNet(")


def test_compiled_forward_shows_what_a_compiled_model_shows(tiny, tokens):
    expected = inspect.signature(torch.compile(copy.deepcopy(tiny), backend="eager").forward)
    compiled = torch.compile(LoraModel(tiny, LoraConfig(rank=2), verbose=False), backend="eager")
    assert inspect.signature(compiled.forward) == expected
    assert compiled(tokens).shape == (4, 5, 11)
