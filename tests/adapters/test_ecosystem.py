"""generate, gradient checkpointing of transformers, accelerate, DDP, torch.compile, autocast."""

import contextlib

import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_checkpointing_gives_the_same_gradients(reentrant, make_transformer, inputs_for, randomised):
    def run(checkpointing):
        torch.manual_seed(0)
        model = LoraModel(make_transformer("llama"), LoraConfig(rank=2, lora_dropout=0.3), verbose=False)
        randomised(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(1)
        model.train()(**inputs_for("llama")).logits.square().mean().backward()
        assert model.check_gradients() == []
        return [p.grad for p in model.adapter_parameters().values()]

    for plain, replayed in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(plain, replayed)


def test_generate(make_transformer, inputs_for, randomised):
    model = LoraModel(make_transformer("llama"), LoraConfig(rank=2), verbose=False).eval()
    randomised(model, std=0.5)
    tokens = inputs_for("llama")["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    adapted = model.generate(tokens, **options)
    with model.disable_adapter():
        base = model.generate(tokens, **options)
    with model.route({"default": 2, "__base__": 2}):
        routed = model.generate(tokens, **options)
    assert torch.equal(routed, torch.cat([adapted[:2], base[2:]]))
    assert not torch.equal(adapted, base)


@pytest.mark.parametrize("dora", [False, True])
def test_compile(dora, tiny, tokens, randomised):
    model = LoraModel(tiny, LoraConfig(rank=2, use_dora=dora), verbose=False)
    randomised(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    compiled(tokens).sum().backward()
    assert model.check_gradients() == []
    with model.disable_adapter():
        torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_compile_with_dropout(tiny, tokens, randomised):
    model = LoraModel(tiny, LoraConfig(rank=2, lora_dropout=0.3), verbose=False)
    randomised(model)
    state = model.dropout_state()
    expected = [model(tokens) for _ in range(3)]
    model.load_dropout_state(state)
    compiled = torch.compile(model, backend="aot_eager")
    for out in expected:
        torch.testing.assert_close(compiled(tokens), out)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize("routed", [False, True])
def test_a_compiled_model_is_not_compiled_anew_for_each_pass(routed, tiny, tokens, randomised):
    model = LoraModel(tiny, LoraConfig(rank=2, lora_dropout=0.0 if routed else 0.3), verbose=False)
    randomised(model)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for i in range(5):
        if i == 3:
            known = len(graphs)
        with model.route({"default": 3, "__base__": 1}) if routed else contextlib.nullcontext():
            compiled(tokens)
    assert len(graphs) == known


def test_a_routed_model_is_one_graph_in_inference(tiny, tokens, randomised):
    model = LoraModel(tiny, LoraConfig(rank=2, lora_dropout=0.3), verbose=False).eval()
    randomised(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for sizes in ({"default": 3, "__base__": 1}, {"__base__": 2, "default": 2}):
        with model.route(sizes), torch.no_grad():
            torch.testing.assert_close(compiled(tokens), model(tokens))


def test_autocast(tiny, tokens, randomised):
    model = LoraModel(tiny, LoraConfig(rank=2, use_dora=True, lora_dropout=0.1), verbose=False)
    randomised(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {p.grad.dtype for p in model.adapter_parameters().values()} == {torch.float32}


def test_data_parallel(tiny, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = LoraModel(tiny, LoraConfig(rank=2, lora_dropout=0.1, bias="all"), verbose=False)
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(tokens).sum().backward()
        assert all(p.grad is not None for p in model.adapter_parameters().values())
    finally:
        torch.distributed.destroy_process_group()


def test_accelerate_hooks_are_followed(tiny, tokens, randomised):
    from accelerate.hooks import ModelHook, add_hook_to_module

    plain = tiny(tokens)
    add_hook_to_module(tiny.layers[0].q_proj, ModelHook())
    model = LoraModel(tiny, LoraConfig(rank=2, target_modules=["layers.0.q_proj"]), verbose=False)
    randomised(model)
    adapted = model(tokens)
    assert not torch.allclose(adapted, plain)
    torch.testing.assert_close(model.merge_and_unload()(tokens), adapted)


def test_retained_graphs(tiny, tokens, randomised):
    model = LoraModel(tiny, LoraConfig(rank=2, lora_dropout=0.2, use_dora=True), verbose=False)
    randomised(model)
    loss = model(tokens).square().mean()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.adapter_parameters().values()]
    loss.backward()
    for once, parameter in zip(first, model.adapter_parameters().values(), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once)


def test_nothing_heavy_is_imported():
    import subprocess
    import sys

    heavy = ("transformers", "peft", "hydra", "mlflow")
    code = f"import sys, lora_exp.adapters; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
