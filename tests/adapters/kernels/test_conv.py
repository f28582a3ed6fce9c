"""Convolutions' hand-written gradients: every way of computing them against the plain formulas and gradcheck."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from lora_exp.adapters import DoRAConv2d, LoraConfig, LoRAConv1d, LoRAConv2d, LoRAConv3d, LoraModel, use_reference
from lora_exp.adapters.kernels import conv
from lora_exp.adapters.kernels.conv_ops import Geometry
from lora_exp.adapters.kernels.conv_strategy import shortest

KINDS = {"lora": LoRAConv2d, "dora": DoRAConv2d}
NARROW = [(*merges, False) for merges in itertools.product((False, True), repeat=2)]
WAYS = [*NARROW, (True, True, True)]  # merges, merges_back, dense


def is_possible(kind, dropout, way):
    """With dropout two kernels are at work, and V is one of them only for DoRA's gradient of x."""
    return not dropout or way in (WAYS[0], WAYS[-1]) or (kind == "dora" and not way[0])


CASES = [case for case in itertools.product(KINDS, (0.0, 0.3), WAYS) if is_possible(*case)]
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1), "dilation": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "bias": False},
]


@pytest.fixture
def calls(monkeypatch):
    """The ways that the fused path took."""
    taken, apply = [], conv._Convolved.apply

    def counted(way, *args):
        taken.append((way.merges, way.merges_back, way.dense))
        return apply(way, *args)

    monkeypatch.setattr(conv._Convolved, "apply", counted)
    return taken


@pytest.fixture
def take(monkeypatch):
    return lambda way: monkeypatch.setattr(conv, "shortest", lambda *args: way)


def trained(layer):
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def results(layer, x, needs_dx=True):
    """Output and gradients, with a mask that follows from a fixed seed."""
    torch.manual_seed(5)
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_dx)
    out = layer(x)
    out.square().sum().backward()
    return [out, x.grad, *(p.grad for p in layer.adapters.parameters())]


def assert_plain_agrees(layer, x, needs_dx=True, atol=1e-10, rtol=1e-10):
    ours = results(layer, x, needs_dx)
    with use_reference():
        plain = results(layer, x, needs_dx)
    assert ours[0].stride() == plain[0].stride()
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize(("kind", "dropout", "way"), CASES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_plain_path_agrees(kind, dropout, way, geometry, calls, take):
    take(way)
    layer = trained(KINDS[kind](6, 5, rank=4, lora_dropout=dropout, dtype=torch.float64, **geometry))
    x = torch.randn(3, 6, 8, 7, dtype=torch.float64)
    for memory_format, needs_dx in ((torch.contiguous_format, True), (torch.channels_last, True), (None, False)):
        assert_plain_agrees(layer, x if memory_format is None else x.to(memory_format=memory_format), needs_dx)
    assert calls == [way] * 3


@pytest.mark.parametrize(("kind", "dropout", "way"), CASES)
def test_gradcheck(kind, dropout, way, calls, take):
    take(way)
    layer = trained(KINDS[kind](2, 3, 2, rank=2, lora_dropout=dropout, dtype=torch.float64))
    names, values = zip(*layer.adapters.named_parameters(), strict=True)
    norm = layer.adapter.constant_norm(layer) if kind == "dora" else None

    def run(x, *factors):
        torch.manual_seed(0)  # the mask
        if norm is not None:  # a constant to the gradient, so to the numerical one as well
            layer.adapter.constant_norm = lambda layer: norm
        given = {f"adapters.{name}": value for name, value in zip(names, factors, strict=True)}
        return torch.func.functional_call(layer, given, (x,))

    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values))
    assert set(calls) == {way}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_groups_are_dense(kind, dropout, calls):
    layer = trained(KINDS[kind](4, 8, 3, groups=2, rank=4, lora_dropout=dropout, dtype=torch.float64))
    assert_plain_agrees(layer, torch.randn(2, 4, 6, 5, dtype=torch.float64))
    assert calls == [(True, True, True)]


