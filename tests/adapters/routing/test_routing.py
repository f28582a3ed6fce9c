"""Named adapters and routing: routed equals separate, in outputs and in gradients."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_exp.adapters import BASE, LoraConfig, LoraModel

CONFIGS = {
    "a": LoraConfig(rank=2, target_modules=["q_proj"], lora_dropout=0.2),
    "b": LoraConfig(rank=5, use_dora=True, use_rslora=False, lora_dropout=0.4, bias="all"),
    "c": LoraConfig(rank=3, target_modules=["embed", "q_proj"], bias="lora_only", modules_to_save=["lm_head"]),
}


@pytest.fixture
def model(tiny, randomised):
    made = None
    for name, config in CONFIGS.items():
        if made is None:
            made = LoraModel(tiny, config, name, verbose=False)
        else:
            made.add_adapter(name, config)
        randomised(made, name)
    return made


def gradients(model, name):
    return {key: p.grad.clone() for key, p in model.adapter_parameters(name).items() if p.grad is not None}


def test_routed_equals_separate_in_training(model, tokens):
    sizes = {"a": 1, "b": 2, "c": 1}
    alone = copy.deepcopy(model)
    for _ in range(2):  # the second step's masks must agree as well
        with model.route(sizes):
            routed = model(tokens)
        model.zero_grad()
        routed.square().sum().backward()
        start = 0
        for name, size in sizes.items():
            alone.zero_grad()
            alone.set_adapter(name)
            out = alone(tokens[start : start + size])
            torch.testing.assert_close(routed[start : start + size], out, atol=1e-6, rtol=1e-5)
            out.square().sum().backward()
            expected = gradients(alone, name)
            assert expected.keys() == model.adapter_parameters(name).keys()
            for key, value in gradients(model, name).items():
                torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)
            start += size


def test_an_adapters_masks_do_not_depend_on_its_company(model, tokens):
    twin = copy.deepcopy(model)
    with model.route({"a": 2, "b": 2}):
        first = model(tokens)[:2]
    torch.rand(7)
    with twin.route({"c": 2, "a": 2}):
        second = twin(torch.cat([tokens[2:], tokens[:2]]))[2:]
    torch.testing.assert_close(first, second)


def test_same_seed_same_bits(make_tiny, tokens, randomised):
    def run():
        torch.manual_seed(3)
        model = LoraModel(make_tiny(), LoraConfig(rank=4, lora_dropout=0.5), verbose=False)
        randomised(model)
        outs = [model(tokens) for _ in range(3)]
        assert not torch.equal(outs[0], outs[1])
        torch.stack(outs).square().sum().backward()
        return [*outs, *(p.grad for p in model.adapter_parameters().values())]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


def test_dropout_resumes(model, tokens):
    model.set_adapter("b")
    model(tokens)
    state = model.dropout_state("b")
    next_out = model(tokens)
    model.load_dropout_state(state, "b")
    assert torch.equal(model(tokens), next_out)


class Checkpointed(torch.nn.Module):
    """The blocks of a tiny model, replayed in backward in one way or not at all."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, tokens):
        h = self.inner.embed(tokens).requires_grad_(self.how == "reentrant")
        for layer in self.inner.layers:
            if self.how in ("reentrant", "nonreentrant"):
                h = checkpoint(layer, h, use_reentrant=self.how == "reentrant")
            else:
                h = layer(h)
        return self.inner.lm_head(h)


@pytest.mark.parametrize("base_dropout", [False, True])
@pytest.mark.parametrize("how", ["reentrant", "nonreentrant", "whole"])
def test_checkpointing_replays_masks_and_routes(how, base_dropout, make_tiny, tokens, randomised):
    def run(how):
        torch.manual_seed(1)
        tiny = make_tiny()
        if base_dropout:
            tiny.layers[0].norm = torch.nn.Sequential(tiny.layers[0].norm, torch.nn.Dropout(0.3))
        targets = {"target_modules": ["q_proj", "v_proj"]}
        inner = Checkpointed(tiny, how)
        model = LoraModel(inner, LoraConfig(rank=3, lora_dropout=0.4, **targets), "a", verbose=False)
        model.add_adapter("b", LoraConfig(rank=2, lora_dropout=0.2, **targets))
        for name in ("a", "b"):
            randomised(model, name)
        call = partial(checkpoint, model, use_reentrant=False) if how == "whole" else model
        losses = []
        for sizes in ({"a": 4}, {"a": 2, "b": 2}, {"b": 4}):
            with model.route(sizes):
                losses.append(call(tokens).square().mean())
        model.set_adapter("a")
        losses.append(call(tokens).square().mean())
        for loss in reversed(losses):  # all forwards before all backwards, in another order
            loss.backward()
        return [p.grad for name in ("a", "b") for p in model.adapter_parameters(name).values()]

    for plain, replayed in zip(run(None), run(how), strict=True):
        torch.testing.assert_close(plain, replayed, atol=1e-6, rtol=1e-5)


def test_sampling_is_not_disturbed(model, tokens):
    torch.manual_seed(4)
    seed = torch.initial_seed()
    model.set_adapter("c")
    model(tokens)
    after = torch.rand(3)
    assert torch.initial_seed() == seed
    torch.manual_seed(4)
    assert torch.equal(torch.rand(3), after)


