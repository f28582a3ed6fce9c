"""The stacked experts of mixtures, against a plain loop over the experts."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_exp.adapters import LoraConfig, LoraModel, load_merged
from lora_exp.adapters.inspection.traversal import lora_layers
from lora_exp.adapters.kernels.experts import Groups
from lora_exp.adapters.numerics.dropout import dropout_mask, keep_share

BOTH = ["gate_up_proj", "down_proj"]
KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
WAYS = ("eager", "grouped_mm", "batched_mm")


@pytest.fixture
def words() -> torch.Tensor:
    return torch.randint(1, 29, (4, 6))


def logits(model, words) -> torch.Tensor:
    return model(words).logits


def weights_of(experts, index: int) -> dict[str, torch.Tensor]:
    """One expert's tensors, its matrices as (out, in)."""
    turned = experts.is_transposed
    return {
        key: value[index].T if turned and not key.endswith("bias") else value[index]
        for key, value in experts.named_parameters(recurse=False)
    }


def plain_loop(experts, hidden, chosen, shares, deltas, masks=None):
    """Token by token and expert by expert, with W + delta. `masks`: what dropout leaves, by (key, token, slot)."""
    rows = []
    for token, x in enumerate(hidden):
        total = torch.zeros_like(x)
        for slot, index in enumerate(chosen[token].tolist()):
            weights = weights_of(experts, index)

            def linear(key, y, index=index, weights=weights, token=token, slot=slot):
                mask = 1.0 if masks is None else masks[key, token, slot]
                out = weights[key] @ y
                out = out + deltas[key][index] @ (y * mask) if key in deltas else out
                return out + weights[f"{key}_bias"] if experts.has_bias else out

            out = linear("down_proj", experts._apply_gate(linear("gate_up_proj", x)))
            total = total + shares[token, slot] * out
        rows.append(total)
    return torch.stack(rows)


def looping(base, model, name="default"):
    """A copy of `base` whose experts run in `plain_loop`, and the factors that it learns, by our names."""
    twin, factors = copy.deepcopy(base), {}
    ours = model.adapter_parameters(name)
    for layer, module in twin.named_modules():
        if not type(module).__name__.endswith("Experts"):
            continue
        mine = {}
        for key in BOTH:
            if (whole := f"{layer}.{key}.lora_A") in ours:
                A, B = (ours[whole[:-1] + side].detach().clone().requires_grad_() for side in "AB")
                factors |= {whole: A, whole[:-1] + "B": B}
                mine[key] = (A, B)

        def forward(hidden, chosen, shares, module=module, mine=mine, scale=model.configs[name].scale):
            deltas = {key: scale * (A @ B).mT for key, (A, B) in mine.items()}
            return plain_loop(module, hidden, chosen, shares, deltas)

        module.forward = forward
    return twin, factors


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_a_plain_loops(kind, way, words, mixture, adapted):
    base = mixture(kind)
    model = adapted(mixture(kind, way=way))
    twin, factors = looping(base, model)
    mine, theirs = logits(model, words), logits(twin, words)
    torch.testing.assert_close(mine, theirs)
    assert (mine - logits(base, words)).abs().max() > 1e-3
    mine.square().mean().backward()
    theirs.square().mean().backward()
    for name, factor in model.adapter_parameters().items():
        torch.testing.assert_close(factor.grad, factors[name].grad, msg=name)
        assert factor.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_that_it_passes_on_is_a_plain_loops(kind, words, mixture, adapted):
    base = mixture(kind)
    model = adapted(mixture(kind))
    twin, _ = looping(base, model)
    found = []
    for one in (model, twin):
        embedded = one.get_input_embeddings()(words).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().mean().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [["gate_up_proj"], ["down_proj"], ["experts"], ["layers.1.mlp.experts.down_proj"]])
def test_targets_name_single_weights_or_their_module(kind, targets, words, mixture, adapted):
    model = adapted(mixture(kind), target_modules=targets, layer_types=["experts"])
    twin, factors = looping(mixture(kind), model)
    assert set(factors) == set(model.adapter_parameters())
    torch.testing.assert_close(logits(model, words), logits(twin, words))


