"""Tiny models of the families, a tokenizer for them, and llama.cpp in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_exp.export.gguf import model as gguf_model

_ASK = """
import json, sys
from pathlib import Path
import torch
from lora_exp.export.gguf.runtime import Llama
for line in sys.stdin:
    asked, found = json.loads(line), {}
    with Llama(Path(asked["model"]), Path(asked["lora"]) if asked["lora"] else None) as llama:
        if asked["texts"]:
            found["tokens"] = [llama.tokenize(text) for text in asked["texts"]]
        if asked["prompts"]:
            found["answers"] = [llama.generate(prompt, asked["length"]) for prompt in asked["prompts"]]
        if asked["rows"]:
            torch.save(llama.log_probabilities(torch.tensor(asked["rows"])), asked["out"])
    print("ANSWER", json.dumps(found), flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """``log_probabilities`` (N, T, V)."""

    log_probabilities: torch.Tensor
    tokens: list[list[int]] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)


Ask = Callable[..., Answer]


@pytest.fixture(scope="session")
def llama_process() -> Iterator[subprocess.Popen[str]]:
    """One for all tests, as llama.cpp takes over the signals of its process."""
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-c", _ASK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def llama_cpp(llama_process: subprocess.Popen[str], tmp_path: Path) -> Ask:
    """What llama.cpp makes of a file: the next token's log-probabilities, a text's tokens, a prompt's answer."""

    def ask(
        model: Path,
        rows: torch.Tensor | None = None,
        lora: Path | None = None,
        texts: Sequence[str] = (),
        prompts: Sequence[Sequence[int]] = (),
        length: int = 32,
    ) -> Answer:
        out = tmp_path / "answer.pt"
        asked = {
            "model": str(model), "lora": str(lora) if lora else None, "out": str(out), "texts": list(texts),
            "prompts": [list(prompt) for prompt in prompts], "length": length,
            "rows": rows.tolist() if rows is not None else [],
        }  # fmt: skip
        assert llama_process.stdin is not None
        assert llama_process.stdout is not None
        print(json.dumps(asked), file=llama_process.stdin, flush=True)
        said = next((line for line in llama_process.stdout if line.startswith("ANSWER ")), None)
        assert said is not None, "llama.cpp's process has ended"
        found = torch.load(out) if rows is not None else torch.empty(0)
        return Answer(found, **json.loads(said.removeprefix("ANSWER ")))

    return ask


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 320 tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(["the cat sat on the mat, and the rat said that it is what it is " * 5], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


SIZES: dict[str, Any] = {
    "vocab_size": 330, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture
def tiny() -> Callable[..., torch.nn.Module]:
    """A random model of a family, whose norms and biases are random too."""

    def make(model_type: str, **changes: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.3 if parameter.dim() == 1 else 2 * parameter.shape[-1] ** -0.5
                parameter.add_(torch.randn_like(parameter) * scale)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def rows() -> torch.Tensor:
    """(2, 24) tokens."""
    return torch.randint(2, 320, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """A model with the named adapter merged in, as a file."""

    def write(model: torch.nn.Module, kind: str = "f32", adapter: str | None = None) -> Path:
        path = tmp_path / f"{kind}-{adapter}.gguf"
        base = gguf_model.plain(model)
        gguf_model.write_model(path, base, gguf_model.merged(model, adapter), tokenizer, kind)
        return path

    return write
