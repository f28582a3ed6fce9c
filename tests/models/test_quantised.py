"""Bases quantised while they load, prepared as PEFT prepares them, and trained from the command line."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says so where it lacks an optional kernel
bnb = pytest.importorskip("bitsandbytes")

from lora_exp.adapters import LoraConfig, LoraModel  # noqa: E402
from lora_exp.adapters.inspection.parameter_counts import stored_bytes  # noqa: E402
from lora_exp.adapters.numerics.packed_weights import is_quantised  # noqa: E402
from lora_exp.backends import adapt  # noqa: E402
from lora_exp.checks import check  # noqa: E402
from lora_exp.config import Config, ConfigError, ModelConfig, OptimizerConfig, QuantizationConfig  # noqa: E402
from lora_exp.machine.place import Place, resolve_place  # noqa: E402
from lora_exp.models import Source, load_base  # noqa: E402
from lora_exp.models.quantised import CannotQuantiseError, compute_dtype, prepare  # noqa: E402
from lora_exp.training.optimizers import build_optimizer  # noqa: E402

CPU = Place(torch.device("cpu"), torch.float32)
CPU_BF16 = Place(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
KINDS = ("nf4", "fp4", "int8")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
Cli = Callable[..., Any]


def load(folder: Path, kind: str, place: Place = CPU, **options: Any) -> Any:
    section = ModelConfig(label="even", path=str(folder))
    return load_base(Source(str(folder)), section, place, None, QuantizationConfig(kind, **options))


def settings(*overrides: str) -> Config:
    from hydra import compose, initialize_config_dir

    from lora_exp.config import conf_folder
    from lora_exp.schema import register, to_config

    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", list(overrides)))


def batch() -> torch.Tensor:
    return torch.arange(3, 35).view(2, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_quantised_and_the_head_is_not(even_llama: Path, kind: str) -> None:
    model = load(even_llama, kind)
    quantised = {name for name, parameter in model.named_parameters() if is_quantised(parameter)}
    assert len(quantised) == 2 * 7
    assert all("proj" in name for name in quantised)
    assert stored_bytes(model) < stored_bytes(load(even_llama, "none"))


def test_the_fields_reach_every_layer(even_llama: Path) -> None:
    model = load(even_llama, "nf4", double_quant=True, block_size=32, skip_modules=["layers.0.mlp", "q_proj"])
    quantised = {name: p for name, p in model.named_parameters() if is_quantised(p)}
    assert len(quantised) == 14 - 3 - 2
    for parameter in quantised.values():
        assert (parameter.quant_state.blocksize, parameter.quant_state.nested) == (32, True)
    assert not is_quantised(model.lm_head.weight)
    default = load(even_llama, "nf4").model.layers[0].mlp.up_proj
    assert (default.weight.quant_state.blocksize, default.weight.quant_state.nested) == (64, False)
    assert default.compute_dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_preparation_is_that_of_peft(even_llama: Path, kind: str) -> None:
    import peft

    mine = load(even_llama, kind, CPU_BF16)
    theirs = peft.prepare_model_for_kbit_training(load(even_llama, kind, CPU_BF16), use_gradient_checkpointing=False)
    kinds = [[(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()] for model in (mine, theirs)]
    assert kinds[0] == kinds[1]
    assert mine.lm_head.weight.dtype == mine.model.norm.weight.dtype == torch.float32
    assert mine.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(even_llama: Path, kind: str, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = LoraModel(load(even_llama, kind), LoraConfig(rank=4, lora_dropout=0.1), verbose=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        model(input_ids=batch(), labels=batch()).loss.backward()
        assert model.check_gradients() == []
        found.append([parameter.grad for parameter in model.adapter_parameters().values()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("kind", "adapter"), [("nf4", "lora"), ("nf4", "dora"), ("fp4", "lora"), ("fp4", "dora"), ("int8", "lora")]
)
def test_both_backends_agree_on_a_quantised_base(even_llama: Path, kind: str, adapter: str) -> None:
    """Outputs in training and in evaluation, and gradients."""
    results = {}
    for backend in ("native", "peft"):
        adapted = adapt(load(even_llama, kind), settings(f"backend={backend}", f"adapter={adapter}", "rank=4"))
        torch.manual_seed(0)
        named = sorted(((n, p) for n, p in adapted.model.named_parameters() if p.requires_grad), key=_peft_name)
        for name, parameter in named:
            values = torch.randn(_peft_layout(parameter, backend).shape) * 0.02
            if "magnitude" not in name:  # a magnitude starts at the norm, the factors anywhere
                parameter.data.zero_()
            _peft_layout(parameter.data, backend).add_(values)
        adapted.model.eval()
        evaluated = adapted.model(input_ids=batch()).logits.detach()
        adapted.model.train()
        out = adapted.model(input_ids=batch()).logits
        out.square().mean().backward()
        gradients = [_peft_layout(p.grad, backend) for _, p in named]
        results[backend] = (evaluated, out.detach(), gradients, (adapted.trainable, adapted.total))
        assert adapted.base_weight_bytes == stored_bytes(load(even_llama, kind))
    torch.testing.assert_close(results["native"], results["peft"], atol=1e-4, rtol=1e-3)


def _peft_layout(values: torch.Tensor, backend: str) -> torch.Tensor:
    return values.T if backend == "native" and values.dim() == 2 else values


def _peft_name(item: tuple[str, torch.Tensor]) -> str:
    """layer.lora_A, whatever a backend puts around and behind it."""
    name = item[0].replace("adapters.default.", "").replace("lora_magnitude_vector", "magnitude")
    return name[name.index("layers.") :].replace(".default", "").removesuffix(".weight")


def test_what_a_machine_cannot_do_is_said_with_the_alternative(even_llama: Path, tiny_llama: Path) -> None:
    with pytest.raises(CannotQuantiseError, match=r"compute_dtype=float16 trains on a GPU only: use bfloat16"):
        load(even_llama, "nf4", compute_dtype="float16")
    with pytest.raises(CannotQuantiseError, match=r"nf4 is not on device=mps: use device=cpu"):
        load(even_llama, "nf4", Place(torch.device("mps"), torch.float32))
    with pytest.raises(CannotQuantiseError, match=r"block_size=64 does not divide the 32 inputs of .*q_proj"):
        load(tiny_llama, "nf4")
    with pytest.raises(CannotQuantiseError, match=r"skip_modules names no module .*'qproj' \(near: q_proj"):
        load(even_llama, "nf4", skip_modules=["qproj"])


def test_pefts_dora_on_int8_is_refused_on_a_cpu(even_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"loses int8 constants .* use backend=native"):
        adapt(load(even_llama, "int8"), settings("backend=peft", "adapter=dora"))


def test_bfloat16_on_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    section = QuantizationConfig("nf4", compute_dtype="bfloat16")
    with pytest.raises(CannotQuantiseError, match="not on this GPU: use float16 or float32"):
        compute_dtype(section, Place(torch.device("cuda"), torch.float32))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["quantization=int8", "quantization.double_quant=true"], "int8 has one constant a row"),
        (["quantization=nf4", "quantization.block_size=48"], "block_size=48 is not a block size: use one of 32, 64"),
        (["quantization=nf4", "adapter=full"], "freezes what adapter=full would train"),
        (["quantization=nf4", "quantization.compute_dtype=half"], "compute_dtype=half is not known"),
        (["quantization=nf4", "model=efficientnet_lite0", "data=mnist5k", "layer=conv2d"], "is for language models"),
    ],
)
def test_what_no_machine_can_do_is_refused_at_composition(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(settings(*overrides))


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for wish in ("quantization=nf4", "optimizer=adamw_8bit"):
        with pytest.raises(ConfigError, match=rf"{wish}: bitsandbytes .*pip install 'lora_exp\[qlora\]'"):
            check(settings(wish))
    check(settings())


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers_follow_adamw(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Their states are in 8 bits, so the path differs by a little; the page falls back with one line and no warning."""
    target = torch.randn(64, 128)
    ends = []
    caplog.set_level(logging.INFO)
    for choice in ("adamw", name):
        parameter = torch.nn.Parameter(torch.zeros(64, 128))
        optimizer = build_optimizer([parameter], OptimizerConfig(choice, lr=0.05))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(20):
                (parameter - target).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(parameter.detach())
    assert (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()
    state = optimizer.state[parameter]
    assert state["state1"].dtype == torch.uint8
    assert len(caplog.records) == (name == "paged_adamw_8bit")


def test_a_quantised_bfloat16_base_is_autocast() -> None:
    assert resolve_place("cpu", "bfloat16", trains_base=False, quantised=True) == CPU_BF16
    assert resolve_place("cpu", "float32", trains_base=False, quantised=True) == CPU


def test_a_bfloat16_base_trains_under_autocast(even_llama: Path) -> None:
    adapted = adapt(load(even_llama, "nf4", CPU_BF16), settings("rank=4", "adapter=dora"))
    with CPU_BF16.compute():
        adapted.model(input_ids=batch(), labels=batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters)


def test_preparing_twice_changes_nothing(even_llama: Path) -> None:
    model = load(even_llama, "int8")
    before = model.eval()(input_ids=batch()).logits
    prepare(model, QuantizationConfig("int8"), CPU)
    assert torch.equal(model(input_ids=batch()).logits, before)
    assert torch.equal(model.train()(input_ids=batch()).logits, before)


def test_a_sweep_over_quantisations_is_one_comparison(
    cli: Cli, tiny_overrides: list[str], even_llama: Path, workplace: Path
) -> None:
    model = ["model.label=even", f"model.path={even_llama}"]
    done = cli(*tiny_overrides, *model, "quantization=none,nf4,fp4,int8", "rank=8", "optimizer=paged_adamw_8bit", "-m")
    assert done.code == 0, done.err
    assert "kernels" not in done.out + done.err
    assert "Warning" not in done.err
    assert done.out.count("as adamw_8bit") == 4
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lora_exp").experiment_id])
    stored = {r.data.params["quantization"]: r.data.metrics["base_weight_bytes"] for r in runs if r.data.params}
    assert stored["nf4"] == stored["fp4"] < stored["int8"] < stored["none"]
    (table,) = (workplace / "outputs/sweeps").glob("*/*/comparison.md")
    assert "| job | quantization | eval/loss |" in table.read_text()
    assert "base MB" in table.read_text()
    for file in (workplace / "outputs/sweeps").glob("*/*/*/result.json"):
        result = json.loads(file.read_text())["result"]
        assert result["eval_loss"] < result["eval_loss_before"]
