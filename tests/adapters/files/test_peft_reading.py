"""Folders that PEFT writes or loads, read with PEFT's meaning: its own layers and logits are the oracle."""

import copy
import dataclasses
import json
import logging
import warnings

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.adapters.variants.registry import peft_formats

IGNORED = ("Target modules", "You have passed exclude_modules", "The following", "Setting `save_emb", "Could not")
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 29, "intermediate_size": 24,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def peft_folder(base, folder, options, **edits):
    """PEFT's adapter over a copy of `base` with values that matter, as it writes it; (its layers, the model)."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        theirs.save_pretrained(str(folder))
    if edits:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))
    return theirs


def reloaded(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))


def layers_of(theirs):
    return {
        name
        for name, module in theirs.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def logits(model, inputs):
    with torch.no_grad():
        out = model.eval()(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_read_alike(base, folder, inputs):
    """The same layers, scales and logits as PEFT's own reading; so as a second adapter, and written again for PEFT."""
    theirs = reloaded(base, folder)
    expected = logits(theirs, inputs)
    assert not torch.allclose(expected, logits(base, inputs), atol=1e-3)  # it does something
    ours = LoraModel.from_pretrained(copy.deepcopy(base), folder, verbose=False)
    scales = {n: m.scale for n, m in ours.wrapped.named_modules() if hasattr(m, "adapters")}
    assert set(scales) == layers_of(theirs)
    for name, scale in scales.items():
        assert scale == pytest.approx(theirs.base_model.model.get_submodule(name).scaling["default"])
    torch.testing.assert_close(logits(ours, inputs), expected, atol=3e-6, rtol=1e-4)
    first = next(name for name in scales)
    second = LoraModel(copy.deepcopy(base), LoraConfig(rank=1, target_modules=[first]), verbose=False)
    second.load_adapter(folder, "b")
    second.set_adapter("b")
    assert torch.equal(logits(second, inputs), logits(ours, inputs))
    ours.save_pretrained(folder / "again")
    torch.testing.assert_close(logits(reloaded(base, folder / "again"), inputs), expected, atol=3e-6, rtol=1e-4)


