"""What a machine is fast in: measured, told or from the environment; and the products that follow from it."""

import itertools
import time

import pytest
import torch

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.adapters.numerics import matmul, precision
from lora_exp.adapters.numerics.precision import (
    BLAS,
    FLOAT32,
    FLOAT32_FEW,
    NATIVE,
    ONEDNN,
    Answers,
    Rates,
    answered,
    answers,
    measure,
)

onednn = pytest.mark.skipif(not precision.has_onednn(), reason="torch was built without oneDNN")


@pytest.fixture
def unasked(monkeypatch):
    """A process in which nobody has answered yet."""
    monkeypatch.setattr(precision, "_told", None)
    monkeypatch.setattr(precision, "_found", {})
    for name in ("LORA_EXP_BF16", "LORA_EXP_FLOAT32"):
        monkeypatch.delenv(name, raising=False)


def test_the_faster_product_is_the_answer():
    assert Rates(blas=100, onednn=90, bfloat16=250).answers() == Answers(NATIVE, BLAS)
    assert Rates(blas=100, onednn=0, bfloat16=70).answers() == Answers(FLOAT32, BLAS)
    assert Rates(blas=100, onednn=115, bfloat16=110).answers() == Answers(FLOAT32, ONEDNN)
    assert Rates(blas=100, onednn=0, bfloat16=30).answers() == Answers(FLOAT32_FEW, BLAS)
    assert Rates(blas=30, onednn=100, bfloat16=30).answers() == Answers(FLOAT32_FEW, ONEDNN)
    assert Rates(blas=100, onednn=101, bfloat16=100).answers() == Answers(NATIVE, BLAS)  # not clearly faster


def test_measuring_is_quick_and_draws_nothing():
    before = torch.get_rng_state()
    started = time.process_time()
    rates = measure()
    assert time.process_time() - started < 5  # of all threads, on a busy machine; alone 0.3 to 0.5 s of wall time
    assert torch.equal(torch.get_rng_state(), before)
    assert rates.blas > 0
    assert rates.bfloat16 > 0
    assert (rates.onednn > 0) == precision.has_onednn()


def test_it_is_measured_once_a_number_of_threads(unasked, monkeypatch):
    asked = []
    monkeypatch.setattr(precision, "measure", lambda: asked.append(torch.get_num_threads()) or Rates(1, 0, 2))
    assert answers() == answers() == Answers(NATIVE, BLAS)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        answers()
    finally:
        torch.set_num_threads(threads)
    assert asked == [threads, threads + 1]


def test_the_environment_answers(unasked, monkeypatch):
    monkeypatch.setattr(precision, "measure", lambda: Rates(blas=1, onednn=2, bfloat16=3))
    monkeypatch.setenv("LORA_EXP_BF16", "float32")
    assert answers() == Answers(FLOAT32, ONEDNN)
    precision._found.clear()
    monkeypatch.setenv("LORA_EXP_BF16", "fast")
    with pytest.raises(ValueError, match="LORA_EXP_BF16=fast is no answer: use native, float32, float32_few or auto"):
        answers()


def test_what_is_told_holds_inside():
    with answered(bf16=NATIVE, float32=ONEDNN):
        assert answers() == Answers(NATIVE, ONEDNN)
        with answered():
            assert answers() == Answers(FLOAT32, BLAS)
        assert answers() == Answers(NATIVE, ONEDNN)


SHAPES = [(200, 30, 40), (128, 1, 5), (300, 64, 1), (1, 30, 40)]
LAYOUTS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "columns": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "rows": lambda x: torch.cat([x, x])[len(x) :],
    "repeated": lambda x: x[:1].expand(len(x), -1),
    "constant": lambda x: x[:1, :1].expand_as(x),
}


@onednn
@pytest.mark.parametrize(("shape", "layout", "weight_layout"), list(itertools.product(SHAPES, LAYOUTS, LAYOUTS)))
def test_onednns_products_are_right_in_every_layout(shape, layout, weight_layout, monkeypatch):
    monkeypatch.setattr(matmul, "_FEW_ROWS", 1)
    M, K, N = shape
    torch.manual_seed(0)
    x, grad = LAYOUTS[layout](torch.randn(M, K)), LAYOUTS[layout](torch.randn(M, N))
    weight = LAYOUTS[weight_layout](torch.randn(N, K))
    with answered(float32=ONEDNN):
        assert matmul.uses_onednn(x.dtype, "cpu", M)
        product, back = matmul.times_transposed(x, weight), matmul.times(grad, weight)
        factor = matmul.factor_product(x, grad, 0.5)
        monkeypatch.setattr(matmul, "_CHUNK", 2 * K)  # two rows of W at a time
        rounded = weight.bfloat16()
        pieces = matmul.times_transposed(x, rounded), matmul.times(grad, rounded)
    X, G, W, R = (t.double() for t in (x, grad, weight, rounded))
    found = product, back, factor, *pieces
    for mine, exact in zip(found, (X @ W.T, G @ W, 0.5 * X.T @ G, X @ R.T, G @ R), strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("bf16", "wide"), [(NATIVE, []), (FLOAT32, [128, 512]), (FLOAT32_FEW, [8, 16, 127, 128, 512])])
def test_how_many_rows_are_multiplied_in_float32(bf16, wide):
    with answered(bf16=bf16):
        for rows in (1, 7, 8, 16, 127, 128, 512):
            assert matmul.runs_wide(torch.bfloat16, "cpu", rows) == (rows in wide)
            assert not matmul.runs_wide(torch.float32, "cpu", rows)
            assert not matmul.runs_wide(torch.bfloat16, "cuda", rows)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_few_rows_in_float32_are_what_they_are_in_bfloat16(dora, dropout):
    def found(bf16):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(32, 48)).bfloat16()
        model = LoraModel(base, LoraConfig(rank=4, use_dora=dora, lora_dropout=dropout), verbose=False).train()
        for parameter in model.adapter_parameters().values():
            torch.nn.init.normal_(parameter, std=0.3)
        x = torch.randn(16, 32).bfloat16().requires_grad_()
        with answered(bf16=bf16):
            out = model(x)
            out.float().square().mean().backward()
        return [out, x.grad, *(parameter.grad for parameter in model.adapter_parameters().values())]

    for wide, plain in zip(found(FLOAT32_FEW), found(NATIVE), strict=True):
        scale = plain.float().abs().max().item()
        torch.testing.assert_close(wide.float(), plain.float(), atol=0.02 * scale, rtol=0)


@onednn
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("bf16", [NATIVE, FLOAT32, FLOAT32_FEW])
@pytest.mark.parametrize("float32", [BLAS, ONEDNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_answer_gives_the_same_bits(dora, dropout, bf16, float32, dtype):
    def losses():
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8)).to(dtype)
        model = LoraModel(base, LoraConfig(rank=4, use_dora=dora, lora_dropout=dropout), verbose=False).train()
        optimizer = torch.optim.AdamW(model.adapter_parameters().values(), lr=1e-2)
        x, found = torch.randn(160, 32).to(dtype), []
        for _ in range(3):
            loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    with answered(bf16=bf16, float32=float32):
        assert losses() == losses()
