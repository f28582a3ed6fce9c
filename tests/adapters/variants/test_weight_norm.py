"""The factored norm against the dense one, and how often it is computed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_exp.adapters import DoRAConv2d, DoRAEmbedding, DoRALinear, LoraConfig, LoraModel, use_reference
from lora_exp.adapters.numerics.fingerprints import Fingerprint
from lora_exp.adapters.variants import weight_norm

LAYERS = {
    "linear": lambda **options: DoRALinear(40, 30, 4, 8, **options),
    "conv": lambda **options: DoRAConv2d(5, 8, 3, rank=4, **options),
    "grouped": lambda **options: DoRAConv2d(4, 8, 3, groups=2, rank=4, **options),
    "embedding": lambda **options: DoRAEmbedding(50, 12, rank=4, **options),
}


def trained(layer, std=0.3):
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return layer


@pytest.fixture
def computed(monkeypatch):
    counted, real = [], weight_norm.factored_norm
    monkeypatch.setattr(weight_norm, "factored_norm", lambda *args: counted.append(1) or real(*args))
    return counted


@pytest.mark.parametrize("kind", LAYERS)
def test_norms_and_deltas_are_float32_under_autocast(kind):
    layer = trained(LAYERS[kind]())
    delta, dense = layer.delta_weight(), layer.adapter.weight_norm(layer).detach()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.adapter.constant_norm(layer), dense, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.adapter.weight_norm(layer).detach(), dense, rtol=1e-6, atol=0)
        assert torch.equal(layer.delta_weight(), delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_factored_is_dense(kind, dtype, monkeypatch):
    monkeypatch.setattr(weight_norm, "_CHUNK", 200)
    layer = trained(LAYERS[kind](dtype=dtype))
    adapter = layer.adapter
    torch.testing.assert_close(adapter.constant_norm(layer), adapter.weight_norm(layer).detach(), rtol=1e-6, atol=0)


def test_gpt2s_layout():
    pytest.importorskip("transformers.pytorch_utils")
    from lora_exp.adapters import DoraAdapter, LoRAConv1D

    layer = LoRAConv1D(6, 9, rank=2)
    layer.add_adapter(DoraAdapter("default", 2, 4.0, 0.0, False))
    adapter = trained(layer).adapter
    torch.testing.assert_close(adapter.constant_norm(layer), adapter.weight_norm(layer).detach(), rtol=1e-6, atol=0)


def test_rows_that_cancel_are_computed_exactly():
    layer = DoRALinear(6, 5, 2, 4, use_rslora=False)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.weight.copy_(-layer.delta_weight() * 1.0001)
        layer.weight[2].zero_()
        layer.lora_B[:, 2].zero_()
    adapter = layer.adapter
    dense = adapter.weight_norm(layer).detach()
    torch.testing.assert_close(adapter.constant_norm(layer), dense, rtol=1e-2, atol=0)
    assert dense[2] == torch.finfo(torch.float32).tiny


def test_once_per_optimizer_step_and_never_on_a_replay(computed):
    layer = trained(DoRALinear(6, 6, 2, 4, lora_dropout=0.1))
    optimizer = torch.optim.AdamW(layer.adapters.parameters(), lr=0.01)
    x = torch.randn(3, 6, requires_grad=True)
    for step in range(1, 4):
        for reentrant in (True, False):  # two micro batches
            checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        assert len(computed) == step + 1  # and once at the start, for the magnitude
        optimizer.step()
        optimizer.zero_grad()
    layer.eval()
    with torch.no_grad():
        layer(x), layer(x)
    assert len(computed) == 5


def by_hand(layer, optimizer):
    """One step that moves one value of A and one of B, both between the values that a sample would look at."""
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.view(-1)[7] = 1.0
    optimizer([layer.lora_A, layer.lora_B]).step()


def theirs(name):
    def make(parameters):
        bnb = pytest.importorskip("bitsandbytes")
        return getattr(bnb.optim, name)(parameters, lr=1.0, weight_decay=0.0)

    return make


def ours(name, **options):
    return lambda parameters: getattr(torch.optim, name)(parameters, lr=1.0, **options)


OPTIMIZERS = {
    **{f"{name}, {way}": ours(name, **{way: True}) for name in ("SGD", "AdamW") for way in ("fused", "foreach")},
    **{f"{name}, loop": ours(name, foreach=False) for name in ("SGD", "AdamW", "Adagrad")},
    **{name: theirs(name) for name in ("AdamW32bit", "AdamW8bit", "Lion8bit")},
}


def set_bits(tensor):
    tensor.view(torch.int32).view(-1)[91] += 1 << 20


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizers_step_is_noticed(optimizer, kind):
    sizes = {
        "linear": (DoRALinear, (300, 200, 4)),
        "conv": (DoRAConv2d, (20, 40, 3)),
        "embedding": (DoRAEmbedding, (400, 300)),
    }
    make, shape = sizes[kind]
    layer = trained(make(*shape, rank=4) if kind != "linear" else make(*shape))
    before = layer.adapter.constant_norm(layer)
    by_hand(layer, OPTIMIZERS[optimizer])
    after = layer.adapter.constant_norm(layer)
    torch.testing.assert_close(after, layer.adapter.weight_norm(layer).detach(), rtol=1e-6, atol=0)
    assert not torch.equal(before, after)


WRITES = {
    "in place": lambda layer: layer.lora_B.mul_(2),
    "through data": lambda layer: layer.lora_B.data.mul_(2),
    "one value of A": lambda layer: layer.lora_A.data[3].add_(1),
    "one value of B": lambda layer: set_bits(layer.lora_B.data),
    "other data": lambda layer: setattr(layer.lora_A, "data", layer.lora_A.data * 3),
    "the base": lambda layer: layer.weight.data.mul_(1.5),
    "one value of the base": lambda layer: set_bits(layer.weight.data),
    "the base turned round": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(1)),
    "rows of the base exchanged": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "signs of the base": lambda layer: layer.weight.data.neg_(),
    "another base": lambda layer: layer.load_state_dict({"weight": torch.ones_like(layer.weight)}, strict=False),
    "the scale": lambda layer: setattr(layer.adapter, "scale", 7.0),
}
SIZES = {"small": lambda: DoRALinear(40, 50, 2, 4), "large": lambda: DoRALinear(300, 200, 4, 8)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("write", WRITES)
def test_every_kind_of_change_is_noticed(write, size):
    layer = trained(SIZES[size]())
    layer(torch.randn(2, layer.in_features))
    with torch.no_grad():
        WRITES[write](layer)
    adapter = layer.adapter
    torch.testing.assert_close(adapter.constant_norm(layer), adapter.weight_norm(layer).detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("layout", ["plain", "transposed", "inside of another", "channels last"])
def test_a_change_of_any_single_value_is_noticed(dtype, layout):
    memory = (torch.rand(40 * 30 * 16 * 9 + 3) * 200).to(dtype)
    shapes = {"plain": (0, (400, 432)), "inside of another": (3, (400, 432)), "transposed": (0, (400, 432))}
    start, shape = shapes.get(layout, (0, (40, 30, 16, 9)))
    tensor = memory[start : start + 400 * 432].view(shape)
    tensor = {"transposed": lambda t: t.T, "channels last": lambda t: t.permute(0, 3, 1, 2)}.get(layout, lambda t: t)(
        tensor
    )
    known = Fingerprint([tensor])
    assert known.holds([tensor])
    for at in [0, 1, 2, 17, len(memory) // 2, 400 * 432 - 1, *torch.randint(3, 400 * 432, (20,)).tolist()]:
        before = memory[at + start * (at == 0)].clone()
        where = memory.data[at + start * (at == 0) :][:1]
        where.copy_(torch.where(where == 1, 2, 1))
        assert known.holds([tensor]) == (at + start * (at == 0) < start)
        where.copy_(before)
        assert known.holds([tensor])


def test_a_norm_of_inference_mode_serves_training():
    """Also where the plain path keeps it for backward: an embedding's lookup."""
    layer, tokens = DoRAEmbedding(50, 12, rank=4), torch.arange(6)
    trained(layer)
    with torch.inference_mode():
        layer(tokens)
    layer(tokens).sum().backward()
    assert layer.magnitude.grad.abs().sum() > 0
    linear = trained(DoRALinear(6, 5, 2, 4))
    with torch.inference_mode():
        linear(torch.randn(2, 6))
    with use_reference():
        linear(torch.randn(2, 6, requires_grad=True)).sum().backward()
    assert linear.magnitude.grad.abs().sum() > 0


