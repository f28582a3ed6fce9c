"""Passes and their replays: each call's own mask, each pass's own adapter, whatever happens in between."""

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_exp.adapters import LoraConfig, LoRALinear, LoraModel

HOWS = ("reentrant", "nonreentrant", "whole", "whole reentrant", "nested", "mixed", "mixed inside out")


class Shared(nn.Module):
    """One block that is called several times, as ALBERT's, twice in each checkpointed part."""

    def __init__(self, how, parts=3):
        super().__init__()
        self.embed, self.how, self.parts = nn.Embedding(11, 8), how, parts
        self.fc, self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def part(self, h):
        for _ in range(2):
            h = h + self.out(torch.tanh(self.fc(h)))
        return h

    def group(self, h):
        inner = {"nested": False, "mixed": False, "mixed inside out": True}.get(self.how)
        for _ in range(2):
            h = self.part(h) if inner is None or not h.requires_grad else checkpoint(self.part, h, use_reentrant=inner)
        return h

    def forward(self, tokens):
        h = self.embed(tokens)
        h = h if h.requires_grad else h.requires_grad_()
        outer = {"reentrant": True, "nonreentrant": False, "nested": False, "mixed": True, "mixed inside out": False}
        for _ in range(self.parts):
            is_plain = self.how not in outer or not torch.is_grad_enabled()
            h = self.group(h) if is_plain else checkpoint(self.group, h, use_reentrant=outer[self.how])
        return self.head(h)


def shared_model(how, randomised, dropout=0.4, **options):
    torch.manual_seed(1)
    options = {"target_modules": ["fc", "out"], "lora_dropout": dropout, **options}
    model = LoraModel(Shared(how), LoraConfig(rank=3, **options), "a", verbose=False)
    model.add_adapter("b", LoraConfig(rank=2, **{**options, "lora_dropout": dropout / 2}))
    for name in ("a", "b"):
        randomised(model, name)
    return model


def caller(model, how, tokens):
    if not how or not how.startswith("whole"):
        return model(tokens)
    anchor = torch.zeros(1, requires_grad=True)  # reentrant checkpoints want an input that requires a gradient
    return checkpoint(lambda x, _: model(x), tokens, anchor, use_reentrant="reentrant" in how)


def adapter_gradients(model):
    names = list(model.configs)
    return {(n, k): p.grad for n in names for k, p in model.adapter_parameters(n).items()}


def same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] is None) == (value is None), key
        if value is not None:
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4, msg=str(key))


@pytest.mark.parametrize("plain", [False, True])
def test_each_call_of_a_layer_has_a_mask_of_its_own(plain, randomised, monkeypatch):
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            return torch.stack([self.fc(x) for _ in range(3)])

    monkeypatch.setattr("lora_exp.adapters.numerics.reference._plain", plain)
    model = LoraModel(Thrice(), LoraConfig(rank=4, lora_dropout=0.5), verbose=False)
    randomised(model)
    first = model(torch.ones(4, 16))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    state = model.dropout_state()
    again = model(torch.ones(4, 16))
    model.load_dropout_state(state)
    assert torch.equal(model(torch.ones(4, 16)), again)


@pytest.mark.parametrize("how", HOWS)
def test_replays_of_a_shared_layer_find_each_calls_mask(how, tokens, randomised):
    def run(how):
        model = shared_model(how, randomised)
        losses = []
        for sizes in ({"a": 4}, {"a": 1, "b": 3}, {"b": 4}):
            with model.route(sizes):
                losses.append(caller(model, how, tokens).square().mean())
        for _ in range(2):
            losses.append(caller(model, how, tokens).square().mean())
        for loss in reversed(losses):
            loss.backward()
        return adapter_gradients(model)

    same_gradients(run(how), run(None))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["whole", "whole reentrant"])
