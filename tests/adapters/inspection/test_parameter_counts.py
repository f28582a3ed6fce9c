"""Published parameter counts, on the meta device, from architecture facts written down here."""

import time

import pytest
import torch
import transformers as hf

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.adapters.inspection.parameter_counts import logical_numel

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama2_7b():
    return hf.LlamaConfig()  # transformers' defaults are Llama-7B's


def llama3_8b():
    return hf.LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)


def llama32_3b():
    return hf.LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )


def llama31_70b():
    return hf.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )


def qwen25_3b():
    return hf.Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def opt_67b():
    return hf.OPTConfig(
        vocab_size=50272,
        hidden_size=4096,
        ffn_dim=16384,
        num_hidden_layers=32,
        num_attention_heads=32,
        word_embed_proj_dim=4096,
    )


def on_meta(config):
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize(
    ("facts", "options", "trainable", "total"),
    [
        (llama2_7b, {"rank": 8, "target_modules": ["q_proj", "v_proj"]}, 4_194_304, None),
        (llama2_7b, {"rank": 16, "target_modules": ATTENTION}, 16_777_216, 6_755_192_832),
        (qwen25_3b, {"rank": 16, "target_modules": ["q_proj", "v_proj"]}, 3_686_400, 3_089_625_088),
        (opt_67b, {"rank": 16, "target_modules": ["q_proj", "v_proj"]}, 8_388_608, None),
        (llama3_8b, {"rank": 16, "target_modules": "all-linear"}, 41_943_040, None),
        (llama3_8b, {"rank": 8, "use_dora": True}, 22_347_776, None),
        (llama32_3b, {"rank": 32, "target_modules": ["q_proj", "v_proj"], "use_dora": True}, 9_289_728, None),
    ],
)
def test_published_counts(facts, options, trainable, total):
    counts = LoraModel(on_meta(facts()), LoraConfig(**options), verbose=False).parameter_counts()
    assert counts[0] == trainable
    assert total is None or counts[1] == total


def test_a_70b_model_is_injected_in_seconds_and_linearly():
    model = on_meta(llama31_70b())
    start = time.perf_counter()
    adapted = LoraModel(model, LoraConfig(rank=16, lora_dropout=0.1, use_dora=True), verbose=False)
    assert time.perf_counter() - start < 10
    assert len(adapted.adapter_parameters()) == 80 * 7 * 3
    assert all(p.is_meta for p in adapted.adapter_parameters().values())
    assert adapted.base_sha256() is None


def test_a_packed_weight_counts_its_values():
    class Params4bit(torch.nn.Parameter):
        pass

    packed = Params4bit(torch.zeros(4096 * 4096 // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert logical_numel(packed) == 16_777_216