# Each: what PEFT is asked for, what is edited in its config file afterwards.
LLAMA = {
    "rank and alpha of modules not adapted": (
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3, "o_proj": 2}, "alpha_pattern": {"gate_proj": 1}},
        {},
    ),
    "unmatched exclude expression": ({"target_modules": ["q_proj"], "exclude_modules": r".*vision.*"}, {}),
    "unmatched exclude list": ({"target_modules": ["q_proj"], "exclude_modules": ["vision", "1.self_attn.q_proj"]}, {}),
    "layers_pattern": (
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {},
    ),
    "layers_pattern as a list": (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["h", "layers"]},
        {},
    ),
    "layers beyond the depth": ({"target_modules": ["v_proj"], "layers_to_transform": [1, 7, 40]}, {}),
    "no layers listed": ({"target_modules": ["v_proj"]}, {"layers_to_transform": [], "exclude_modules": []}),
    "a full name in another block": (
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
        {},
    ),
    "names of nothing": ({"target_modules": ["q_proj", "query_key_value"]}, {}),
    "all-linear": ({"target_modules": "all-linear"}, {}),
    "all-linear by hand": ({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    "All-Linear": ({"target_modules": "all-linear"}, {"target_modules": "All-Linear"}),
    "targets by architecture": ({}, {}),
    "targets by architecture, null": ({}, {"target_modules": None}),
    "an expression that looks ahead": ({"target_modules": r"^(?!.*layers\.0).*(q_proj|up_proj)$"}, {}),
    "an expression that repeats": ({"target_modules": r"(\w+\.)+v_proj"}, {}),
    "overlapping patterns": (
        {
            "target_modules": ["q_proj", "v_proj"],
            "alpha_pattern": {"v_proj": 3, "layers.1.self_attn.v_proj": 30, r".*\.q_proj": 5, "q_proj": 50},
        },
        {},
    ),
    "defaults left out": ({"target_modules": ["q_proj"], "use_rslora": True}, {"lora_dropout": 0.0, "bias": "none"}),
    "a saved ending without a dot": ({"target_modules": ["q_proj"], "modules_to_save": ["head"]}, {}),
    "saved and targeted": ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, {}),
    "saved norms and embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]}, {}),
    "a saved container": ({"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1.mlp"]}, {}),
    "DoRA on embedding and layers": ({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, {}),
    "embedding and head": ({"target_modules": ["embed_tokens", "lm_head", "k_proj"]}, {}),
    "biases wished where there are none": ({"target_modules": ["q_proj"], "bias": "all"}, {}),
    "orthogonal start": ({"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 4}, {}),
    "mica start": ({"target_modules": ["q_proj"], "init_lora_weights": "mica"}, {}),
    "ensure_weight_tying, nothing tied": ({"target_modules": ["q_proj"], "ensure_weight_tying": True}, {}),
    "dropout": ({"target_modules": ["q_proj"], "lora_dropout": 0.3}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", LLAMA)
def test_llama(case, make_transformer, inputs_for, tmp_path, caplog):
    options, edits = LLAMA[case]
    base = make_transformer("llama")
    peft_folder(base, tmp_path, {"r": 2, "lora_alpha": 7, **options}, **edits)
    with caplog.at_level(logging.WARNING):
        assert_read_alike(base, tmp_path, inputs_for("llama"))
    assert not caplog.records


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]])
@pytest.mark.parametrize("kind", ["Roberta", "Bert", "DistilBert"])
def test_sequence_classification(kind, targets, use_dora, tmp_path):
    """A new head is saved, be it a layer or a container, as PEFT does for this task."""
    small = {**SMALL, "max_position_embeddings": 40}
    if kind == "DistilBert":
        small = {
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "vocab_size": 29,
            "dropout": 0.0,
            "seq_classif_dropout": 0.0,
        }
        targets = targets if targets == "all-linear" else ["q_lin"]
    base = getattr(hf, f"{kind}ForSequenceClassification")(getattr(hf, f"{kind}Config")(**small, num_labels=3)).eval()
    options = {"task_type": "SEQ_CLS", "target_modules": targets, "use_dora": use_dora, "r": 2}
    if kind == "DistilBert" and targets == "all-linear":
        options["exclude_modules"] = ["pre_classifier"]  # PEFT adapts and saves it at once
    peft_folder(base, tmp_path, options)
    assert_read_alike(base, tmp_path, {"input_ids": torch.randint(3, 29, (4, 6))})


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_gpt2_with_biases(bias, use_dora, make_transformer, inputs_for, tmp_path):
    base = make_transformer("gpt2")
    options = {
        "target_modules": ["c_attn", "c_proj"],
        "bias": bias,
        "use_dora": use_dora,
        "fan_in_fan_out": True,
        "r": 2,
    }
    peft_folder(base, tmp_path, options)
    assert_read_alike(base, tmp_path, inputs_for("gpt2"))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_vision(bias, vision, images, tmp_path):
    base = vision
    base(images)
    peft_folder(
        base, tmp_path, {"target_modules": ["conv", "stem"], "modules_to_save": ["norm", "head"], "bias": bias, "r": 2}
    )
    assert_read_alike(base, tmp_path, {"x": images})


@pytest.mark.parametrize("embeddings", [True, False, "auto"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_saved_embedding_layers(kind, embeddings, make_transformer, inputs_for, tmp_path):
    base = make_transformer(kind)
    targets = ["word_embeddings", "query"] if kind == "bert" else ["embed_tokens", "q_proj"]
    theirs = peft_folder(base, tmp_path, {"target_modules": targets, "r": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path), save_embedding_layers=embeddings)
    assert_read_alike(base, tmp_path, inputs_for(kind))


def test_resized_embeddings_are_not_dropped(make_transformer, inputs_for, tmp_path):
    """PEFT writes the resized embedding beside the adapter and loads it; ours is refused, not half read."""
    base = make_transformer("llama")
    theirs = peft_folder(base, tmp_path, {"target_modules": ["q_proj"], "r": 2})
    with torch.no_grad():
        theirs.base_model.model.get_input_embeddings().weight.add_(1)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"base weights of its own for model.embed_tokens.weight"):
        LoraModel.from_pretrained(base, tmp_path, verbose=False)


def test_an_unknown_saved_module_is_not_dropped(make_transformer, tmp_path):
    base = make_transformer("llama")
    peft_folder(base, tmp_path, {"target_modules": ["q_proj"], "r": 2})
    path = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.score.modules_to_save.weight"
    save_file({**load_file(path), key: torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"unexpected: .*score"):
        LoraModel.from_pretrained(base, tmp_path, verbose=False)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_tied_adapters_are_refused(field, tmp_path, make_transformer):
    base = make_transformer("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    options = {"target_modules": ["q_proj"], "r": 2, "ensure_weight_tying": True}
    peft_folder(base, tmp_path, {**options, field: ["q_proj", "embed_tokens"] if field[0] == "t" else ["embed_tokens"]})
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        LoraModel.from_pretrained(base, tmp_path, verbose=False)


def test_an_older_file(make_transformer, inputs_for, tmp_path):
    base = make_transformer("llama")
    peft_folder(base, tmp_path, {"target_modules": ["q_proj"], "r": 2})
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_read_alike(base, tmp_path, inputs_for("llama"))


@pytest.mark.parametrize("method", peft_formats().values(), ids=peft_formats())
def test_every_field_of_pefts_config_is_decided_upon(method):
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type]
    lists = [set(method.read), set(method.refused), set(method.without_meaning)]
    assert {field.name for field in dataclasses.fields(config)} - set().union(*lists) == set()
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_fields_of_a_later_peft_are_said(tiny, make_tiny, tmp_path, caplog):
    LoraModel(tiny, LoraConfig(rank=2), verbose=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_magic": True, "other": None}))
    with caplog.at_level(logging.WARNING):
        LoraModel.from_pretrained(copy.deepcopy(tiny) and make_tiny(), tmp_path, verbose=False)
    assert "use_magic" in caplog.text
    assert "other:" not in caplog.text


def test_all_linear_leaves_out_a_head_of_several_layers():
    roberta = hf.RobertaForSequenceClassification(hf.RobertaConfig(**{**SMALL, "max_position_embeddings": 40}))
    for wish in ("all-linear", None):
        model = LoraModel(copy.deepcopy(roberta), LoraConfig(rank=2, target_modules=wish), verbose=False)
        adapted = {n for n, m in model.wrapped.named_modules() if hasattr(m, "adapters")}
        assert adapted
        assert not any(name.startswith("classifier") for name in adapted)
    named = LoraModel(roberta, LoraConfig(rank=2, target_modules=["classifier"]), verbose=False)
    assert {n for n, m in named.wrapped.named_modules() if hasattr(m, "adapters")} == {
        "classifier.dense",
        "classifier.out_proj",
    }


def test_users_own_configs_stay_strict(tiny):
    for wrong in (
        {"rank_pattern": {"o_proj": 2}},
        {"exclude_modules": ".*vision.*"},
        {"layers_to_transform": [9]},
        {"target_modules": ["q_proj", "nothing"]},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoraModel(tiny, LoraConfig(rank=2, **{"target_modules": ["q_proj"], **wrong}), verbose=False)


@pytest.mark.parametrize(
    "edits",
    [
        {"target_modules": 5}, {"target_modules": [1]}, {"target_modules": ["nothing"]}, {"target_modules": []},
        {"modules_to_save": 3}, {"rank_pattern": [1]}, {"layers_to_transform": "all"}, {"r": "8"}, {"r": None},
        {"lora_alpha": 1e30}, {"lora_alpha": -1}, {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"r": 10**9},
        {"rank_pattern": {"layers.0.q_proj": 10**9}}, {"alpha_pattern": {"q_proj": 1e30}}, {"lora_dropout": 7},
        {"target_modules": "("}, {"modules_to_save": ["("]},
    ],
    ids=str,
)  # fmt: skip
def test_absurd_configs_are_refused_by_name(edits, tiny, make_tiny, tmp_path):
    LoraModel(tiny, LoraConfig(rank=2, target_modules=["q_proj"]), verbose=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))
    names = {"r": "r|rank", "modules_to_save": r"modules_to_save|\("}.get(next(iter(edits)), next(iter(edits)))
    with pytest.raises(
        ValueError, match=names.replace("rank_pattern", "rank").replace("target_modules", r"target_modules|\(")
    ):
        LoraModel.from_pretrained(make_tiny(), tmp_path, verbose=False)


@pytest.mark.parametrize("text", ["[]", "{", "\xff", "[" * 100_000, '"LORA"'])
def test_damaged_configs_are_refused(text, tiny, make_tiny, tmp_path):
    LoraModel(tiny, LoraConfig(rank=2, target_modules=["q_proj"]), verbose=False).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"adapter_config.json is not"):
        LoraModel.from_pretrained(make_tiny(), tmp_path, verbose=False)


def test_a_tensor_of_another_kind_of_head(tiny, tmp_path):
    """nn.Linear named by exact name only, where a suffix would mean more."""
    base = nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    LoraModel(copy.deepcopy(base), LoraConfig(rank=2, target_modules="fc"), verbose=False).save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(base, tmp_path, verbose=False)
    assert {n for n, m in again.wrapped.named_modules() if hasattr(m, "adapters")} == {"fc"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.fc.lora_{s}.weight" for s in "AB"
    }
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing"):
        LoraModel.from_pretrained(nn.ModuleDict({"fc": nn.Linear(4, 4)}), tmp_path, verbose=False)
