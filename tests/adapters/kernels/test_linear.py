"""The hand-written gradients: gradcheck with a fixed mask, and the plain formulas as oracle."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lora_exp.adapters import DoRALinear, LoraConfig, LoRAConv1D, LoRALinear, LoraModel, use_reference
from lora_exp.adapters.kernels import linear
from lora_exp.adapters.numerics import matmul, precision
from lora_exp.adapters.numerics.dropout import dropout_mask, dropout_noise, keep_share
from lora_exp.adapters.numerics.precision import BLAS, FLOAT32, NATIVE, ONEDNN, Answers

KINDS = {"lora": LoRALinear, "dora": DoRALinear}
CASES = list(itertools.product(KINDS, (0.0, 0.3), (True, False)))


def tell(monkeypatch, wide, float32=BLAS):
    """What the machine is fast in: wide, float32 alone; else 16 bits as they are."""
    monkeypatch.setattr(precision, "_told", Answers(FLOAT32 if wide else NATIVE, float32))


@pytest.fixture
def calls(monkeypatch):
    """How often the fused path ran."""
    counted, apply = [], linear._Adapted.apply
    monkeypatch.setattr(linear._Adapted, "apply", lambda *args: counted.append(1) or apply(*args))
    return counted


def trained(layer):
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def both_ways(run):
    """What `run` returns on the fused and on the plain path, with the same masks."""
    torch.manual_seed(5)
    ours = run()
    torch.manual_seed(5)
    with use_reference():
        return ours, run()


@pytest.mark.parametrize(("kind", "dropout", "bias"), CASES)
def test_gradcheck(kind, dropout, bias, calls):
    layer = trained(KINDS[kind](4, 3, rank=2, lora_dropout=dropout, bias=bias, dtype=torch.float64))
    names, values = zip(*layer.adapters.named_parameters(), strict=True)
    norm = layer.adapter.constant_norm(layer) if kind == "dora" else None

    def run(x, *factors):
        torch.manual_seed(0)  # the mask
        if norm is not None:  # a constant to the gradient, so to the numerical one as well
            layer.adapter.constant_norm = lambda layer: norm
        given = {f"adapters.{name}": value for name, value in zip(names, factors, strict=True)}
        return torch.func.functional_call(layer, given, (x,))

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values))
    assert calls


@pytest.mark.parametrize("kind", ["lora", "dora", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6), (4, 2, 6)])
def test_the_plain_path_agrees(kind, dropout, needs_dx, shape, calls):
    if kind == "conv1d":
        pytest.importorskip("transformers.pytorch_utils")
        if shape[0] == 4:
            pytest.skip("transformers' Conv1D itself wants contiguous inputs")
        layer = trained(LoRAConv1D(7, 6, rank=3, lora_dropout=dropout))
    else:
        layer = trained(KINDS[kind](6, 7, rank=3, lora_dropout=dropout))
    base = torch.randn(shape)
    if shape[0] == 4:
        base = base.transpose(0, 1)  # not contiguous

    def run():
        layer.zero_grad()
        x = base.clone().requires_grad_(needs_dx)
        out = layer(x)
        out.square().sum().backward()
        return [out, x.grad, *(p.grad for p in layer.adapters.parameters())]

    ours, plain = both_ways(run)
    assert len(calls) == 1
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "magnitude"])
def test_factors_may_be_frozen(frozen):
    layer = trained(DoRALinear(6, 5, rank=2, lora_dropout=0.2))
    getattr(layer.adapter, frozen).requires_grad_(False)
    x = torch.randn(3, 6)

    def run():
        layer.zero_grad()
        layer(x).square().sum().backward()
        return [p.grad for p in layer.adapters.parameters()]

    ours, plain = both_ways(run)
    assert sum(g is None for g in ours) == 1
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(("wide", "float32"), [(False, BLAS), (True, BLAS), (False, ONEDNN), (True, ONEDNN)])
def test_routes_of_every_kind_in_one_step(wide, float32, calls, randomised, monkeypatch):
    """wide: bfloat16 base and activations, float32 inside; the plain path rounds at every step."""
    tell(monkeypatch, wide, float32)
    monkeypatch.setattr(matmul, "_FEW_ROWS", 1)
    base = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 4, bias=False)).to(torch.bfloat16 if wide else torch.float32)
    options = {
        "a": {},
        "b": {"use_dora": True},
        "c": {"use_dora": True, "lora_dropout": 0.4},
        "d": {"lora_dropout": 0.3},
    }
    model = LoraModel(base, LoraConfig(rank=2, target_modules="all-linear"), "a", verbose=False)
    for i, name in enumerate("bcd", 3):
        model.add_adapter(name, LoraConfig(rank=i, target_modules="all-linear", **options[name]))
    for name in options:
        randomised(model, name)
    x = torch.randn(9, 3, 6).to(base[0].weight.dtype)
    state = {name: model.dropout_state(name) for name in options}

    def run():
        for name in options:
            model.load_dropout_state(state[name], name)
        model.zero_grad()
        with model.route({"b": 2, "a": 1, "__base__": 2, "c": 3, "d": 1}):
            out = model(x)
        out.square().sum().backward()
        return [out, *(p.grad for name in options for p in model.adapter_parameters(name).values())]

    ours, plain = both_ways(run)
    assert len(calls) == 2
    for mine, expected in zip(ours, plain, strict=True):
        error = (mine - expected).norm() / expected.norm()
        assert error < (0.04 if wide else 1e-5)


@pytest.mark.parametrize(("kind", "dropout"), list(itertools.product(KINDS, (0.0, 0.3))))
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_bfloat16_is_within_its_rounding(kind, dropout, autocast, wide, monkeypatch):
    tell(monkeypatch, wide)
    monkeypatch.setattr(matmul, "_CHUNK", 48 * 7)
    layer = trained(KINDS[kind](48, 40, rank=4, lora_dropout=dropout))
    half = copy.deepcopy(layer)
    if not autocast:
        half.weight.data, half.bias.data = half.weight.data.bfloat16(), half.bias.data.bfloat16()
    x = torch.randn(130, 48)
    grad = torch.randn(130, 40)

    def run(layer, dtype):
        torch.manual_seed(3)
        layer.zero_grad()
        mine = x.clone().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and layer is half):
            out = layer(mine)
        out.backward(grad.to(out.dtype))
        assert mine.grad.dtype == mine.dtype
        return [out, mine.grad, *(p.grad for p in layer.adapters.parameters())]

    exact = run(layer, torch.float32)
    rounded = run(half, torch.float32 if autocast else torch.bfloat16)
    assert rounded[0].dtype == torch.bfloat16
    assert {g.dtype for g in rounded[2:]} == {torch.float32}
    for mine, expected in zip(rounded, exact, strict=True):
        assert (mine.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_wide_is_as_exact_as_a_layer_rounded_at_its_ends(kind, dropout, monkeypatch):
    """In float32 inside, only what comes out is rounded; of what is kept, only DoRA's product is."""
    tell(monkeypatch, wide=True)
    half = trained(KINDS[kind](48, 40, rank=4, lora_dropout=dropout, dtype=torch.bfloat16))
    layer = copy.deepcopy(half)
    layer.weight.data, layer.bias.data = layer.weight.data.double(), layer.bias.data.double()
    for parameter in layer.adapters.parameters():
        parameter.data = parameter.data.double()
    x, grad = torch.randn(130, 48).bfloat16(), torch.randn(130, 40).bfloat16()

    def run(layer, dtype):
        torch.manual_seed(3)
        mine = x.clone().to(dtype).requires_grad_()
        out = layer(mine)
        out.backward(grad.to(dtype))
        return [out, mine.grad, *(p.grad for p in layer.adapters.parameters())]

    for i, (mine, exact) in enumerate(zip(run(half, torch.bfloat16), run(layer, torch.float64), strict=True)):
        limit = 2**-8 if mine.dtype == torch.bfloat16 or i == 4 else 1e-6
        assert (mine - exact).norm() < limit * exact.norm()
        if mine.dtype == torch.bfloat16:  # nearly every value is the exact one rounded once
            assert (mine == exact.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize(("wide", "float32"), [(False, BLAS), (True, BLAS), (False, ONEDNN)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_may_be_written_to(kind, wide, float32, dtype, monkeypatch):
    tell(monkeypatch, wide, float32)
    layer = trained(KINDS[kind](6, 5, rank=2, dtype=dtype))
    x = torch.randn(2, 70, 6, dtype=dtype)
    plain = layer(x).mul(2).sum()
    plain.backward()
    expected = [p.grad for p in layer.adapters.parameters()]
    layer.zero_grad()
    out = layer(x)
    out *= 2
    out.sum().backward()
    for mine, once in zip((p.grad for p in layer.adapters.parameters()), expected, strict=True):
        assert torch.equal(mine, once)


def test_half_precision_products_in_either_precision(monkeypatch):
    grad, weight = torch.randn(200, 30).bfloat16(), torch.randn(30, 20).bfloat16()
    monkeypatch.setattr(matmul, "_CHUNK", 20 * 7)
    for fast in (True, False):
        tell(monkeypatch, wide=not fast)
        got = matmul.wide_product(grad, weight)
        assert got.dtype == (torch.bfloat16 if fast else torch.float32)
        torch.testing.assert_close(got.float(), grad.float() @ weight.float(), atol=0.1, rtol=0.01)
    x = torch.randn(5, 20)
    torch.testing.assert_close(matmul.times_transposed(x, weight), x @ weight.float().T)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused_or_right(kind):
    layer, x = trained(KINDS[kind](4, 3, rank=2)), torch.randn(5, 4, requires_grad=True)
    for loss in (layer(x).square().sum(), layer(x).sum()):  # the second one's incoming gradient is a constant
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="use_reference"):
            first.sum().backward()
    with use_reference():
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        first.sum().backward()
    assert layer.lora_A.grad is not None


def test_functional_transforms_take_the_plain_path(calls):
    layer, x = trained(LoRALinear(4, 3, rank=2)), torch.randn(5, 4)
    jacobian = torch.func.jacrev(layer)(x[0])
    torch.testing.assert_close(jacobian, layer.weight + layer.delta_weight())
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    assert len(calls) == 1


def test_a_trained_base_takes_the_plain_path(calls):
    layer = trained(LoRALinear(4, 3, rank=2))
    layer.weight.requires_grad_()
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad is not None
    assert not calls


def test_a_variant_of_its_own_is_not_fused(calls):
    from lora_exp.adapters import LoraAdapter

    class Doubled(LoraAdapter):
        def add_to(self, layer, x, base):
            return base + 2 * self.low_rank(layer, x)

    layer, x = LoRALinear(4, 3, rank=2), torch.randn(2, 4)
    layer.add_adapter(Doubled("default", 2, 2.0, 0.0, False))
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight + 2 * layer.delta_weight(), layer.bias))
    assert not calls


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_retained_and_replayed(kind, reentrant, replay_is_the_same):
    layer = trained(KINDS[kind](4, 4, rank=2, lora_dropout=0.3))
    x = torch.randn(5, 4, requires_grad=True)
    replay_is_the_same(layer, x, reentrant)


