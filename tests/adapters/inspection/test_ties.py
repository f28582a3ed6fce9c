"""Merged models whose base uses a weight or a bias twice: what is written loads as the model that was adapted."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel, load_merged

hf = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 29}
CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def llama():
    options = {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **options, tie_word_embeddings=True, attention_bias=True))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=29, n_positions=32))


def bert():
    model = hf.BertForMaskedLM(hf.BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=32))
    nn.init.normal_(model.cls.predictions.bias)
    return model


def bart():
    sides = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = hf.BartConfig(
        vocab_size=29, d_model=16, max_position_embeddings=32, forced_eos_token_id=2, **sides, **special
    )
    return hf.BartForConditionalGeneration(config)


def t5(kind="T5"):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 29}
    config = getattr(hf, f"{kind}Config")(**sizes, decoder_start_token_id=0)
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def umt5():
    return t5("UMT5")  # whose forward asks the flag whether to scale


MODELS = {made.__name__: made for made in (llama, gpt2, bert, bart, t5, umt5)}
LINEAR = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query", "bart": "q_proj", "t5": "q", "umt5": "q"}
EMBED = {
    "llama": "embed_tokens",
    "gpt2": "wte",
    "bert": "word_embeddings",
    "bart": "shared",
    "t5": "shared",
    "umt5": "shared",
}
INNER = {"bart": "encoder.embed_tokens", "t5": "encoder.embed_tokens", "umt5": "decoder.embed_tokens"}


def targets(kind, where):
    head = "decoder" if kind == "bert" else "lm_head"
    chosen = {
        "linear": [LINEAR[kind]],
        "embedding": [EMBED[kind]],
        "head": [head],
        "inner": [INNER.get(kind, EMBED[kind])],
    }
    return chosen.get(where) or [LINEAR[kind], EMBED[kind], INNER.get(kind, EMBED[kind]), head]


def logits(model):
    tokens = torch.arange(3, 15).view(2, 6)
    takes_two = {"decoder_input_ids": tokens[:, 1:]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=tokens, **takes_two).logits


def adapted(kind, where, randomised, **options):
    torch.manual_seed(0)
    saves = {"modules_to_save": ["decoder" if kind == "bert" else "lm_head"]} if where == "saved" else {}
    chosen = targets(kind, "linear" if where == "saved" else where)
    config = LoraConfig(rank=2, target_modules=chosen, layer_types="all", **saves, **options)
    model = LoraModel(MODELS[kind]().eval(), config, verbose=False)
    randomised(model, std=0.3)
    return model


ALL = [(kind, where, dora, bias)
       for kind in MODELS for where in ("linear", "embedding", "head", "inner", "everywhere", "saved")
       for dora in (False, True) for bias in ("none", "all")
       if bias == "none" or "t5" not in kind]  # fmt: skip
FEW = [case for i, case in enumerate(ALL) if i % 4 == 1]
CASES = [pytest.param(*case, marks=[] if case in FEW else pytest.mark.slow) for case in ALL]


def made(kind, where, dora, bias, randomised):
    try:
        return adapted(kind, where, randomised, use_dora=dora, bias=bias)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("merged_first", [False, True], ids=["", "merged"])
@pytest.mark.parametrize(("kind", "where", "dora", "bias"), CASES)
def test_a_merged_folder_is_the_adapted_model(kind, where, dora, bias, merged_first, randomised, tmp_path):
    model = made(kind, where, dora, bias, randomised)
    expected = logits(model)
    if merged_first:
        model.merge()
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), expected, **CLOSE)
    plain.save_pretrained(tmp_path)
    again, report = type(plain).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(again), expected, **CLOSE)


@pytest.mark.parametrize(("kind", "where", "dora", "bias"), CASES)
def test_a_merged_file_is_the_adapted_model(kind, where, dora, bias, randomised, tmp_path, caplog):
    model = made(kind, where, dora, bias, randomised)
    expected, path = logits(model), tmp_path / "merged.safetensors"
    with caplog.at_level(logging.WARNING):
        model.save_model(path, merge_weights=True)
    again = load_merged(MODELS[kind](), path)
    torch.testing.assert_close(logits(again), expected, **CLOSE)
    again.save_pretrained(tmp_path / "folder")
    torch.testing.assert_close(logits(type(again).from_pretrained(tmp_path / "folder")), expected, **CLOSE)
    naive = MODELS[kind]()
    naive.load_state_dict(load_file(path))
    if "load it with load_merged" not in caplog.text:  # then any way is right
        torch.testing.assert_close(logits(naive), expected, **CLOSE)
    if where in ("embedding", "head", "everywhere"):
        assert "load it with load_merged" in caplog.text


@pytest.mark.parametrize("kind", MODELS)
def test_ties_that_no_adapter_touches_stay(kind, randomised):
    plain = adapted(kind, "linear", randomised).merge_and_unload()
    head = plain.get_output_embeddings()
    assert head.weight is plain.get_input_embeddings().weight
    assert plain.config.tie_word_embeddings is True


def test_a_bias_that_two_modules_hold_stays_one(randomised, tmp_path):
    model = adapted("bert", "linear", randomised, bias="all")
    head = model.wrapped.cls.predictions
    trained = model.adapter_parameters()["cls.predictions.bias"].detach().clone()
    model.merge()
    assert "cls.predictions.bias" in model.adapter_parameters()
    model.unmerge()
    assert head.bias is head.decoder.bias
    model.merge_and_unload()
    assert head.bias is head.decoder.bias
    assert torch.equal(head.bias, trained)


def test_a_file_of_another_model_is_refused(randomised, tmp_path):
    adapted("llama", "head", randomised).save_model(tmp_path / "m.safetensors", merge_weights=True)
    with pytest.raises(ValueError, match="does not fit this model"):
        load_merged(gpt2(), tmp_path / "m.safetensors")


def test_a_module_that_is_registered_twice_is_written_twice(randomised, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model, x = LoraModel(Twice(), LoraConfig(rank=2, bias="all"), verbose=False), torch.randn(2, 4)
    randomised(model)
    expected = model(x)
    model.save_model(tmp_path / "m.safetensors", merge_weights=True)
    plain = Twice()
    plain.load_state_dict(load_file(tmp_path / "m.safetensors"))
    torch.testing.assert_close(plain(x), expected)