def test_nothing_changes_before_training_and_counts_are_those_of_the_shapes(words, mixture):
    base = mixture()
    before, total = logits(base, words), sum(p.numel() for p in base.parameters())
    model = LoraModel(base, LoraConfig(rank=3, layer_types=["experts"]), verbose=False)
    torch.testing.assert_close(logits(model, words), before)
    factors = 2 * 4 * 3 * ((16 + 48) + (24 + 16))  # layers, experts, rank, sides
    assert model.parameter_counts() == (factors, total + factors)
    A = model.adapter_parameters()["model.layers.0.mlp.experts.gate_up_proj.lora_A"]
    assert A.shape == (4, 16, 3)
    assert A.abs().max() <= 1 / 16**0.5  # of each expert's own inputs
    assert A.std().item() == pytest.approx((1 / 3 / 16) ** 0.5, rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_the_adapted_model_and_unmerging_the_base_bit_for_bit(kind, words, mixture, adapted):
    base = mixture(kind)
    model = adapted(mixture(kind))
    out = logits(model, words)
    report = model.merge()
    assert report.layers == 4
    torch.testing.assert_close(logits(model, words), out)
    state = model.state_dict()
    model.unmerge()
    for name, parameter in base.named_parameters():
        assert torch.equal(dict(model.wrapped.named_parameters())[name], parameter)
    assert torch.equal(logits(model, words), out)
    model.load_state_dict(state)  # of the merged model, into one that is not
    assert torch.equal(logits(model, words), out)


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_disabling_is_exactly_the_base(kind, is_merged, words, mixture, adapted):
    base = mixture(kind)
    model = adapted(mixture(kind))
    if is_merged:
        model.merge()
    with model.disable_adapter():
        assert torch.equal(logits(model, words), logits(base, words))
    assert not torch.equal(logits(model, words), logits(base, words))


@pytest.mark.parametrize("merged_before", [False, True])
def test_unloading_leaves_the_original_classes_and_names(merged_before, words, mixture, adapted):
    base = mixture()
    model = adapted(mixture())
    out = logits(model, words)
    if merged_before:
        model.merge()
    plain = model.merge_and_unload()
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert list(plain.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(logits(plain, words), out)
    assert not [key for module in plain.modules() for key in vars(module) if key in ("route", "kept", "held")]


def test_merged_weights_are_w_plus_delta_of_each_expert(mixture, adapted):
    base = mixture("gpt_oss")
    model = adapted(mixture("gpt_oss"))
    factors, scale = model.adapter_parameters(), model.configs["default"].scale
    plain = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for name, weight in base.named_parameters():
        expected = weight
        if f"{name}.lora_A" in factors:
            A, B = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
            expected = torch.stack([weight[e] + scale * A[e] @ B[e] for e in range(4)])
        torch.testing.assert_close(plain[name], expected, msg=name)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("is_merged", [False, True])
def test_copies_are_models_of_their_own(copied, is_merged, randomised, words, mixture, adapted):
    model = adapted(mixture())
    out = logits(model, words)
    if is_merged:
        model.merge()
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(twin, words), out)
    if is_merged:
        twin.unmerge()
    randomised(twin)
    assert not torch.allclose(logits(twin, words), out)


def test_our_own_files_both_ways(words, tmp_path, mixture, adapted):
    model = adapted(mixture())
    out = logits(model, words)
    model.save_model(tmp_path / "alone.safetensors")
    again = adapted(mixture())
    again.load_model(tmp_path / "alone.safetensors")
    assert torch.equal(logits(again, words), out)
    model.save_model(tmp_path / "merged.safetensors", merge_weights=True)
    torch.testing.assert_close(logits(load_merged(mixture(), tmp_path / "merged.safetensors"), words), out)


def routed(model, words, sizes):
    with model.route(sizes):
        return logits(model, words)


def three(mixture, adapted, randomised, kind="mixtral", **options):
    """Adapters of different ranks and targets."""
    model = adapted(mixture(kind), "a", **options)
    model.add_adapter("b", LoraConfig(rank=2, target_modules=["gate_up_proj"], **options))
    model.add_adapter("c", LoraConfig(rank=1, target_modules=["q_proj", "down_proj"], **options))
    for name in "bc":
        randomised(model, name)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_of_a_batch_goes_through_its_own_adapter(kind, randomised, words, mixture, adapted):
    model = three(mixture, adapted, randomised, kind)
    alone = {}
    for name in "abc":
        model.set_adapter(name)
        alone[name] = logits(model, words)
    with model.disable_adapter():
        alone["__base__"] = logits(model, words)
    out = routed(model, words, {"c": 1, "__base__": 1, "a": 1, "b": 1})
    for row, name in enumerate(("c", "__base__", "a", "b")):
        torch.testing.assert_close(out[row], alone[name][row])
    with model.route_samples(["b", "a", "b", "c"]):
        out = logits(model, words)
    for row, name in enumerate("babc"):
        torch.testing.assert_close(out[row], alone[name][row])


def test_each_adapter_gets_its_own_slices_gradient_and_dropout(randomised, words, mixture, adapted):
    def gradients(call):
        torch.manual_seed(5)
        model = three(mixture, adapted, randomised, lora_dropout=0.3).train()
        call(model)
        return {name: [p.grad for p in model.adapter_parameters(name).values()] for name in "ab"}

    def together(model):
        routed(model, words, {"a": 3, "b": 1}).square().sum().backward()

    def apart(model):
        for name, part in (("a", words[:3]), ("b", words[3:])):
            model.set_adapter(name)
            logits(model, part).square().sum().backward()

    ours, expected = gradients(together), gradients(apart)
    for name in "ab":
        for mine, alone in zip(ours[name], expected[name], strict=True):
            torch.testing.assert_close(mine, alone)


def test_routing_a_batch_of_another_size_is_refused(randomised, words, mixture, adapted):
    model = three(mixture, adapted, randomised)
    with pytest.raises(ValueError, match="routing covers 3 samples"):
        routed(model, words, {"a": 2, "b": 1})


def test_dropout_takes_inputs_of_each_expert_alone(words, monkeypatch, mixture, adapted):
    model = adapted(mixture(), target_modules=["layers.0.mlp.experts.gate_up_proj"], lora_dropout=0.4)
    (layer,) = (layer for _, layer in lora_layers(model.wrapped))
    monkeypatch.setattr(model.route_state, "mask_seed", lambda *_: 11)
    seen = {}
    experts = model.wrapped.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda _, inputs, out: seen.update(inputs=inputs, out=out))
    model.train()
    logits(model, words)
    hidden, chosen, shares = seen["inputs"]
    pairs = [(t, s) for e in range(4) for t in range(len(hidden)) for s in range(2) if chosen[t, s] == e]
    noise = dropout_mask(torch.empty(len(pairs), 16, dtype=torch.float64), 0.4, 11) / keep_share(0.4)
    masks = {("gate_up_proj", t, s): row for (t, s), row in zip(pairs, noise, strict=True)}
    masks |= dict.fromkeys((("down_proj", t, s) for t, s in pairs), 1.0)
    deltas = {"gate_up_proj": layer.delta_weight()}
    torch.testing.assert_close(seen["out"], plain_loop(experts, hidden, chosen, shares, deltas, masks))
    model.eval()
    assert not torch.allclose(seen["out"], experts(*seen["inputs"]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sizes", [None, {"a": 1, "b": 3}])
def test_gradient_checkpointing_replays_dropout_and_routes(reentrant, sizes, randomised, words, mixture, adapted):
    def gradients(checkpoints):
        torch.manual_seed(5)
        model = three(mixture, adapted, randomised, lora_dropout=0.3).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        out = logits(model, words) if sizes is None else routed(model, words, sizes)
        out.square().sum().backward()
        return [p.grad for name in "ab" for p in model.adapter_parameters(name).values() if p.grad is not None]

    mine, expected = gradients(True), gradients(False)
    assert len(mine) == len(expected) > 0
    for one, other in zip(mine, expected, strict=True):
        assert torch.equal(one, other)


def test_one_layers_call_can_be_checkpointed_alone(mixture, adapted):
    model = adapted(mixture(), lora_dropout=0.2).train()
    experts = model.wrapped.model.layers[0].mlp.experts
    hidden, chosen = torch.randn(5, 16, dtype=torch.float64), torch.tensor([[0, 1], [2, 1], [3, 0], [1, 3], [0, 2]])
    shares = torch.rand(5, 2, dtype=torch.float64)
    found = []
    for call in (experts, lambda *args: checkpoint(experts, *args, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(1)
        call(hidden, chosen, shares).square().sum().backward()
        found.append([p.grad for p in experts.parameters() if p.grad is not None])
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_adapters_come_and_go(randomised, words, mixture, adapted):
    model = three(mixture, adapted, randomised)
    model.set_adapter("b")
    out = logits(model, words)
    model.delete_adapter("a")
    assert torch.equal(logits(model, words), out)
    with pytest.raises(ValueError, match="variant 'dora'"):
        model.add_adapter("d", LoraConfig(target_modules=["down_proj"], use_dora=True))
    assert torch.equal(logits(model, words), out)


def test_what_fails_leaves_the_model_as_it_was(monkeypatch, words, mixture):
    model = mixture()
    kinds = {name: type(module) for name, module in model.named_modules()}
    from lora_exp.adapters.surgery import injection

    monkeypatch.setattr(injection, "add_copies", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LoraModel(model, LoraConfig(layer_types=["experts"]), verbose=False)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_another_implementation_falls_back_by_name(words, caplog, mixture, adapted):
    model = adapted(mixture())
    out = logits(model, words)
    for module in model.wrapped.modules():
        if hasattr(module, "is_transposed"):
            module.config._experts_implementation_internal = "sonicmoe"
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(logits(model, words), out)
    assert "'sonicmoe' has kernels that an adapter cannot follow" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_those_of_a_loop(dtype):
    ids = torch.tensor([0, 0, 0, 2, 2, 3, 3, 3])
    x, weight = torch.randn(8, 16).to(dtype), torch.randn(4, 16, 8).to(dtype)
    found = []
    for way in WAYS:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = Groups(ids, 4, way).product(*leaves)
        out.square().sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            error = (one - other).abs().max() / one.abs().max()
            assert error <= 4 * torch.finfo(dtype).eps


def test_rows_are_shared_out_evenly_where_there_are_no_values():
    groups = Groups(torch.empty(7, dtype=torch.long, device="meta"), 3)
    assert groups.counts == [3, 2, 2]
    shape = groups.product(torch.empty(7, 4, device="meta"), torch.empty(3, 4, 5, device="meta")).shape
    assert shape == (7, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_half_precision(kind, words, mixture, adapted):
    model = adapted(mixture(kind, torch.bfloat16))
    out = logits(model, words)
    assert out.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.adapter_parameters().values())
    exact = LoraModel(mixture(kind, torch.float32), model.configs["default"], verbose=False)
    for mine, theirs in zip(exact.adapter_parameters().values(), model.adapter_parameters().values(), strict=True):
        mine.data.copy_(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = logits(exact, words)
    torch.testing.assert_close(under_autocast.float(), logits(exact, words), rtol=0.1, atol=0.1)


def test_a_compiled_block_follows_what_is_done_to_its_adapters(mixture, adapted):
    model = adapted(mixture(dtype=torch.float32))
    block, hidden = model.wrapped.model.layers[0].mlp, torch.randn(2, 3, 16)
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():  # else dynamo's own look at what a graph break hands over is a warning
        torch.testing.assert_close(compiled(hidden), block(hidden))
        with model.disable_adapter():
            assert torch.equal(compiled(hidden), block(hidden))
        model.merge()
        assert torch.equal(compiled(hidden), block(hidden))


# What cannot be, by name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "variant 'dora' is not defined for many weights in one parameter"),
        ({"rank": 99}, "has 48"),
        ({"bias": "lora_only"}, "finds no bias to train"),
    ],
)
def test_what_cannot_be_adapted_says_why(options, said, mixture):
    with pytest.raises(ValueError, match=said):
        LoraModel(mixture(), LoraConfig(**{"rank": 2, "target_modules": ["gate_up_proj"], **options}), verbose=False)


class OddExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        return x @ self.stack.sum(0)


def test_experts_of_another_make_are_refused_and_said(caplog):
    odd = nn.Sequential(nn.Linear(4, 4), OddExperts())
    with pytest.raises(ValueError, match="OddExperts computes its experts by itself"):
        LoraModel(odd, LoraConfig(rank=1, target_modules=["stack"]), verbose=False)
    with caplog.at_level(logging.WARNING):
        LoraModel(odd, LoraConfig(rank=1), verbose=False)
    assert "3 weights of a mixture's experts (stack: 48 parameters in all)" in caplog.text


def test_expert_parallelism_is_refused(mixture):
    model = mixture()
    for layer in model.model.layers:
        layer.mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="shared out among processes"):
        LoraModel(model, LoraConfig(target_modules=["gate_up_proj"]), verbose=False)


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj"]])
def test_what_a_config_leaves_out_of_a_mixture_is_said(targets, caplog, mixture):
    with caplog.at_level(logging.WARNING):
        LoraModel(mixture(), LoraConfig(rank=1, target_modules=targets), verbose=False)
    assert "16 weights of a mixture's experts (down_proj, gate_up_proj: 9216 parameters in all)" in caplog.text
    assert "name down_proj, gate_up_proj among the targets, or choose the layer type experts" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["experts"]},
        {"target_modules": ["gate_up_proj"]},
        {"layer_types": ["all"]},
        {"layer_types": ["linear", "experts"]},
    ],
)
def test_what_is_meant_to_be_left_out_is_not_said(options, caplog, mixture):
    with caplog.at_level(logging.WARNING):
        LoraModel(mixture(), LoraConfig(rank=1, **options), verbose=False)
    assert not caplog.records


@pytest.mark.parametrize("start", ["pissa", "orthogonal"])
def test_a_start_of_matrices_is_refused_by_name(start, mixture):
    with pytest.raises(ValueError, match=f"start='{start}' is not for model.layers.0.mlp.experts.gate_up_proj"):
        LoraModel(mixture(), LoraConfig(rank=2, target_modules=["gate_up_proj"], start=start), verbose=False)


def test_lora_fa_trains_b_alone_and_vera_is_refused(mixture, words):
    model = LoraModel(mixture(), LoraConfig(rank=2, target_modules=BOTH, variant="lora_fa"), verbose=False)
    logits(model, words).square().mean().backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_B"}
    with pytest.raises(ValueError, match="variant 'vera' is not defined for many weights in one parameter"):
        LoraModel(mixture(), LoraConfig(rank=2, target_modules=BOTH, variant="vera"), verbose=False)
