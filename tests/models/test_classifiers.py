"""Classifiers of text over every family of encoder and causal model that fits a test: the head, its files, its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_exp.backends import Adapted, Origin, adapt
from lora_exp.config import (
    AdapterConfig,
    Config,
    LayerConfig,
    ModelConfig,
    OptimizerConfig,
    QuantizationConfig,
    ScalingConfig,
)
from lora_exp.data.kinds.text_classification import TextClassification
from lora_exp.errors import UserError
from lora_exp.machine.place import Place
from lora_exp.models import find_source, load_base, with_new_modules
from lora_exp.plan.estimate import Planner
from lora_exp.training.optimizers import build_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # PEFT's, of GPT-2
]
CPU = Place(torch.device("cpu"), torch.float32)
NAMES = ("calm", "loud", "odd")
SHAPE = {"class_names": NAMES, "max_length": 20, "pad_token_id": 3}
_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT |= {"max_position_embeddings": 24}
_LLAMA = _BERT | {"num_key_value_heads": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT | {"embedding_size": 32},
    "albert": _BERT | {"embedding_size": 32},
    "deberta-v2": _BERT,
    "mpnet": _BERT,
    "modernbert": _BERT,
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 24},
}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8},
    "gemma3_text": _LLAMA | {"head_dim": 8},
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "opt": {**_LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": _BERT,
    "phi": _LLAMA,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def facts(kind: str) -> Any:
    known = {**ENCODERS, **CAUSAL}[kind]
    return AutoConfig.for_model(kind, **known, vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder in hub layout for a family, of its trunk for encoders, of the whole for causal models."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            (AutoModel if kind in ENCODERS else AutoModelForCausalLM).from_config(facts(kind)).save_pretrained(
                made[kind]
            )
        return made[kind]

    return folder


def configured(folder: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "layer": LayerConfig("linear", ["linear"]),
        "adapter": AdapterConfig("lora", "lora"),
        "scaling": ScalingConfig("rslora"),
        "quantization": QuantizationConfig("none"),
        "model": ModelConfig(kind="encoder", label="tiny", path=str(folder), dtype="float32"),
        "data": TextClassification(label="tiny", max_length=20),
        "optimizer": OptimizerConfig("adamw"),
        "device": "cpu",
        "rank": 4,
    }
    return Config(**{**values, **changes})


def batch_of(kind: TextClassification, lengths: list[int]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(4, 97, (length,), generator=draw),
            "labels": torch.tensor(index % len(NAMES)),
            "padding": torch.tensor(SHAPE["pad_token_id"]),
        }
        for index, length in enumerate(lengths)
    ]
    return dict(kind.collate(rows))


def trained(config: Any, folder: Path, steps: int = 3) -> tuple[Adapted, dict[str, Tensor]]:
    """A classifier after a few steps, saved to ``folder``, and a batch with padding."""
    torch.manual_seed(0)
    base = load_base(find_source(config.model), config.model, CPU, SHAPE, config.quantization)
    config.model = with_new_modules(config.model, base)
    adapted = adapt(base, config, Origin(class_names=NAMES))
    batch = batch_of(config.data, [5, 12, 20, 3])
    optimizer = build_optimizer(adapted.parameters, OptimizerConfig("adamw", lr=1e-2))
    adapted.model.eval()  # the base's dropout off, so that the loss falls whatever is drawn
    losses = []
    for _ in range(steps):
        loss = config.data.losses(adapted.model, batch).total.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save(folder)
    return adapted, {name: values for name, values in batch.items() if name != "labels"}


@pytest.mark.parametrize("backend", ["native", "peft"])
@pytest.mark.parametrize("kind", [*ENCODERS, *CAUSAL])
def test_plain_peft_and_transformers_load_what_was_saved(kind: str, backend: str, folders: Any, tmp_path: Path) -> None:
    from peft import PeftConfig, PeftModel

    config = configured(folders(kind), backend=backend)
    adapted, inputs = trained(config, tmp_path)
    with torch.no_grad():
        expected = adapted.model(**inputs).logits
    described = AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(1)  # another head and pooler to begin with
    base = AutoModelForSequenceClassification.from_pretrained(folders(kind), config=described, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-6, rtol=1e-5)
    assert loaded.config.id2label == dict(enumerate(NAMES))
    if backend == "native":
        assert PeftConfig.from_pretrained(tmp_path).task_type == "SEQ_CLS"


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama", "gpt2"])
def test_a_row_does_not_see_what_fills_up_the_others(kind: str, folders: Any) -> None:
    config = configured(folders(kind))
    model = load_base(find_source(config.model), config.model, CPU, SHAPE).eval()
    lengths = [5, 12, 20, 3]
    batch = batch_of(config.data, lengths)
    together = config.data.losses(model, batch).total
    for index, length in enumerate(lengths):
        alone = {name: values[index : index + 1] for name, values in batch.items()}
        cut = {name: values[:, :length] if values.dim() == 2 else values for name, values in alone.items()}
        torch.testing.assert_close(config.data.losses(model, cut).total, together[index : index + 1])


@pytest.mark.parametrize("kind", [*ENCODERS, *CAUSAL])
def test_the_head_is_new_and_trained_in_full(kind: str, folders: Any) -> None:
    config = configured(folders(kind))
    model = load_base(find_source(config.model), config.model, CPU, SHAPE)
    new = with_new_modules(config.model, model).modules_to_save
    file = AutoModelForSequenceClassification.from_config(facts(kind))
    trunk = f"{file.base_model_prefix}."
    outside = {name.partition(".")[0] for name in file.state_dict() if not name.startswith(trunk)}
    assert outside <= set(new)
    assert set(new) - outside == set()  # each file here has its pooler


def test_a_pooler_that_the_file_lacks_is_new_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    from transformers import BertModel

    BertModel(facts("bert"), add_pooling_layer=False).save_pretrained(tmp_path / "base")
    config = configured(tmp_path / "base", rank=2)
    adapted, inputs = trained(config, tmp_path / "adapter")
    assert config.model.modules_to_save == ["bert.pooler", "classifier"]
    from peft import PeftModel

    torch.manual_seed(1)
    facts_there = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", config=facts_there)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, adapted.model(**inputs).logits, atol=1e-6, rtol=1e-5)


def test_a_head_for_other_classes_is_replaced(folders: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    known = facts("bert")
    known.num_labels = 7
    AutoModelForSequenceClassification.from_config(known).save_pretrained(tmp_path)
    config = configured(tmp_path)
    model: Any = load_base(find_source(config.model), config.model, CPU, SHAPE)
    assert model.classifier.out_features == len(NAMES)
    assert model.config.id2label == dict(enumerate(NAMES))


def test_a_file_that_lacks_layers_is_refused(tmp_path: Path) -> None:
    AutoModel.from_config(facts("bert")).save_pretrained(tmp_path)
    deeper = facts("bert")
    deeper.num_hidden_layers = 3
    deeper.save_pretrained(tmp_path)
    config = configured(tmp_path)
    with pytest.raises(UserError, match=r"lacks bert\.encoder\.layer\.2.*whole"):
        load_base(find_source(config.model), config.model, CPU, SHAPE)


def test_a_family_without_a_classifier_is_refused(tmp_path: Path) -> None:
    known = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=97)
    AutoModelForCausalLM.from_config(known).save_pretrained(tmp_path)
    config = configured(tmp_path)
    with pytest.raises(UserError, match="no classifier of text"):
        load_base(find_source(config.model), config.model, CPU, SHAPE)


@pytest.mark.parametrize("kind", [*ENCODERS, *CAUSAL])
def test_a_plan_counts_what_is_trained(
    kind: str, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextClassification, "plan_shape", lambda self: SHAPE)
    plan = Planner(configured(folders(kind))).plan()
    adapted, _ = trained(configured(folders(kind)), tmp_path)
    assert (plan.trainable, plan.total) == (adapted.trainable, adapted.total)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("quantised", ["nf4", "int8"])
def test_a_quantised_base_gets_a_head_in_float32(kind: str, quantised: str, folders: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wider = facts(kind)
    wider.hidden_size = wider.intermediate_size = 64
    wider.head_dim = 16
    torch.manual_seed(0)
    folder = tmp_path / "base"
    (AutoModel if kind in ENCODERS else AutoModelForCausalLM).from_config(wider).save_pretrained(folder)
    section = QuantizationConfig(quantised, block_size=64)
    config = configured(folder, quantization=section)
    adapted, _ = trained(config, tmp_path)
    assert {parameter.dtype for parameter in adapted.parameters} == {torch.float32}
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_merged_weights_give_the_same_logits(kind: str, folders: Any, tmp_path: Path) -> None:
    adapted, inputs = trained(configured(folders(kind)), tmp_path)
    model: Any = adapted.model
    with torch.no_grad():
        expected = model(**inputs).logits
        model.merge()
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_new_pooler_that_would_be_quantised_is_refused_with_the_way_out(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BertModel

    wider = facts("bert")
    wider.hidden_size = wider.intermediate_size = 64
    BertModel(wider, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    config = configured(tmp_path / "base", quantization=QuantizationConfig("nf4"))
    with pytest.raises(UserError, match=r"quantization\.skip_modules=\[bert\.pooler\]"):
        load_base(find_source(config.model), config.model, CPU, SHAPE, config.quantization)
    config.quantization.skip_modules = ["bert.pooler"]
    adapted, _ = trained(config, tmp_path / "adapter")
    assert config.model.modules_to_save == ["bert.pooler", "classifier"]
    assert {parameter.dtype for parameter in adapted.parameters} == {torch.float32}