def retained_bytes(call, x, *skip):
    """Bytes of storages that autograd keeps, parameters aside."""
    known = {p.untyped_storage().data_ptr() for module in skip for p in module.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes(), tensor  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(x)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_is_retained_once_in_its_own_dtype(dtype, dropout):
    layer = LoRALinear(64, 96, rank=4, lora_dropout=dropout, dtype=dtype)
    x = torch.randn(100, 64, dtype=dtype, requires_grad=True)
    z = 100 * 4 * dtype.itemsize
    assert retained_bytes(layer, x, layer) == x.nbytes + z


def test_masks():
    x = torch.empty(40, 999)
    assert keep_share(1 - 1e-9) == 2**-16
    assert keep_share(1e-9) == 1
    for p in (0.05, 0.5, 0.9):
        mask = dropout_mask(x, p, 7)
        assert torch.equal(mask, dropout_mask(x, p, 7))
        assert not torch.equal(mask, dropout_mask(x, p, 8))
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert abs(mask.mean() - (1 - p)) < 0.01
        assert torch.equal(mask, dropout_mask(x.bfloat16(), p, 7).float())
        torch.testing.assert_close(dropout_noise(x, p, 7), mask / keep_share(p))
    assert torch.equal(dropout_mask(x, 1e-9, 1), torch.ones_like(x))
    for lag in (1, 2, 3, 4):  # neighbours share a 64-bit number but no bits of it
        flat = dropout_mask(x, 0.5, 1).flatten() - 0.5
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 0.005