def test_models_inside_each_other_keep_their_own_routes(make_tiny, tokens, randomised):
    teacher = LoraModel(make_tiny(), LoraConfig(rank=2), "t", verbose=False)
    randomised(teacher, "t")
    teacher(tokens)  # has trained before
    expected = teacher.eval()(tokens)
    teacher.add_adapter("u", LoraConfig(rank=2))

    class Student(make_tiny):
        def forward(self, tokens):
            return super().forward(tokens) - teacher(tokens)

    model = LoraModel(Student(), LoraConfig(rank=2, lora_dropout=0.5), verbose=False)
    base = model.eval()(tokens)
    for _ in range(3):
        torch.testing.assert_close(model.train()(tokens), base)
    torch.testing.assert_close(teacher(tokens), expected)


def test_route_samples(model, tokens):
    model.eval()
    names = ["b", BASE, "a", "b"]
    with model.route_samples(names):
        routed = model(tokens)
    for i, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                expected = model(tokens[i : i + 1])
        else:
            model.set_adapter(name)
            expected = model(tokens[i : i + 1])
        torch.testing.assert_close(routed[i : i + 1], expected)
    with pytest.raises(ValueError, match="inference"), model.train().route_samples(names):
        pass


def test_disabling_gives_exactly_the_base(model, make_tiny, tokens):
    torch.manual_seed(0)
    base = make_tiny()
    for name in CONFIGS:
        model.set_adapter(name)
        with model.disable_adapter():
            assert torch.equal(model(tokens), base(tokens))
        assert model.active_adapter == name


def test_deleting(model, tokens):
    model.eval()
    model.set_adapter("a")
    before = model(tokens)
    model.delete_adapter("c")
    assert torch.equal(model(tokens), before)
    assert model.active_adapter == "a"
    model.delete_adapter("a")
    assert model.active_adapter == "b"
    with pytest.raises(ValueError, match="no adapter 'a'; this model has b"):
        model.set_adapter("a")
    model.delete_adapter("b")
    assert {name for name, _ in model.wrapped.named_parameters() if "adapters" in name} == set()


def test_deleting_inside_a_context(model, tokens):
    model.eval()
    model.set_adapter("b")
    expected = model(tokens)
    model.set_adapter("a")
    with model.disable_adapter():
        model.delete_adapter("a")
        assert model.active_adapter is None
    assert model.active_adapter == "b"
    assert torch.equal(model(tokens), expected)
    with model.route({"b": 2, "c": 2}):
        before = model(tokens)
        for name in ("b", "c"):
            with pytest.raises(ValueError, match=f"adapter '{name}' is needed by an open context"):
                model.delete_adapter(name)
        assert torch.equal(model(tokens), before)
    with model.disable_adapter(), model.route_samples(["b", BASE, BASE, "b"]), pytest.raises(ValueError, match="open"):
        model.delete_adapter("b")
    model.delete_adapter("c")
    with model.route({"b": 4}), model.disable_adapter(), pytest.raises(ValueError, match="open context"):
        model.delete_adapter("b")
    with model.disable_adapter():
        model.delete_adapter("b")
        base = model(tokens)
    assert torch.equal(model(tokens), base)
    assert model.active_adapter is None


def test_deleting_what_is_merged_outside_of_a_context(model, tokens):
    model.eval()
    model.set_adapter("a")
    model.merge()
    merged = model(tokens)
    with model.disable_adapter():
        with pytest.raises(ValueError, match="adapter 'a' is needed by an open context"):
            model.delete_adapter("a")
        model.delete_adapter("c")
    assert torch.equal(model(tokens), merged)


def test_a_chosen_adapter_that_was_deleted_elsewhere(model, tokens):
    model.eval()
    chosen, deleted = threading.Event(), threading.Event()

    def serve():
        model.set_adapter("b")
        chosen.set()
        deleted.wait(10)
        return model.active_adapter, model(tokens)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(serve)
        assert chosen.wait(10)
        model.delete_adapter("b")
        deleted.set()
        active, out = future.result()
    assert active == "a"
    assert torch.equal(out, model(tokens))


def test_bad_routes(model, tokens):
    with (
        pytest.raises(ValueError, match=r"covers 3 samples.*leading dimension of 4"),
        model.route({"a": 1, "b": 2}),
    ):
        model(tokens)
    for sizes in ({}, {"a": 0}, {"a": -1, "b": 5}, {"a": 1.5}):
        with pytest.raises(ValueError, match="route"), model.route(sizes):
            pass
    with pytest.raises(ValueError, match="no adapter 'z'"), model.route({"z": 4}):
        pass
    with pytest.raises(ValueError, match="already"):
        model.add_adapter("a", CONFIGS["a"])
    for name in ("x.y", "", BASE, "keys"):
        with pytest.raises(ValueError, match="cannot be used"):
            model.add_adapter(name, CONFIGS["a"])


def test_flattened_batches_and_shared_positions(tokens):
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.where = torch.nn.Embedding(11, 8), torch.nn.Embedding(5, 8)
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, tokens):
            h = self.embed(tokens) + self.where(torch.arange(tokens.shape[1])[None])
            return self.fc(h.flatten(0, 1)).view_as(h)

    model = LoraModel(Flat(), LoraConfig(rank=2, layer_types=("linear", "embedding")), "a", verbose=False)
    model.add_adapter("b", LoraConfig(rank=3, layer_types=("linear", "embedding")))
    for name in "ab":
        for p in model.adapter_parameters(name).values():
            torch.nn.init.normal_(p)
    with model.route({"a": 1, "b": 3}):
        routed = model(tokens)
    model.set_adapter("b")
    torch.testing.assert_close(routed[1:], model(tokens[1:]))


def test_loading_under_another_name(model, tokens, tmp_path):
    model.eval()
    model.save_pretrained(tmp_path, name="b")
    model.load_adapter(tmp_path, "again")
    model.set_adapter("b")
    expected = model(tokens)
    model.set_adapter("again")
    assert torch.equal(model(tokens), expected)
