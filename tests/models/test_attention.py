"""Attention with a float32 backward pass: outputs as SDPA's, gradients closer to float32's, and where it stays out."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lora_exp.models import attention
from lora_exp.models.attention import NAME, attend, take_attention


class Module:
    is_causal = True


def inputs(length=24, groups=1, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    shapes = (2, 4, length, 8), (2, 4 // groups, length, 8), (2, 4 // groups, length, 8)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [True, False, None])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_outputs_and_gradients(groups, is_causal, scaling):
    def run(dtype, function):
        mine = [x.detach().to(dtype).requires_grad_() for x in inputs(groups=groups)]
        out = function(*mine)
        out.float().square().sum().backward()
        return [out, *(x.grad for x in mine)]

    def exact(q, k, v):
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal is not False, scale=scaling).transpose(1, 2)

    ours = run(torch.bfloat16, lambda q, k, v: attend(Module(), q, k, v, None, is_causal=is_causal, scaling=scaling)[0])
    for mine, expected in zip(ours, run(torch.float64, exact), strict=True):
        assert (mine.double() - expected).norm() < 0.01 * expected.norm()


def test_where_it_stays_out(monkeypatch):
    calls = []
    monkeypatch.setattr(attention._Attention, "apply", lambda *args: calls.append(1) or args[0])
    q, k, v = inputs()
    cases = {
        "no gradient": lambda: attend(Module(), q.detach(), k.detach(), v.detach(), None),
        "float32": lambda: attend(Module(), *inputs(dtype=torch.float32), None),
        "a mask": lambda: attend(Module(), q, k, v, torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()),
        "dropout": lambda: attend(Module(), q, k, v, None, dropout=0.1),
        "one token": lambda: attend(Module(), q[:, :, :1], k, v, None),
        "a long sequence": lambda: attend(Module(), *inputs(length=300), None),
        "a bias of positions": lambda: attend(
            Module(), q, k, v, None, position_bias=torch.zeros(2, 4, 24, 24).bfloat16()
        ),
    }
    for name, call in cases.items():
        call()
        assert not calls, name
    attend(Module(), q, k, v, None)
    assert calls


def test_a_model_takes_it_and_files_do_not_know(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape, attn_implementation="sdpa"))
    take_attention(wide)
    assert wide.config._attn_implementation == "sdpa"
    half = copy.deepcopy(wide).bfloat16()
    plain = copy.deepcopy(half)
    take_attention(half)
    assert half.config._attn_implementation == NAME
    tokens = torch.randint(0, 50, (2, 12))
    padded = torch.ones_like(tokens)
    padded[0, :4] = 0
    for options in ({}, {"attention_mask": padded}):
        mine, theirs = (model(input_ids=tokens, labels=tokens, **options) for model in (half, plain))
        assert torch.equal(mine.logits, theirs.logits)
        mine.loss.backward()
    half.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_second_derivatives_name_the_way_out():
    q, k, v = inputs()
    out = attend(Module(), q, k, v, None)[0].float().square().sum()
    (first,) = torch.autograd.grad(out, q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"model\.attention=eager"):
        first.sum().backward()