class TestWithoutWaitingForADevice:
    """The rule of devices that answer late, followed on a CPU."""

    @pytest.fixture(autouse=True)
    def late(self, monkeypatch):
        counted, real = [], weight_norm.dense_norm
        monkeypatch.setattr(weight_norm, "_answers_at_once", lambda tensor: False)
        monkeypatch.setattr(weight_norm, "dense_norm", lambda *args: counted.append(1) or real(*args))
        return counted

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_once_a_pass_also_with_replays_and_never_across_passes(self, reentrant, late):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(6, 6)

            def forward(self, x):
                return checkpoint(self.fc, checkpoint(self.fc, x, use_reentrant=reentrant), use_reentrant=reentrant)

        model = LoraModel(Twice(), LoraConfig(rank=2, use_dora=True, target_modules=["fc"]), verbose=False)
        layer = trained(model.wrapped.fc)
        late.clear()
        for step in range(1, 4):
            model(torch.randn(3, 6, requires_grad=True)).square().sum().backward()
            assert len(late) == step
        by_hand(layer, OPTIMIZERS["AdamW, fused"])
        model(torch.randn(3, 6, requires_grad=True))
        assert len(late) == 4
        torch.testing.assert_close(layer.adapter._norms._of_pass[-1], layer.adapter.weight_norm(layer).detach())
        layer.lora_A.data.mul_(2)
        model.eval()
        torch.testing.assert_close(layer.adapter.constant_norm(layer), layer.adapter.weight_norm(layer).detach())

    @pytest.mark.parametrize("kind", LAYERS)
    def test_the_norm_is_the_same(self, kind, monkeypatch):
        monkeypatch.setattr(weight_norm, "_CHUNK_OFF_CPU", 100)
        layer = trained(LAYERS[kind]())
        adapter = layer.adapter
        torch.testing.assert_close(adapter.constant_norm(layer), adapter.weight_norm(layer).detach(), rtol=1e-6, atol=0)

    def test_nothing_is_read_back(self):
        layer = DoRALinear(6, 5, 2, 4, device="meta")  # where any question about a value is an error
        kept = [layer.lora_A, layer.lora_B]
        assert layer.adapter._norms.norm(layer, kept, lambda: tuple(kept), layer.scale).shape == (5,)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(twin):
    layer, x = trained(DoRALinear(6, 5, 2, 4)), torch.randn(2, 6)
    expected = layer(x)
    other = twin(layer)
    assert torch.equal(other(x), expected)
    trained(other)
    other(x)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(other(x), expected)


def test_inference_tensors_are_watched_too(computed):
    with torch.inference_mode():
        layer = DoRALinear(6, 5, 2, 4)
        layer.lora_B.normal_()
        first = layer(torch.ones(1, 6))
        layer.lora_B.mul_(2)
        assert not torch.equal(layer(torch.ones(1, 6)), first)
    assert len(computed) == 3


def test_a_new_adapter_changes_nothing_at_all(tiny, tokens):
    expected = tiny(tokens)
    model = LoraModel(tiny, LoraConfig(rank=2, use_dora=True), verbose=False)
    torch.testing.assert_close(model(tokens), expected, atol=1e-6, rtol=1e-6)
