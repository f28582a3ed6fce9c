"""LoraModel: freezing, injection, forwarding, the first user's own lines."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoRALinear, LoraModel


def randomise(model: LoraModel, name: str = "default") -> None:
    for parameter in model.adapter_parameters(name).values():
        nn.init.normal_(parameter, std=0.1)


def test_the_first_users_lines(tiny, tokens, tmp_path):
    config = LoraConfig(
        rank=16,
        target_modules=["q_proj", "v_proj"],
        lora_alpha=32,
        lora_dropout=0.05,
        bias="none",
        use_rslora=True,
    )
    model = LoraModel(tiny, config)
    model(tokens)
    model.save_model(str(tmp_path / "adapter.safetensors"), merge_weights=False)


def test_a_new_adapter_changes_nothing(tiny, tokens):
    before = tiny(tokens)
    assert torch.equal(LoraModel(tiny, LoraConfig(rank=4))(tokens), before)


def test_only_factors_get_gradients(tiny, tokens):
    base = {name: (p, p.clone()) for name, p in tiny.named_parameters()}
    model = LoraModel(tiny, LoraConfig(rank=4))
    model(tokens).square().sum().backward()
    factors = model.adapter_parameters()
    assert len(factors) == 8
    assert all(p.grad is not None for p in factors.values())
    for name, (parameter, value) in base.items():
        assert tiny.get_parameter(name) is parameter, "weights are shared, not copied"
        assert parameter.grad is None
        assert torch.equal(parameter, value)


def test_default_targets_are_all_linear_but_the_head(tiny):
    model = LoraModel(tiny, LoraConfig(rank=2))
    adapted = {name for name, m in model.wrapped.named_modules() if isinstance(m, LoRALinear)}
    assert adapted == {f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}


def test_summary_is_printed(tiny, capsys):
    LoraModel(tiny, LoraConfig(rank=2))
    total = sum(p.numel() for p in tiny.parameters())
    line = f"Initial Parameters : {total - 256:,} || LoRA Parameters : 256 || Trainable Proportion : "
    assert capsys.readouterr().out.startswith(line)
    LoraModel(nn.Sequential(nn.Linear(3, 3)), LoraConfig(rank=2), verbose=False)
    assert capsys.readouterr().out == ""


def test_everything_else_is_the_wrapped_models(tiny):
    tiny.config = object()
    model = LoraModel(tiny, LoraConfig(rank=2))
    assert model.config is tiny.config
    assert model.lm_head is tiny.lm_head
    with pytest.raises(AttributeError):
        model.no_such_thing  # noqa: B018


def test_factors_are_float32_on_a_bf16_base(tiny, tokens):
    model = LoraModel(tiny.bfloat16(), LoraConfig(rank=4))
    assert {p.dtype for p in model.adapter_parameters().values()} == {torch.float32}
    assert {p.dtype for p in tiny.lm_head.parameters()} == {torch.bfloat16}
    assert model(tokens).dtype == torch.bfloat16


def test_copies_and_pickles(tiny, tokens):
    model = LoraModel(tiny, LoraConfig(rank=4, lora_dropout=0.1)).eval()
    randomise(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens), model(tokens))
        randomise(twin)
        assert not torch.equal(twin(tokens), model(tokens))


def test_unreached_layers_are_named(make_tiny, tokens):
    class Bypassing(make_tiny):
        def forward(self, tokens):
            block = self.layers[0]
            h = nn.functional.linear(self.embed(tokens), block.q_proj.weight)
            return self.lm_head(block.v_proj(h))

    model = LoraModel(Bypassing(), LoraConfig(rank=2, layers_to_transform=0))
    model(tokens).sum().backward()
    assert model.check_gradients() == ["layers.0.q_proj"]
    dead = LoraModel(Bypassing(), LoraConfig(rank=2, target_modules=["q_proj"]))
    dead(tokens).sum()
    with pytest.raises(ValueError, match="no adapter got a gradient"):
        dead.check_gradients()


def test_a_base_is_wrapped_once(tiny):
    LoraModel(tiny, LoraConfig(rank=2))
    with pytest.raises(ValueError, match="adapted layers already"):
        LoraModel(tiny, LoraConfig(rank=2))


def test_the_base_keeps_its_identity(tiny):
    model = LoraModel(tiny, LoraConfig(rank=2, bias="all"))
    identity = model.base_sha256()
    randomise(model)
    model.merge()
    assert model.base_sha256() == identity
    model.unmerge()
    assert model.base_sha256() == copy.deepcopy(model).base_sha256() == identity
    tiny.lm_head.weight.data[0, 0] += 1  # no version of torch's tells
    assert model.base_sha256() not in (None, identity)


def test_torchs_fused_encoder_layer_is_not_bypassed():
    base, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 3, 8)
    model = LoraModel(base, LoraConfig(rank=2, target_modules=["linear1", "linear2"])).eval()
    randomise(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.train()(x))  # training always calls the layers


def test_a_leaf_can_be_the_whole_model():
    model = LoraModel(nn.Linear(4, 3), LoraConfig(rank=2))
    assert set(model.adapter_parameters()) == {"lora_A", "lora_B"}
    assert model(torch.ones(2, 4)).shape == (2, 3)


def test_save_and_load_one_file(tiny, make_tiny, tokens, tmp_path):
    config = LoraConfig(rank=4, target_modules=["q_proj"])
    model = LoraModel(tiny, config)
    randomise(model)
    model.save_model(tmp_path / "a.safetensors")
    base = make_tiny()
    base.load_state_dict({k: v for k, v in tiny.state_dict().items() if "adapters" not in k})
    twin = LoraModel(base, config)
    twin.load_model(tmp_path / "a.safetensors")
    assert torch.equal(twin(tokens), model(tokens))


def test_files_must_fit(tiny, make_tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    LoraModel(tiny, LoraConfig(rank=4, target_modules=["q_proj"])).save_model(path)
    more = LoraModel(make_tiny(), LoraConfig(rank=4))
    with pytest.raises(ValueError, match=r"missing: layers\.0\.v_proj"):
        more.load_model(path)
    louder = LoraModel(make_tiny(), LoraConfig(rank=4, target_modules=["q_proj"], lora_alpha=9))
    with pytest.raises(ValueError, match=r"lora_alpha 8\.0 there, 9 here"):
        louder.load_model(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cut short"):
        more.load_model(path)
    with pytest.raises(ValueError, match="not there"):
        more.load_model(tmp_path / "none")
