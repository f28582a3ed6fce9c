"""train/mfu: 4 FLOPs a weight and token over the measured rate."""

import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.training.utilisation import Utilisation, multiplied_weights


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape, **options)).requires_grad_(False)


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_those_of_the_flop_counter(tied):
    """torch's own counter as oracle, attention's share (none of it linear layers) taken off."""
    from torch.utils.flop_counter import FlopCounterMode

    model = llama(tie_word_embeddings=tied, attn_implementation="eager")
    tokens = torch.randint(0, 50, (1, 8))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens)
    found = counter.get_flop_counts()["Global"]
    assert 2 * 8 * multiplied_weights(model) == found[torch.ops.aten.mm] + found.get(torch.ops.aten.addmm, 0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
def test_adapters_are_not_counted():
    plain = multiplied_weights(llama())
    assert multiplied_weights(LoraModel(llama(), LoraConfig(rank=4), verbose=False)) == plain
    peft = pytest.importorskip("peft")
    assert multiplied_weights(peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))) == plain


def test_the_share_of_the_measured_rate():
    model = nn.Linear(10, 20, bias=False).requires_grad_(False)
    share = Utilisation.of(model, 1e6, trains_base=False)
    assert share.figures({"train/tokens_per_s": 500.0}) == {"train/mfu": pytest.approx(4 * 200 * 500 / 1e6)}
    assert share.figures({"eval/loss": 1.0}) == {}
    assert Utilisation.of(model, 0.0, trains_base=False).figures({"train/tokens_per_s": 500.0}) == {}
    model.requires_grad_(True)
    assert Utilisation.of(model, 1e6, trains_base=True).flops_per_token == 6 * 200