def test_a_routed_pass_is_replayed_outside_of_its_context(how, training, tokens, randomised):
    class Flat(Shared):
        def part(self, h):
            return super().part(h.flatten(0, 1)).view_as(h)

    def run(how):
        model = LoraModel(Flat(None), LoraConfig(rank=2, target_modules=["fc"], lora_dropout=0.3), "a", verbose=False)
        model.add_adapter("b", LoraConfig(rank=2, target_modules=["out"], lora_dropout=0.3))
        for name in ("a", "b"):
            randomised(model, name)
        model.train(training)
        with model.route({"a": 3, "b": 1}):
            out = caller(model, how, tokens)
        out.square().mean().backward()
        return adapter_gradients(model)

    torch.manual_seed(3)
    expected = run(None)
    torch.manual_seed(3)
    same_gradients(run(how), expected)


@pytest.mark.parametrize("how", HOWS)
def test_replays_of_the_wrapped_model_draw_their_masks_again(how, tokens, randomised):
    def run(how):
        model = shared_model(how, randomised)
        torch.manual_seed(2)
        outs = [caller(model.wrapped, how, tokens) for _ in range(2)]
        model.set_adapter("b")
        torch.stack(outs).square().mean().backward()
        return adapter_gradients(model)

    same_gradients(run(how), run(None))


@pytest.mark.parametrize("how", HOWS)
def test_without_the_generators_state_replays_find_their_masks_too(how, tokens, randomised, monkeypatch):
    monkeypatch.setitem(globals(), "checkpoint", partial(checkpoint, preserve_rng_state=False))
    test_replays_of_a_shared_layer_find_each_calls_mask(how, tokens, randomised)


def switch(model, stack):
    model.set_adapter("b")


def disable(model, stack):
    stack.enter_context(model.disable_adapter())


def replace(model, stack):
    model.delete_adapter("b")
    model.add_adapter("b", LoraConfig(rank=2, target_modules=["fc", "out"]))
    model.set_adapter("b")


@pytest.mark.parametrize("between", [switch, disable, replace])
@pytest.mark.parametrize("mode", ["train", "eval", "wrapped", "part"])
@pytest.mark.parametrize("how", HOWS)
def test_what_is_switched_before_backward_does_not_move_gradients(how, mode, between, tokens, randomised):
    def run(how, change):
        model = shared_model(how, randomised, dropout=0.0, bias="lora_only", modules_to_save=["head"])
        model.train(mode != "eval")
        if mode == "part":
            h = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
            reentrant = how is not None and how.startswith("re")
            out = model.wrapped.part(h) if how is None else checkpoint(model.wrapped.part, h, use_reentrant=reentrant)
        else:
            out = caller(model.wrapped if mode == "wrapped" else model, how, tokens)
        with contextlib.ExitStack() as stack:
            if change is not None:
                change(model, stack)
            model(tokens)  # another pass in between
            with torch.no_grad():
                model(tokens)
            out.square().mean().backward()
        return adapter_gradients(model)

    expected = {k: g for k, g in run(None, None).items() if k[0] == "a"}
    found = run(how, between)
    same_gradients({k: g for k, g in found.items() if k[0] == "a"}, expected)
    assert all(grad is None for (name, _), grad in found.items() if name == "b")


@pytest.mark.parametrize("mode", ["train", "wrapped"])
@pytest.mark.parametrize("how", HOWS)
def test_a_deleted_adapters_pass_cannot_be_replayed(how, mode, tokens, randomised):
    model = shared_model(how, randomised)
    out = caller(model.wrapped if mode == "wrapped" else model, how, tokens)
    model.delete_adapter("a")
    model.add_adapter("a", LoraConfig(rank=3, target_modules=["fc", "out"], lora_dropout=0.4))
    model.set_adapter("a")
    with pytest.raises(ValueError, match="adapter 'a', which was deleted before the backward pass"):
        out.square().mean().backward()


