"""Cross-entropy in chunks equals the model's own logits through torch's, on every model that has a head."""

import contextlib
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.training import loss_head, objectives
from lora_exp.training.objectives import IGNORED, causal_lm_losses

V = 29


def make(kind, **options):
    import transformers as hf

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"intermediate_size": 24, "vocab_size": V, "head_dim": 8, "max_position_embeddings": 32} | options
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=V, n_positions=32))
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**small, **ids))


def adapted(model, **options):
    wrapped = LoraModel(model, LoraConfig(rank=2, target_modules="all-linear", **options), verbose=False)
    for parameter in wrapped.adapter_parameters().values():
        nn.init.normal_(parameter, std=0.3)
    return wrapped


@pytest.fixture
def batch():
    tokens = torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :5] = labels[1] = labels[3, -2:] = IGNORED
    return {"input_ids": tokens, "labels": labels}


@pytest.fixture
def chunks(monkeypatch):
    """Small chunks, counted."""
    counted, real = [], loss_head._chunk
    monkeypatch.setattr(loss_head, "_CHUNK", 7 * V)
    monkeypatch.setattr(loss_head, "_chunk", lambda *args: counted.append(len(args[0])) or real(*args))
    return counted


def full(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "row_losses", lambda *args: None)
        return run()


def compare(model, batch, monkeypatch, rtol=1e-6, context=contextlib.nullcontext):
    def run():
        torch.manual_seed(7)
        model.zero_grad()
        with context():
            losses = causal_lm_losses(model, batch)
        (losses.total * torch.tensor([1.0, 2.0, 0.5, 3.0])).sum().backward()
        return losses, [p.grad for p in model.parameters() if p.grad is not None]

    (ours, grads), (theirs, expected) = run(), full(monkeypatch, run)
    torch.testing.assert_close(ours.total, theirs.total, rtol=rtol, atol=0)
    assert torch.equal(ours.count, theirs.count)
    assert len(grads) == len(expected) > 0
    for mine, other in zip(grads, expected, strict=True):
        assert (mine - other).norm() <= rtol * 100 * other.norm()  # after a whole model's backward pass


@pytest.mark.parametrize("kind", ["Llama", "gpt2", "Qwen2", "Phi", "Mistral"])
def test_it_equals_the_full_logits(kind, batch, chunks, monkeypatch):
    compare(adapted(make(kind)), batch, monkeypatch)
    assert chunks == [6, 6, 6]  # of 32 predictions 18 count


def test_a_gpu_counts_no_labels(batch, chunks, monkeypatch):
    """There the number of labels in use would have to be copied to the host: it takes them all, and no notice."""
    monkeypatch.setattr(loss_head, "_sums_of_used", loss_head._sums_of_all)
    compare(adapted(make("Llama")), batch, monkeypatch)
    assert sum(chunks) == 4 * 8  # every position


def test_bfloat16_and_autocast(batch, chunks, monkeypatch):
    compare(adapted(make("Llama").bfloat16()), batch, monkeypatch, rtol=1e-2)
    compare(
        adapted(make("Llama")), batch, monkeypatch, rtol=1e-2, context=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert chunks == [6, 6, 6] * 2


def test_lanes_and_masks(batch, chunks, monkeypatch):
    model = adapted(make("Llama"), lora_dropout=0.3)
    model.add_adapter("other", LoraConfig(rank=3, use_dora=True, lora_dropout=0.2))
    state = {name: model.dropout_state(name) for name in model.configs}

    @contextlib.contextmanager
    def routed():
        for name, value in state.items():
            model.load_dropout_state(value, name)
        with model.route({"other": 3, "default": 1}):
            yield

    compare(model.train(), batch, monkeypatch, context=routed)
    assert chunks


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_peft_and_checkpointing(batch, chunks, monkeypatch):
    import peft

    compare(peft.get_peft_model(make("Llama"), peft.LoraConfig(init_lora_weights=False)), batch, monkeypatch)
    model = adapted(make("Llama")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compare(model, batch, monkeypatch)
    assert chunks == [6, 6, 6] * 2


def test_a_head_with_a_bias_in_float64():
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, 3, 1])
    ours = loss_head.chunked_cross_entropy(hidden, weight, bias, labels)
    torch.testing.assert_close(ours, F.cross_entropy(hidden @ weight.T + bias, labels, reduction="none"))
    assert torch.autograd.gradcheck(lambda h: loss_head.chunked_cross_entropy(h, weight, bias, labels), (hidden,))
    (first,) = torch.autograd.grad(ours.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="own logits"):
        first.sum().backward()


