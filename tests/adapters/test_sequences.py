"""Any sequence of what a user may do with a model's adapters, against W + delta worked out by hand."""

import copy
import logging
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel, load_merged, use_reference

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
TOKENS = torch.arange(12).view(4, 3)
CLOSE = {"atol": 2e-5, "rtol": 1e-3}


class Net(nn.Module):
    """A tied head, a grouped convolution, a norm, and a linear layer that is registered twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)
        self.again = self.fc
        self.head = nn.Linear(8, 13)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.norm(self.conv(self.embed(tokens).mT).mT)
        return self.head(self.again(torch.tanh(self.fc(h))))


TARGETS = [["fc"], ["embed"], ["head"], ["conv", "fc"], ["embed", "head", "conv", "fc"]]
configs = st.builds(
    LoraConfig,
    rank=st.just(2),
    lora_alpha=st.sampled_from([2.0, 4.0]),
    target_modules=st.sampled_from(TARGETS),
    layer_types=st.just("all"),
    use_dora=st.booleans(),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    modules_to_save=st.sampled_from([None, ["norm"], ["head"]]),
).filter(
    lambda config: (
        (config.bias != "lora_only" or config.target_modules != ["embed"])  # which has none
        and (config.modules_to_save != ["head"] or config.target_modules != ["head"])
    )
)


def delta(layer, adapter):
    A, B = adapter.lora_A.detach(), adapter.lora_B.detach()
    if isinstance(layer, nn.Conv1d):
        return torch.cat([torch.einsum("ro,rik->oik", b, a) for a, b in zip(A.chunk(2), B.chunk(2), strict=True)])
    return (A @ B).T if isinstance(layer, nn.Linear) else A @ B


class Subject:
    """A model under test beside what it should be: its base, and what each adapter makes of it."""

    inputs, fresh = TOKENS, Net

    def __init__(self, configs, folder):
        torch.manual_seed(0)
        self.base, self.folder, self.merged, self.active = self.made(), folder, None, "a"
        self.model = LoraModel(copy.deepcopy(self.base), configs[0], "a", verbose=False)
        self.model.add_adapter("b", configs[1])
        self.configs = dict(zip("ab", configs, strict=True))
        for name in "ab":
            self.scramble(name)

    def made(self):
        return Net()

    def scramble(self, name):
        with torch.no_grad():
            for parameter in self.model.adapter_parameters(name).values():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def plain(self, name):
        """The base with what adapter `name` changes, every weight its own."""
        plain = copy.deepcopy(self.base)
        plain.head.weight = nn.Parameter(plain.head.weight.detach().clone())
        parameters = self.model.adapter_parameters(name) if name else {}
        with torch.no_grad():
            for key in ("embed", "conv", "fc", "head"):
                layer = getattr(self.model.wrapped, key)
                layer = getattr(layer, "original", layer)
                if name and hasattr(layer, "adapters") and name in layer.adapters:
                    adapter, weight = layer.adapters[name], getattr(plain, key).weight
                    weight += delta(layer, adapter) * self.configs[name].lora_alpha / 2**0.5
                    if self.configs[name].use_dora:
                        out = 1 if key == "embed" else 0
                        others = [axis for axis in range(weight.dim()) if axis != out]
                        shape = [-1 if axis == out else 1 for axis in range(weight.dim())]
                        weight *= (adapter.magnitude / weight.norm(dim=others)).view(shape)
            for key, value in parameters.items():
                if key.endswith(".bias") or key.startswith("norm.") or key == "head.weight":
                    plain.get_parameter(key).copy_(value)
        return plain

    def check(self):
        assert self.model.merged_adapter == self.merged
        assert self.model.active_adapter == (self.merged or self.active)
        expected = self.plain(self.merged or self.active)(self.inputs)
        torch.testing.assert_close(self.model(self.inputs), expected, **CLOSE)

    # What a user does

    def merge(self, name):
        if self.merged:
            with pytest.raises(ValueError, match="unmerge"):
                self.model.merge(name)
        else:
            self.model.merge(name)
            self.merged = name

    def unmerge(self, name):
        if self.merged:
            self.model.unmerge()
            self.merged = None

    def activate(self, name):
        if self.merged:
            with pytest.raises(ValueError, match="unmerge"):
                self.model.set_adapter(name)
        else:
            self.model.set_adapter(name)
            self.active = name

    def disable(self, name):
        with self.model.disable_adapter():
            torch.testing.assert_close(self.model(self.inputs), self.base(self.inputs), atol=1e-6, rtol=1e-6)

    def route(self, name):
        if not self.merged:
            with self.model.route({name: 1, "__base__": 1, "b": 2} if name == "a" else {"b": 3, "a": 1}):
                out = self.model(self.inputs)
            torch.testing.assert_close(out[:1], self.plain(name)(TOKENS[:1]), **CLOSE)

    def merged_file(self, name):
        self.model.save_model(self.folder / "merged.safetensors", merge_weights=True, name=name)
        loaded = load_merged(self.fresh(), self.folder / "merged.safetensors")
        torch.testing.assert_close(loaded(self.inputs), self.plain(name)(self.inputs), **CLOSE)

    def unloaded_copy(self, name):
        plain = copy.deepcopy(self.model).merge_and_unload(name)
        torch.testing.assert_close(plain(self.inputs), self.plain(name)(self.inputs), **CLOSE)
        assert b"lora_exp" not in pickle.dumps(plain)

    def adapter_file(self, name):
        self.model.save_model(self.folder / "adapter.safetensors", name=name)
        twin = LoraModel(copy.deepcopy(self.base), self.configs[name], name, verbose=False)
        twin.load_model(self.folder / "adapter.safetensors")
        torch.testing.assert_close(twin(self.inputs), self.plain(name)(self.inputs), **CLOSE)

    def state_dict(self, name):
        state = pickle.loads(pickle.dumps(self.model.state_dict()))
        twin = Subject(list(self.configs.values()), self.folder)
        twin.model.load_state_dict(state)
        twin.model.set_adapter(self.merged or self.active)
        expected = self.plain(self.merged or self.active)(self.inputs)
        torch.testing.assert_close(twin.model(self.inputs), expected, **CLOSE)
        with twin.model.disable_adapter():
            torch.testing.assert_close(twin.model(self.inputs), self.base(self.inputs), atol=1e-6, rtol=1e-6)

    def deepcopied(self, name):
        self.model = copy.deepcopy(self.model)

    def pickled(self, name):
        self.model = pickle.loads(pickle.dumps(self.model))

    def inference(self, name):
        with torch.inference_mode():
            self.check()

    def fused_step(self, name):
        """Values change, versions do not."""
        if self.merged:
            return
        parameters = list(self.model.adapter_parameters(name).values())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        torch.optim.SGD(parameters, lr=0.05, fused=True).step()
        self.model.zero_grad()

    def base_edited(self, name):
        if not self.merged:
            for model in (self.base, self.model.wrapped):
                model.fc.weight.data[2, 3] += 0.5

    def base_reloaded(self, name):
        if not self.merged:
            new = {key: value * 0.9 for key, value in self.base.fc.state_dict().items()}
            self.base.fc.load_state_dict(new)
            self.model.wrapped.fc.load_state_dict(new, strict=False)

    def trained(self, name):
        """Gradients as the plain formulas have them, also after what was computed in inference mode."""
        if self.merged:
            return
        found = []
        for way in (torch.enable_grad, use_reference):
            self.model.zero_grad()
            with way():
                self.model(self.inputs).square().sum().backward()
            found.append([p.grad for p in self.model.adapter_parameters(self.active).values()])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
        self.model.zero_grad()


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 5)

    def forward(self, x):
        return self.head(x + self.down(torch.tanh(self.up(x))))


class Quantised(Subject):
    """4 or 8 bits, against the same adapter on the dense weights that they stand for."""

    inputs, fresh, kind = torch.linspace(-1, 1, 192).view(3, 64), Dense, "nf4"

    def made(self):
        bnb = pytest.importorskip("bitsandbytes")
        model = Dense()
        for name in ("up", "down"):
            layer = getattr(model, name)
            if self.kind == "int8":
                packed = bnb.nn.Linear8bitLt(64, 64, name == "up", has_fp16_weights=False)
            else:
                packed = bnb.nn.Linear4bit(64, 64, name == "up", compute_dtype=torch.float32, quant_type=self.kind)
            packed.load_state_dict(layer.state_dict(), strict=False)
            setattr(model, name, packed.to("cpu"))
        return model

    def plain(self, name):
        twin, dense = (
            Dense(),
            LoraModel(copy.deepcopy(self.base), LoraConfig(target_modules=["up", "down"]), verbose=False),
        )
        dense.save_model(self.folder / "dense.safetensors", merge_weights=True)  # B is zero: the base itself
        load_merged(twin, self.folder / "dense.safetensors")
        if not name:
            return twin
        model = LoraModel(twin, self.configs[name], name, verbose=False)
        with torch.no_grad():
            for key, value in model.adapter_parameters(name).items():
                value.copy_(self.model.adapter_parameters(name)[key])
        return model

    def disable(self, name):
        before = self.model(self.inputs)
        with self.model.disable_adapter():
            torch.testing.assert_close(self.model(self.inputs), self.plain(None)(self.inputs), **CLOSE)
        assert torch.equal(self.model(self.inputs), before)


ACTIONS = [
    key for key in vars(Subject) if not key.startswith("_") and key not in ("made", "scramble", "plain", "check")
]
ACTIONS = [key for key in ACTIONS if callable(getattr(Subject, key)) and key != "fresh"]
NOT_QUANTISED = ("route", "state_dict", "base_edited", "base_reloaded", "trained")


def run(subject, actions):
    subject.check()
    for action, name in actions:
        getattr(subject, action)(name)
        subject.check()


def run_plain(configs, actions, folder):
    try:
        subject = Subject(configs, folder)
    except ValueError as error:
        if "holds layers of another adapter" in str(error):  # refused, with what to do
            return
        raise
    run(subject, actions)


def steps(actions):
    return st.lists(st.tuples(st.sampled_from(actions), st.sampled_from("ab")), min_size=1, max_size=8)


common = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
pairs = st.lists(configs, min_size=2, max_size=2)


@settings(max_examples=40, **common)
@given(pairs, steps(ACTIONS))
def test_any_sequence_of_actions(tmp_path_factory, configs, actions):
    run_plain(configs, actions, tmp_path_factory.mktemp("files"))


@pytest.mark.slow
@settings(max_examples=200, **common)
@given(pairs, steps(ACTIONS))
def test_many_sequences_of_actions(tmp_path_factory, configs, actions):
    run_plain(configs, actions, tmp_path_factory.mktemp("files"))


on_linear = st.builds(
    LoraConfig,
    rank=st.just(2),
    target_modules=st.sampled_from([["up"], ["down"], ["up", "down"], ["up", "head"]]),
    use_dora=st.booleans(),
    bias=st.sampled_from(["none", "all"]),
)


@settings(max_examples=20, **common)
@given(
    st.sampled_from(["nf4", "fp4", "int8"]),
    st.lists(on_linear, min_size=2, max_size=2),
    steps([key for key in ACTIONS if key not in NOT_QUANTISED]),
)
def test_any_sequence_on_a_quantised_base(tmp_path_factory, kind, configs, actions):
    subject = type("Of this kind", (Quantised,), {"kind": kind})
    run(subject(configs, tmp_path_factory.mktemp("files")), actions)