@pytest.mark.parametrize("how", HOWS)
def test_a_pass_cannot_be_replayed_with_other_weights(how, tokens, randomised):
    model = shared_model(how, randomised)
    loss = caller(model, how, tokens).square().mean()
    model.merge()
    with pytest.raises(ValueError, match="made with no adapter merged into the weights, and now a is"):
        loss.backward()
    loss = caller(model, how, tokens).square().mean()
    model.unmerge()
    with pytest.raises(ValueError, match="made with a merged into the weights, and now none is"):
        loss.backward()


@pytest.mark.parametrize("how", HOWS)
def test_a_pass_made_in_a_backward_hook_is_no_replay(how, tokens, randomised):
    model = shared_model(how, randomised)
    h = torch.randn(3, requires_grad=True)
    loss = caller(model, how, tokens).square().mean() + h.sin().sum()
    model.set_adapter("b")
    with torch.no_grad():
        model.eval()(tokens)
        model.set_adapter("a")
        expected, found = model(tokens), []
    h.register_hook(lambda grad: found.append(model(tokens).detach()))
    model.train(False)
    torch.autograd.grad(loss, h)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("how", HOWS)
def test_a_pass_with_dropout_cannot_be_replayed_in_eval_mode(how, dropout, tokens, randomised):
    model = shared_model(how, randomised, dropout)
    loss = caller(model, how, tokens).square().mean()
    model.eval()
    with torch.no_grad():
        model(tokens)
    if dropout:
        with pytest.raises(ValueError, match="now the model is in eval mode"):
            loss.backward()
        model.train()
        loss = caller(model, how, tokens).square().mean()
        model.eval()
        model.train()
    loss.backward()
    model.check_gradients()


def test_a_pass_leaves_the_global_generator_alone(tokens, randomised):
    seen = []

    class Looks(Shared):
        def part(self, h):
            seen.append(torch.get_rng_state())
            return super().part(h)

    model = LoraModel(Looks(None), LoraConfig(rank=2, lora_dropout=0.5), verbose=False)
    before = torch.get_rng_state()
    model(tokens)
    assert all(torch.equal(state, before) for state in [*seen, torch.get_rng_state()])


def test_other_threads_numbers_are_not_rewound(tokens, tiny):
    model = LoraModel(tiny, LoraConfig(rank=2, lora_dropout=0.5), verbose=False)
    done, drawn = threading.Event(), []

    def sample():
        while not done.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        for _ in range(150):
            model(tokens)
    finally:
        done.set()
        thread.join()
    assert len(set(drawn)) == len(drawn)