def test_the_gradient_to_the_hidden_states(chunks):
    hidden, weight, labels = torch.randn(20, 16), torch.randn(V, 16), torch.randint(0, V, (20,))
    scales, found = torch.rand(20), []
    for losses_of in (
        lambda h: loss_head.chunked_cross_entropy(h, weight, None, labels),
        lambda h: F.cross_entropy(h @ weight.T, labels, reduction="none"),
    ):
        mine = hidden.clone().requires_grad_()
        losses = losses_of(mine)
        losses.mul(scales).sum().backward()
        found.append((losses.detach(), mine.grad))
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).norm() <= 1e-6 * expected.norm()


def test_large_logits_stay_finite():
    hidden, labels = torch.tensor([[1e4, -1e4]], requires_grad=True), torch.tensor([1])
    losses = loss_head.chunked_cross_entropy(hidden, torch.eye(2), None, labels)
    assert losses.item() == 2e4
    losses.sum().backward()
    assert hidden.grad.isfinite().all()


def test_nothing_to_predict(batch, chunks):
    model = adapted(make("Llama"))
    losses = causal_lm_losses(model, batch | {"labels": torch.full_like(batch["labels"], IGNORED)})
    assert losses.total.tolist() == [0.0] * 4
    losses.total.sum().backward()
    assert not chunks


def test_evaluation_makes_no_gradient(batch, chunks, monkeypatch):
    seen, real = [], loss_head._chunk
    monkeypatch.setattr(loss_head, "_chunk", lambda *args: seen.append(args[-1]) or real(*args))
    with torch.no_grad():
        causal_lm_losses(adapted(make("Llama")).eval(), batch)
    assert seen == [None] * 3


REFUSED = {
    "capped": lambda: adapted(make("Gemma2", final_logit_softcapping=0.5)),
    "scaled": lambda: adapted(make("Cohere", logit_scale=0.25)),
    "adapted head": lambda: LoraModel(make("Llama"), LoraConfig(rank=2, target_modules=["lm_head"]), verbose=False),
    "trained head": lambda: make("Llama"),
    "saved head": lambda: adapted(make("Llama"), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_other_heads_fall_back_with_one_line(why, batch, chunks, monkeypatch, caplog):
    model = REFUSED[why]()
    caplog.set_level(logging.INFO, loss_head.__name__)
    compare(model, batch, monkeypatch)
    compare(model, batch, monkeypatch)
    assert len(caplog.records) == 1
    assert "own logits" in caplog.text
    assert not chunks
    assert all(not isinstance(module, loss_head._Caught) for module in model.modules())


def test_the_head_is_put_back_after_a_failure(batch):
    model = adapted(make("Llama"))
    with pytest.raises(IndexError):
        causal_lm_losses(model, batch | {"input_ids": batch["input_ids"] + 100})
    assert type(model.get_output_embeddings()) is nn.Linear


def test_only_the_hidden_states_are_retained():
    model, kept = adapted(make("Llama", vocab_size=2000)), []
    tokens = torch.randint(3, 2000, (2, 30))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        causal_lm_losses(model, {"input_ids": tokens, "labels": tokens})
    assert max(n for n in kept if n != model.get_output_embeddings().weight.numel()) < 58 * 100