@pytest.mark.parametrize(("kind", "dims"), [(LoRAConv1d, 1), (LoRAConv3d, 3)])
@pytest.mark.parametrize("way", WAYS)
def test_other_dimensions(kind, dims, way, calls, take):
    take(way)
    layer = trained(kind(3, 4, 3, padding=1, stride=2, rank=2, dtype=torch.float64))
    assert_plain_agrees(layer, torch.randn(2, 3, *[5] * dims, dtype=torch.float64))
    assert calls


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "magnitude"])
@pytest.mark.parametrize("way", [way for way in WAYS if is_possible("dora", 0.2, way)])
def test_factors_may_be_frozen(frozen, way, take):
    take(way)
    layer = trained(DoRAConv2d(3, 4, 3, rank=2, lora_dropout=0.2, dtype=torch.float64))
    getattr(layer.adapter, frozen).requires_grad_(False)
    assert_plain_agrees(layer, torch.randn(2, 3, 6, 6, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_what_takes_the_plain_path(calls):
    x = torch.randn(2, 4, 6, 6)
    for options in ({"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}):  # an even kernel: lopsided
        assert_plain_agrees(trained(LoRAConv2d(4, 4, 4, rank=2, **options)), x, atol=1e-4)
    layer = trained(LoRAConv2d(4, 4, 3, rank=2))
    torch.testing.assert_close(layer(x[0]), layer.merge()(x[0]))
    with pytest.raises(RuntimeError, match="same"):
        layer(x.double())
    torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], layer.merge()(x))
    layer.weight.requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    grouped = LoRAConv2d(4, 4, 3, groups=2, rank=2, dtype=torch.bfloat16)
    grouped(x.bfloat16()).sum().backward()
    assert not calls


@pytest.mark.parametrize("kind", KINDS)
def test_routes_of_every_kind_in_one_step(kind, calls, randomised):
    base = nn.Sequential(nn.Conv2d(3, 7, 3), nn.Conv2d(7, 4, 1, bias=False)).double()
    options = {"a": {}, "b": {"use_dora": True}, "c": {"lora_dropout": 0.4, "use_dora": kind == "dora"}}
    config = {"target_modules": ["0", "1"], "layer_types": ("conv2d",)}
    model = LoraModel(base, LoraConfig(rank=2, **config), "a", verbose=False)
    for i, name in enumerate("bc", 3):
        model.add_adapter(name, LoraConfig(rank=i, **config, **options[name]))
    for name in options:
        randomised(model, name)
    x, state = torch.randn(8, 3, 6, 6).double(), {name: model.dropout_state(name) for name in options}

    def run():
        for name in options:
            model.load_dropout_state(state[name], name)
        model.zero_grad()
        torch.manual_seed(1)
        with model.route({"b": 2, "a": 1, "__base__": 2, "c": 3}):
            out = model(x)
        out.square().sum().backward()
        return [out, *(p.grad for name in options for p in model.adapter_parameters(name).values())]

    ours = run()
    assert len(calls) == 6
    with use_reference():
        plain = run()
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("kind", "dropout"), list(itertools.product(KINDS, (0.0, 0.3))))
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_within_its_rounding(kind, dropout, autocast, calls):
    layer = trained(KINDS[kind](16, 24, 3, rank=4, lora_dropout=dropout))
    half = copy.deepcopy(layer)
    if not autocast:
        half.weight.data, half.bias.data = half.weight.data.bfloat16(), half.bias.data.bfloat16()
    x, grad = torch.randn(2, 16, 9, 9), torch.randn(2, 24, 7, 7)

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
    assert calls[-1] == (False, False, False)  # W + scale * BA would lose small updates
    assert rounded[0].dtype == torch.bfloat16
    assert {g.dtype for g in rounded[2:]} == {torch.float32}
    for mine, expected in zip(rounded, exact, strict=True):
        assert (mine.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", [WAYS[0], WAYS[-1]])
@pytest.mark.parametrize("kind", KINDS)
def test_retained_and_replayed(kind, way, reentrant, take, replay_is_the_same):
    take(way)
    layer = trained(KINDS[kind](4, 4, 3, rank=2, lora_dropout=0.3))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    replay_is_the_same(layer, x, reentrant)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused_or_right(kind):
    layer, x = trained(KINDS[kind](2, 3, 2, rank=2)), torch.randn(1, 2, 3, 3, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="use_reference"):
        first.sum().backward()
    with use_reference():
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        first.sum().backward()
    assert layer.lora_A.grad is not None


@pytest.mark.parametrize(("kind", "dropout", "way"), CASES)
def test_the_output_may_be_overwritten(kind, dropout, way, take):
    take(way)
    layer, x = trained(KINDS[kind](3, 4, 1, rank=2, lora_dropout=dropout)), torch.randn(2, 3, 6, 6, requires_grad=True)
    nn.ReLU(inplace=True)(layer(x)).sum().backward()
    assert layer.lora_A.grad.any()
    with torch.inference_mode():
        layer(x)


def test_copies_and_compilers():
    layer, x = trained(LoRAConv2d(3, 4, 3, rank=2)), torch.randn(2, 3, 6, 6)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), expected)


@pytest.mark.parametrize(
    ("kind", "rank", "dropout", "dtype", "retained"),
    [
        ("lora", 2, 0.0, torch.float32, "x z"),
        ("lora", 2, 0.3, torch.float32, "x z"),
        ("lora", 64, 0.0, torch.float32, "x"),
        ("lora", 2, 0.3, torch.bfloat16, "x z"),
        ("dora", 2, 0.3, torch.bfloat16, "x z product"),
        ("dora", 16, 0.3, torch.float32, "x"),
    ],
)
def test_retained_bytes(kind, rank, dropout, dtype, retained):
    layer = KINDS[kind](16, 96, 3, padding=1, rank=rank, lora_dropout=dropout, dtype=dtype)
    x, held = torch.randn(2, 16, 8, 8, dtype=dtype, requires_grad=True), {}
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    found = sum(tensor.untyped_storage().nbytes() for at, tensor in held.items() if at not in known)
    sizes = {"x": x.nbytes, "z": x.nbytes // 16 * rank, "product": x.nbytes // 16 * 96}
    assert found == sum(sizes[name] for name in retained.split())


def test_the_shortest_way():
    def way(channels, kernel, size, **options):
        geometry = Geometry((kernel, kernel), (1, 1), (kernel // 2,) * 2, (1, 1), 1)
        kind = {"r": 8, "is_dora": False, "drops": False, "exact": True} | options
        shapes = torch.Size((channels[1], channels[0], kernel, kernel)), torch.Size((4, channels[0], size, size))
        return shortest(geometry, *kind.values(), *shapes)

    assert way((64, 64), 3, 28) == (True, True, False)
    assert way((64, 64), 3, 28, r=64) == (True, True, True)
    assert way((32, 192), 1, 28, is_dora=True) == (True, True, True)
    assert way((512, 512), 3, 7) == (False, False, False)
    assert way((64, 64), 3, 28, drops=True) == (False, False, False)
    assert way((64, 64), 3, 28, exact=False) == (False, False, False)
