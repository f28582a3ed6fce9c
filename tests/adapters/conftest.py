"""Tiny models and an independent PEFT twin of each."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class TinyNet(nn.Module):
    """Embedding, two named projections, a norm and a head: enough names to target."""

    def __init__(self, vocab: int = 11, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(TinyBlock(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(h)


class TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.v_proj(torch.tanh(self.q_proj(self.norm(h))))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> TinyNet:
    return TinyNet()


@pytest.fixture
def make_tiny() -> type[TinyNet]:
    return TinyNet


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 11, (4, 5))


class TinyVision(nn.Module):
    """Strided and padded convolutions, a batch norm, a head: a ResNet block in small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        h = h + self.conv(h)
        return self.head(h.mean((2, 3)))


@pytest.fixture
def vision() -> TinyVision:
    return TinyVision()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 10, 10)


def tiny_transformer(kind: str) -> nn.Module:
    """A random transformers model of a few thousand parameters."""
    import transformers as hf

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 29}
    if kind == "llama":
        config = hf.LlamaConfig(**small, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=32)
        return hf.LlamaForCausalLM(config)
    if kind == "gpt2":
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=29, n_positions=32, **drops))
    if kind == "bert":
        drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return hf.BertForMaskedLM(hf.BertConfig(**small, intermediate_size=24, max_position_embeddings=32, **drops))
    if kind == "t5":
        return hf.T5ForConditionalGeneration(
            hf.T5Config(
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_heads=2,
                vocab_size=29,
                dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        )
    raise ValueError(kind)


@pytest.fixture
def make_transformer():
    return tiny_transformer


def transformer_inputs(kind: str) -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 29, (4, 6))
    return {"input_ids": tokens, "labels": tokens} if kind == "t5" else {"input_ids": tokens}


@pytest.fixture
def inputs_for():
    return transformer_inputs


def randomise(model, name: str = "default", std: float = 0.2) -> None:
    """Give an adapter values that change the output, as after training."""
    with torch.no_grad():
        for parameter in model.adapter_parameters(name).values():
            parameter.add_(std * torch.randn_like(parameter))


@pytest.fixture
def randomised():
    return randomise


def peft_twin(base: nn.Module, **options):
    """PEFT's model over a copy of `base`; the base must not be adapted yet."""
    import peft

    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))


def copy_to_peft(model, twin, name: str = "default") -> None:
    """Copy our factors into PEFT's by hand, transposed to its layout: independent of our file code."""
    theirs = dict(twin.base_model.model.named_modules())
    with torch.no_grad():
        for key, value in model.adapter_parameters(name).items():
            layer_name, _, what = key.rpartition(".")
            layer = theirs[layer_name]
            if what in ("lora_A", "lora_B") and getattr(layer, "lora_embedding_A", None):
                getattr(layer, what.replace("lora_", "lora_embedding_"))["default"].copy_(value.T)
            elif what in ("lora_A", "lora_B"):
                target = getattr(layer, what)["default"].weight
                is_conv_A = what == "lora_A" and value.dim() > 2
                target.copy_(value if is_conv_A else value.T.reshape(target.shape))
            elif what == "magnitude":
                target = layer.lora_magnitude_vector["default"].weight
                target.copy_(value.reshape(target.shape))
            else:
                target = layer.base_layer if hasattr(layer, "base_layer") else layer
                getattr(target, what).copy_(value)


def peft_gradients(model, twin) -> dict[str, torch.Tensor]:
    """PEFT's gradients under our names, in our layout."""
    theirs = dict(twin.base_model.model.named_modules())
    found = {}
    for key, value in model.adapter_parameters().items():
        layer_name, _, what = key.rpartition(".")
        layer = theirs[layer_name]
        if what in ("lora_A", "lora_B") and getattr(layer, "lora_embedding_A", None):
            grad = getattr(layer, what.replace("lora_", "lora_embedding_"))["default"].grad.T
        elif what in ("lora_A", "lora_B"):
            grad = getattr(layer, what)["default"].weight.grad
            is_conv_A = what == "lora_A" and value.dim() > 2
            grad = grad if is_conv_A else grad.reshape(grad.shape[:2]).T
        elif what == "magnitude":
            grad = layer.lora_magnitude_vector["default"].weight.grad.reshape(value.shape)
        else:
            grad = getattr(getattr(layer, "base_layer", layer), what).grad
        found[key] = grad
    return found


@functools.cache
def _random_mixture(kind: str) -> nn.Module:
    import transformers as hf

    small = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    small |= {"num_experts_per_tok": 2, "num_experts" if kind == "qwen3_moe" else "num_local_experts": 4}
    small |= {"moe_intermediate_size": 24} if kind == "qwen3_moe" else {}
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **small))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name or ".gate." in name:
                parameter.normal_(std=0.3)
    return model.eval().double()


def random_mixture(kind: str = "mixtral", dtype: torch.dtype = torch.float64, way: str = "eager") -> nn.Module:
    """A mixture of four experts whose experts matter, by one of transformers' experts implementations."""
    model = copy.deepcopy(_random_mixture(kind)).to(dtype)
    model.set_experts_implementation(way)
    return model


@pytest.fixture
def mixture():
    return random_mixture


@pytest.fixture
def adapted():
    """Adapts both weights of a mixture's experts, or what options say, with values as after training."""
    from lora_exp.adapters import LoraConfig, LoraModel

    def adapt(model: nn.Module, name: str = "default", **options) -> LoraModel:
        wish = {"rank": 3, "target_modules": ["gate_up_proj", "down_proj"], **options}
        made = LoraModel(model, LoraConfig(**wish), name, verbose=False)
        randomise(made, name)
        return made

    return adapt


class Oracle:
    twin = staticmethod(peft_twin)
    copy = staticmethod(copy_to_peft)
    gradients = staticmethod(peft_gradients)


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle


def pytest_configure(config: pytest.Config) -> None:
    # Third parties' own notices, by text; ours would be errors.
    for notice in (
        "ignore:Model has `tie_word_embeddings=True`:UserWarning",
        "ignore:fan_in_fan_out is set to:UserWarning",
        "ignore:Setting `save_embedding_layers`:UserWarning",
        "ignore:Could not identify embedding layer:UserWarning",
        "ignore:Could not find a config file:UserWarning",
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    ):
        config.addinivalue_line("filterwarnings", notice)


@pytest.fixture
def replay_is_the_same():
    """Compares gradients of a layer with those of its checkpointed call, and of a second backward pass."""

    def compare(layer, x, reentrant):
        def gradients(call):
            layer.zero_grad()
            torch.manual_seed(2)
            loss = call(x).square().sum()
            loss.backward(retain_graph=not reentrant)
            once = [p.grad.clone() for p in layer.adapters.parameters()]
            if not reentrant:
                loss.backward()
                for parameter, first in zip(layer.adapters.parameters(), once, strict=True):
                    torch.testing.assert_close(parameter.grad, 2 * first)
            return once

        plain = gradients(layer)
        replayed = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
        for mine, expected in zip(replayed, plain, strict=True):
            assert torch.equal(mine, expected)

    return compare
