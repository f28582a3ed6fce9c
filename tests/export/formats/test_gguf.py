"""``export=gguf`` and ``export=gguf_lora`` from the command line, on tiny runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

Cli = Callable[..., Any]
Finished = Callable[..., Path]
Facts = Callable[[Path], dict[str, Any]]
EXPORTS = Path("outputs/exports")
pytest.importorskip("xllamacpp")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_k_m"])
def test_a_run_is_merged_into_a_gguf_and_verified(kind: str, cli: Cli, finished: Finished, provenance: Facts) -> None:
    run = finished("adapter=dora")
    done = cli("task=export", f"run={run}", "export=gguf", f"export.type={kind}", "tracking=none", "export.texts=2")
    assert done.code == 0, done.err
    target = EXPORTS / "day-run-gguf"
    checked = provenance(target)["verification"]
    assert (checked["runtime"], checked["compared"]) == ("llama.cpp", "a log-probability")
    assert checked["max_logit"] < {"f32": 1e-4, "f16": 0.01, "bf16": 0.1}.get(kind, 1.0)
    assert checked["mean_kl"] < {"f32": 1e-6, "f16": 1e-5, "bf16": 1e-3}.get(kind, 0.1)
    fields = gguf.GGUFReader(target / f"model-{kind}.gguf").fields
    assert fields["general.architecture"].contents() == "llama"
    assert "llama-server -m day-run-gguf" in (target / "README.md").read_text()
    again = cli("task=verify", f"run={target}", "tracking=none")
    assert again.code == 0, again.err


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_an_adapter_alone_is_verified_on_its_base(
    scaling: str, cli: Cli, finished: Finished, provenance: Facts
) -> None:
    run = finished(f"scaling={scaling}", "rank=4", "alpha=8")
    done = cli("task=export", f"run={run}", "export=gguf_lora", "tracking=none", "export.texts=2", "export.tokens=12")
    assert done.code == 0, done.err
    assert "Little Endian" not in done.out  # what the library says of each file
    facts = provenance(EXPORTS / "day-run-gguf_lora")
    assert facts["verification"]["max_logit"] < 1e-4
    assert facts["alpha"] == {"standard": 8, "rslora": 16}[scaling]
    file = EXPORTS / "day-run-gguf_lora/lora-f32.gguf"
    assert gguf.GGUFReader(file).fields["adapter.lora.alpha"].contents() == facts["alpha"]
    assert cli("task=verify", f"run={file.parent}", "tracking=none").code == 0


def test_a_scale_that_llama_cpp_has_not_is_noticed(
    cli: Cli, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap itself: rsLoRA's own alpha, by which llama.cpp would apply half of it at rank 4."""
    run = finished("scaling=rslora", "rank=4", "alpha=8")
    import lora_exp.export.gguf.writing as room

    whole = room.GGUFWriter.add_float32
    naive = {"adapter.lora.alpha": 8.0}
    monkeypatch.setattr(
        room.GGUFWriter, "add_float32", lambda self, key, value: whole(self, key, naive.get(key, value))
    )
    done = cli("task=export", f"run={run}", "export=gguf_lora", "tracking=none")
    assert done.code == 1
    assert "answers otherwise than the trained model: largest difference of a log-probability" in done.err
    assert list(EXPORTS.iterdir()) == []


def test_another_way_to_cut_texts_is_noticed(cli: Cli, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished()
    import lora_exp.export.gguf.tokenizer as room

    whole = room._merges
    monkeypatch.setattr(room, "_merges", lambda model: whole(model)[:1])  # hardly more than characters
    done = cli("task=export", f"run={run}", "export=gguf", "tracking=none")
    assert done.code == 1
    assert "llama.cpp cuts" in done.err
    assert list(EXPORTS.iterdir()) == []


@pytest.mark.parametrize("adapter", ["full", "head"])
def test_runs_without_an_adapter(adapter: str, cli: Cli, finished: Finished, provenance: Facts) -> None:
    run = finished(f"adapter={adapter}", *(["model.modules_to_save=[lm_head]"] if adapter == "head" else []))
    done = cli("task=export", f"run={run}", "export=gguf", "export.type=f32", "tracking=none")
    assert done.code == 0, done.err
    assert provenance(EXPORTS / "day-run-gguf")["verification"]["max_logit"] < 1e-4
    done = cli("task=export", f"run={run}", "export=gguf_lora", "tracking=none")
    assert done.code == 1
    assert "trained the base's own weights: use export=gguf" in done.err


def test_a_quantised_base_goes_into_the_merged_file_alone(cli: Cli, finished: Finished, provenance: Facts) -> None:
    run = finished("quantization=nf4", "quantization.block_size=32", "quantization.skip_modules=[down_proj]")
    done = cli("task=export", f"run={run}", "export=gguf", "export.type=f32", "tracking=none")
    assert done.code == 0, done.err
    assert provenance(EXPORTS / "day-run-gguf")["verification"]["max_logit"] < 0.02
    done = cli("task=export", f"run={run}", "export=gguf_lora", "tracking=none")
    assert done.code == 1
    assert "trained on a base in nf4" in done.err
    assert cli("task=export", f"run={run}", "export=gguf_lora", "export.verify=false", "tracking=none").code == 0


BAD = [
    (
        ["export=gguf", "export.type=q5_1"],
        "export.type=q5_1 is none of export=gguf: choose one of f32, f16, bf16, q8_0",
    ),
    (
        ["export=gguf_lora", "export.type=q8_0"],
        "export.type=q8_0 is none of export=gguf_lora: choose one of f32, f16, bf16",
    ),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_clear_error(arguments: list[str], says: str, cli: Cli, finished: Finished) -> None:
    done = cli("task=export", f"run={finished()}", *arguments)
    assert done.code == 1
    assert says in done.err
    assert "Traceback" not in done.err
