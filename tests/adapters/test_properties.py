"""Laws that hold for every shape, rank and kind (hypothesis)."""

import copy
import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel

few = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
dims = st.integers(2, 9)
configs = st.builds(
    LoraConfig,
    rank=st.integers(1, 4).map(lambda half: 2 * half),
    lora_alpha=st.sampled_from([0.5, 4.0, 16]),
    use_rslora=st.booleans(),
    use_dora=st.booleans(),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    layer_types=st.just("all"),
)


class Net(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 2 * width)
        self.conv = nn.Conv1d(2 * width, 2 * channels, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(2 * channels)
        self.fc = nn.Linear(2 * channels, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(self.embed(tokens).mT).mT))


def made(width, channels, config):
    torch.manual_seed(width)
    base = Net(max(width, 8), max(channels, 8))
    plain = copy.deepcopy(base)
    return plain, LoraModel(base, config, verbose=False), torch.randint(0, 13, (3, 4))


def shaken(model, name="default"):
    with torch.no_grad():
        for parameter in model.adapter_parameters(name).values():
            parameter.add_(0.2 * torch.randn_like(parameter))


def base_state(model, plain):
    state = model.wrapped.state_dict()
    return {name: state[name] for name in plain.state_dict()}


@few
@given(dims, dims, configs)
def test_a_new_adapter_is_the_identity(width, channels, config):
    plain, model, tokens = made(width, channels, config)
    assert torch.allclose(model(tokens), plain(tokens), atol=1e-6)


@few
@given(dims, dims, configs)
def test_merged_is_adapted_and_unmerged_is_untouched(width, channels, config):
    plain, model, tokens = made(width, channels, config)
    shaken(model)
    adapted = model(tokens)
    model.merge()
    torch.testing.assert_close(model(tokens), adapted, atol=1e-4, rtol=1e-3)
    model.unmerge()
    assert all(torch.equal(value, plain.state_dict()[k]) for k, value in base_state(model, plain).items())
    assert torch.equal(model(tokens), adapted)


@few
@given(dims, dims, configs)
def test_saved_and_loaded_is_the_same(tmp_path_factory, width, channels, config):
    plain, model, tokens = made(width, channels, config)
    shaken(model)
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    model.save_model(path)
    again = LoraModel(plain, config, verbose=False)
    again.load_model(path)
    assert torch.equal(again(tokens), model(tokens))


@few
@given(dims, dims, configs, configs)
def test_routed_is_separate(width, channels, one, other):
    _, model, tokens = made(width, channels, one)
    model.add_adapter("other", other)
    shaken(model)
    shaken(model, "other")
    with model.route({"other": 2, "default": 1}):
        routed = model(tokens)
    routed.square().sum().backward()
    grads = {n: [p.grad for p in model.adapter_parameters(n).values()] for n in ("default", "other")}
    model.zero_grad()
    for name, part in (("other", slice(0, 2)), ("default", slice(2, 3))):
        model.set_adapter(name)
        out = model(tokens[part])
        torch.testing.assert_close(routed[part], out, atol=1e-5, rtol=1e-4)
        out.square().sum().backward()
        for routed_grad, parameter in zip(grads[name], model.adapter_parameters(name).values(), strict=True):
            torch.testing.assert_close(routed_grad, parameter.grad, atol=1e-4, rtol=1e-3)


@few
@given(dims, dims, configs)
def test_the_base_never_changes(width, channels, config):
    plain, model, tokens = made(width, channels, config)
    optimizer = torch.optim.SGD(model.adapter_parameters().values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(value, plain.state_dict()[k]) for k, value in base_state(model, plain).items())
    with model.disable_adapter():
        assert torch.equal(model(tokens), plain(tokens))


@given(st.integers(1, 512), st.floats(0.1, 100))
def test_the_scales_differ_by_the_root_of_the_rank(rank, alpha):
    stable = LoraConfig(rank=rank, lora_alpha=alpha).scale
    standard = LoraConfig(rank=rank, lora_alpha=alpha, use_rslora=False).scale
    assert math.isclose(stable / standard, math.sqrt(rank))


def test_the_variance_law():
    """At fixed factor variance the adapter's output has variance ~ 1/r under alpha/r, constant under
    alpha/sqrt(r) (arXiv 2312.03732, theorem 3.2)."""
    ranks, x = [4, 16, 64, 256], torch.randn(128, 256)
    for rslora, slope in ((False, -1.0), (True, 0.0)):
        variances = []
        for rank in ranks:
            base = nn.Sequential(nn.Linear(256, 256, bias=False))
            model = LoraModel(base, LoraConfig(rank=rank, lora_alpha=16, use_rslora=rslora), verbose=False)
            for parameter in model.adapter_parameters().values():
                nn.init.normal_(parameter, std=0.05)
            with torch.no_grad():
                adapted = model(x)
                with model.disable_adapter():
                    variances.append((adapted - model(x)).var().log2())
        fitted = (variances[-1] - variances[0]) / 6  # log2(256 / 4)
        assert abs(fitted - slope) < 0.06
