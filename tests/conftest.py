"""A tiny model in hub layout, a text to train on, and the command line in this process."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_exp.machine.waiting import wait_briefly

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS", "0")  # a second a run is long in tests
# No test depends on what this machine is fast in, nor measures it; those about it force each answer.
os.environ.setdefault("LORA_EXP_BF16", "float32")
os.environ.setdefault("LORA_EXP_FLOAT32", "blas")
wait_briefly()  # before torch is loaded

import torch  # noqa: E402

from lora_exp.adapters.numerics.precision import use_answers  # noqa: E402

VERSES = [
    f"And the {noun} said unto the {other}, go thou and {verb}."
    for noun in ("king", "priest", "shepherd", "ox")
    for other in ("people", "sea", "mountain", "lamb")
    for verb in ("sing", "build", "rest", "sow", "reap")
]


@dataclass(frozen=True)
class Finished:
    """What one call of the command line left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with its tokenizer, as a folder in hub layout."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(VERSES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def even_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama whose sizes are multiples of a quantisation block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("even") / "llama"
    shutil.copytree(tiny_llama, folder)
    torch.manual_seed(0)
    facts = LlamaConfig.from_pretrained(folder, hidden_size=64, intermediate_size=128, head_dim=16)
    LlamaForCausalLM(facts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About five thousand tokens of plain text."""
    file = tmp_path_factory.mktemp("text") / "verses.txt"
    file.write_text("\n".join(VERSES * 5))
    return file


@pytest.fixture
def tiny_overrides(tiny_llama: Path, text_file: Path) -> list[str]:
    """The overrides of a run that takes a second."""
    return [
        "model=hf", f"model.path={tiny_llama}", "model.label=tiny", "data=text", f"data.path={text_file}",
        "data.block_size=16", "device=cpu", "train.steps=4", "train.warmup_steps=1", "train.eval_every=2",
        "train.eval_blocks=4", "train.micro_batch_size=2",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def measured_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rates of this machine, measured once for all tests."""
    from lora_exp.config import MachineConfig
    from lora_exp.machine.precision import take_precision

    root = tmp_path_factory.mktemp("machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_EXP_CACHE", str(root))
        take_precision(MachineConfig(), torch.device("cpu"))
    use_answers(None)
    return root / "machine"


@pytest.fixture
def workplace(tmp_path: Path, measured_machine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder with a cache of its own and no tracking settings from outside."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(measured_machine, tmp_path / "cache/machine")
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))
    outside = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "HYDRA_FULL_ERROR", "MAKELEVEL")
    for name in outside:
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    use_answers(None)  # what a run took for itself


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database: making one takes seconds, copying it does not."""
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def cli(
    workplace: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Finished]]:
    """Call ``lora-exp`` with arguments, in this process and in a folder that holds no run yet."""
    from lora_exp.__main__ import main
    from lora_exp.machine import signals

    (workplace / "outputs").mkdir()
    shutil.copy(empty_database, workplace / "outputs/mlflow.db")

    def call(*arguments: str) -> Finished:
        monkeypatch.setattr("sys.argv", ["lora-exp", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                sys.stderr.write(end.code)
        finally:
            signals.uninstall()
        out, err = capfd.readouterr()
        return Finished(code, out, err)

    yield call
    _close_log_files(workplace)


def _close_log_files(folder: Path) -> None:
    """Take off the handlers that Hydra left to the root logger: a later test's first record would open their files."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).is_relative_to(folder):
            root.removeHandler(handler)
            handler.close()