def in_threads(*jobs):
    """Run jobs at once, each in a thread, and raise what one of them raised."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def routed(model, name, tokens):
    return model.route({name: len(tokens)}) if name else model.disable_adapter()


def set_for_good(model, name, tokens):
    model.set_adapter(name)
    return contextlib.nullcontext()


def sampled(model, name, tokens):
    return model.route_samples([name] * len(tokens))


@pytest.mark.parametrize(
    ("way", "names"),
    [(routed, ("a", "b")), (routed, ("a", None)), (set_for_good, ("b", "a")), (sampled, ("b", "a"))],
)
def test_two_threads_keep_their_own_adapters(way, names, tokens, randomised):
    model = shared_model(None, randomised, bias="lora_only", modules_to_save=["head"]).eval()
    expected = []
    for name in names:
        with routed(model, name, tokens):
            expected.append(model(tokens))
    barrier = threading.Barrier(2)

    def serve(name):
        barrier.wait()
        with way(model, name, tokens):
            barrier.wait()
            out = model(tokens)
            barrier.wait()
        return out

    for found, out in zip(in_threads(*(partial(serve, name) for name in names)), expected, strict=True):
        assert torch.equal(found, out)
    assert model.active_adapter == "a"


def test_a_thread_that_chose_nothing_follows_the_model(tokens, randomised):
    model = shared_model(None, randomised).eval()
    model.set_adapter("b")
    expected = model(tokens)
    with model.disable_adapter():
        assert torch.equal(in_threads(lambda: model(tokens))[0], expected)
    in_threads(lambda: model.set_adapter("a"))
    assert model.active_adapter == "b"


@pytest.mark.parametrize("how", [None, *HOWS])
def test_training_in_threads_equals_training_in_turn(how, tokens, randomised):
    def job(model, name, seed):
        inputs = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(seed))
        for _ in range(4):
            with model.route({name: 4}):
                loss = caller(model, how, inputs).square().mean()
            with torch.no_grad(), model.route({name: 4}):
                model(inputs)
            loss.backward()

    def run(run_jobs):
        model = shared_model(how, randomised)
        run_jobs(partial(job, model, "a", 1), partial(job, model, "b", 2))
        return adapter_gradients(model)

    same_gradients(run(in_threads), run(lambda *jobs: [job() for job in jobs]))


@pytest.mark.parametrize("how", HOWS)
def test_backward_in_another_thread_finds_the_pass(how, tokens, randomised):
    """As on a GPU, where autograd has threads of its own."""

    def run(how, elsewhere):
        model = shared_model(how, randomised)
        losses = []
        for name in ("a", "b"):
            with model.route({name: 4}):
                losses.append(caller(model, how, tokens).square().mean())
        for loss in losses:
            elsewhere(loss.backward)
        return adapter_gradients(model)

    same_gradients(run(how, in_threads), run(None, lambda job: job()))


def test_reentrant_replays_that_cannot_be_told_are_refused(tokens, randomised):
    model = shared_model("reentrant", randomised)

    def forward(name):
        with model.route({name: 4}):
            return model(tokens).square().mean()

    barrier = threading.Barrier(2)
    first, _ = in_threads(*(lambda name=name: (barrier.wait(), forward(name))[1] for name in ("a", "b")))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        first.backward()
    first = in_threads(partial(forward, "a"))[0]
    model.route_state._traces.threads.clear()
    with pytest.raises(RuntimeError, match="first run this model has not seen"):
        first.backward()


def fake_rank(monkeypatch, rank):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)


@pytest.mark.parametrize("kind", ["model", "layer", "wrapped"])
def test_ranks_that_are_seeded_alike_draw_other_masks(kind, tokens, randomised, monkeypatch):
    def run(rank):
        fake_rank(monkeypatch, rank)
        torch.manual_seed(5)
        if kind == "layer":
            layer = LoRALinear(8, 8, lora_dropout=0.5)
            nn.init.normal_(layer.lora_B)
            return layer(torch.ones(4, 8))
        model = shared_model(None, randomised)
        return (model if kind == "model" else model.wrapped)(tokens)

    outs = [run(rank) for rank in (None, 0, 1, 2)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])
    assert not torch.equal(outs[2], outs[3])
    assert torch.equal(run(2), outs[3])


@pytest.mark.parametrize("how", HOWS)
def test_a_ranks_replays_find_its_masks(how, tokens, randomised, monkeypatch):
    fake_rank(monkeypatch, 1)
    test_replays_of_a_shared_layer_find_each_calls_mask(how, tokens, randomised)


PROCESS = """
import sys, torch
from lora_exp.adapters import LoraConfig, LoraModel
store = torch.distributed.FileStore(sys.argv[1], 2)
torch.distributed.init_process_group("gloo", store=store, rank=int(sys.argv[2]), world_size=2)
torch.manual_seed(0)
model = LoraModel(torch.nn.Linear(8, 8), LoraConfig(rank=4, lora_dropout=0.5), verbose=False)
torch.nn.init.normal_(model.wrapped.lora_B)

out = model(torch.ones(4, 8))
outs = [torch.empty_like(out) for _ in range(2)]
torch.distributed.all_gather(outs, out.detach())
assert not torch.equal(*outs)
out.sum().backward()
"""


@pytest.mark.slow
def test_two_processes_draw_other_masks(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "store")]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
