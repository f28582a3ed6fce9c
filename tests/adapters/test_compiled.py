"""A compiled model follows what is done to its adapters after it was compiled."""

import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.norm, self.down = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        return self.head(self.down(self.norm(torch.tanh(self.up(self.embed(tokens))))))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=100):  # beyond it all runs uncompiled, and is right
        yield
    torch._dynamo.reset()


CASES = [  # DoRA, biases, modules to save, whether what LoraModel wraps is compiled
    (False, "none", None, False),
    pytest.param(False, "all", ["head"], True, marks=pytest.mark.slow),
    pytest.param(True, "none", ["head"], False, marks=pytest.mark.slow),
    pytest.param(True, "all", None, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dora", "bias", "saved", "inside"), CASES)
def test_every_change_of_state_is_followed(dora, bias, saved, inside, randomised):
    options = {"rank": 2, "use_dora": dora, "modules_to_save": saved}
    first = LoraConfig(target_modules=["up", "down", "embed"], layer_types="all", bias=bias, **options)
    model = LoraModel(Net(), first, verbose=False).eval()
    model.add_adapter("b", LoraConfig(target_modules=["up"], **options))
    randomised(model, std=0.4)
    randomised(model, "b", std=0.4)
    eager = model.wrapped if inside else model
    compiled, tokens, seen = torch.compile(eager, backend="eager"), torch.randint(0, 11, (3, 4)), []

    @torch.no_grad()
    def check():
        expected = eager(tokens)
        torch.testing.assert_close(compiled(tokens), expected, atol=1e-5, rtol=1e-4)
        assert all(not torch.allclose(expected, other, atol=1e-3) for other in seen[-1:])
        seen.append(expected)

    check()
    with torch.no_grad():
        adapted = compiled(tokens)
    model.merge()
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), adapted, atol=1e-5, rtol=1e-4)
    model.unmerge()
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), adapted, atol=1e-5, rtol=1e-4)
    model.set_adapter("b")
    check()
    model.merge("default")
    check()
    with model.disable_adapter():
        check()
    check()
    model.unmerge()
    with model.route({"default": 1, "b": 1, "__base__": 1}):
        check()
    with model.disable_adapter():
        check()
    model.add_adapter("c", LoraConfig(rank=2, target_modules=["down"], bias="all"))
    randomised(model, "c", std=0.4)
    model.set_adapter("c")
    check()
    model.merge("b")
    check()
    model.unmerge()
    model.delete_adapter("c")
    with model.disable_adapter():
        check()
    model.set_adapter("default")
    check()
