"""A whole training step: forward, loss, backward, AdamW; and the loss head alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from lora_exp.training.loss_head import chunked_cross_entropy
from lora_exp.training.objectives import IGNORED, causal_lm_losses

from .pairs import DTYPES, PROJECTIONS, Setup, three
from .rows import Row
from .timing import median_ms, race, ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 8192}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    | {"num_attention_heads": 9, "num_key_value_heads": 3},
}


def run(quick: bool) -> Row:
    rounds, name = (5, "small") if quick else (7, "SmolLM2-135M")
    rows = [_step_row(name, Setup(dtype=dtype, dora=dora), rounds) for dtype in DTYPES for dora in (False, True)]
    if not quick:
        rows += [_step_row("small", Setup(dtype=dtype, dora=dora), 15) for dtype in DTYPES for dora in (False, True)]
    return {"rows": rows, "loss_head": [_loss_head(dtype, quick) for dtype in DTYPES]}


def llama(name: str, dtype: str) -> nn.Module:
    """A Llama of this shape with random weights, embeddings tied: the same work as the trained one's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: Row = {**SHAPES[name], "tie_word_embeddings": True, "use_cache": False, "attn_implementation": "sdpa"}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**settings))
    return model.to(DTYPES[dtype])


def language_model(model: nn.Module) -> PreTrainedModel:
    """transformers' model, in an adapted one or itself."""
    from transformers import PreTrainedModel

    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def training_step(model: nn.Module, batch: int, length: int, our_loss: bool) -> Callable[[], None]:
    """`our_loss`: through the chunked head; else through all logits, as in Trainer."""
    tokens = torch.randint(0, language_model(model).config.vocab_size, (batch, length))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None
    if not trained:  # the frozen floor: the whole backward pass, and nothing to train
        language_model(model).get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())

    def step() -> None:
        if our_loss:
            loss = causal_lm_losses(model, {"input_ids": tokens, "labels": tokens}).total.sum() / (
                tokens.numel() - batch
            )
        else:
            logits = model(input_ids=tokens).logits[:, :-1].float().flatten(0, 1)
            loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _step_row(name: str, setup: Setup, rounds: int) -> Row:
    """ours_logits is our adapters with the same loss as PEFT's side: the adapters' own part of the gain."""
    batch, length = 1, 256
    models = three(llama(name, setup.dtype), setup, PROJECTIONS)
    sides = {
        side: training_step(models[side], batch, length, side == "ours") for side in ("floor", "ours", "peft", "tuned")
    }
    sides["ours_logits"] = training_step(models["ours"], batch, length, False)
    times = race(sides, rounds)
    row: Row = {"case": f"{name} {setup.label}", **median_ms(times), **ratio(times, "peft", "ours")}
    row["tuned_ratio"] = ratio(times, "tuned", "ours")["ratio"]
    gap = row["peft_ms"] - row["floor_ms"]
    row["captured"] = round((row["peft_ms"] - row["ours_logits_ms"]) / gap, 2)
    row["captured_with_loss"] = round((row["peft_ms"] - row["ours_ms"]) / gap, 2)
    row["matmul_floor_ms"] = round(_matmul_floor(models["floor"], batch * length, setup.dtype), 1)
    return row


def _matmul_floor(model: nn.Module, tokens: int, dtype: str) -> float:
    """Milliseconds of 4 N FLOP a token (forward and dx) at the rate of a 512×2048×2048 product."""
    a, w = torch.randn(512, 2048, dtype=DTYPES[dtype]), torch.randn(2048, 2048, dtype=DTYPES[dtype])
    times = []
    for _ in range(8):
        started = time.perf_counter()
        a @ w
        times.append(time.perf_counter() - started)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return 4 * weights * tokens / (2 * 512 * 2048 * 2048 / min(times)) * 1e3


def loss_head_sides(dtype: str, length: int, vocabulary: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The loss of `length` positions, half of the labels ignored: in chunks, and from all logits as a model does."""
    torch.manual_seed(0)
    hidden = torch.randn(length, 576, dtype=DTYPES[dtype], requires_grad=True)
    weight = torch.randn(vocabulary, 576, dtype=DTYPES[dtype]) / 24
    labels = torch.randint(0, vocabulary, (length,))
    labels[::2] = IGNORED
    used = labels != IGNORED
    return {
        "ours": lambda: chunked_cross_entropy(hidden[used], weight, None, labels[used]).mean(),
        "full": lambda: F.cross_entropy((hidden @ weight.T).float(), labels),
    }


def _backward(make: Callable[[], torch.Tensor]) -> None:
    make().backward()


def _loss_head(dtype: str, quick: bool) -> Row:
    length, vocabulary = (256, 8192) if quick else (1024, 49152)
    sides = loss_head_sides(dtype, length, vocabulary)
    times = race({name: functools.partial(_backward, make) for name, make in sides.items()}, 5 if quick else 7)
    ours, full = (sides[name]().item() for name in ("ours", "full"))
    case = f"loss head {dtype} T={length} V={vocabulary}, half ignored"
    row: Row = {"case": case, **median_ms(times), **ratio(times, "full", "ours")}
    return {**row, "relative_difference": f"{abs(ours - full) / full:.1e}"}
