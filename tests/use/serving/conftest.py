"""A tiny base, adapters of several kinds on it, and the real server in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp.adapters import LoraConfig, LoraModel

ROOT = Path(__file__).parents[3]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Several ranks, both rules of scaling, DoRA, biases and an embedding: all of them share batches.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 4, "lora_alpha": 8},
    "dora": {"rank": 2, "lora_alpha": 4, "use_dora": True, "use_rslora": True},
    "wide": {"rank": 16, "lora_alpha": 16, "bias": "all", "use_rslora": True},
}
PROMPTS = ["And the king said", "go thou and", "the priest", "And", "unto the people, go", "sea " * 12]


@pytest.fixture(scope="session")
def base_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, with a chat template and logits that are far enough apart."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_llama, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters in PEFT's format, by name, below one folder."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: _made(base_folder, root / name, seed, kind) for seed, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture(scope="session")
def make_adapter(base_folder: Path) -> Callable[..., Path]:
    """One more: ``make_adapter(folder, seed)``, or of another kind (LoraConfig's fields)."""
    return lambda folder, seed, **kind: _made(base_folder, folder, seed, kind or KINDS["plain"])


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return PROMPTS


def _made(base_folder: Path, folder: Path, seed: int, kind: dict[str, Any]) -> Path:
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "v_proj", "down_proj"]
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = LoraModel(base, LoraConfig(target_modules=targets, **kind), verbose=False)
    with torch.no_grad():
        for key, parameter in model.adapter_parameters().items():
            if not key.endswith("magnitude"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def alone(base_folder: Path, adapter_folders: dict[str, Path]) -> Callable[..., str]:
    """What transformers writes greedily, by PEFT's adapters, one prompt at a time: the oracle."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    models: dict[str, Any] = {"tiny": AutoModelForCausalLM.from_pretrained(base_folder).eval()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, of an attribute of transformers
        for name, folder in adapter_folders.items():
            models[name] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder).eval()
    known: dict[tuple[str, str, int], str] = {}

    def write(name: str, prompt: str, most: int = 12) -> str:
        if (name, prompt, most) not in known:
            ids = tokenizer(prompt, return_tensors="pt")
            out = models[name].generate(**ids, do_sample=False, max_new_tokens=most, use_cache=True, pad_token_id=2)
            new = out[0, ids["input_ids"].shape[1] :]
            known[name, prompt, most] = tokenizer.decode(new, skip_special_tokens=True)
        return known[name, prompt, most]

    return write


@dataclass
class Server:
    """A running ``task=serve``, and what it has said so far."""

    process: subprocess.Popen[str]
    reads: Any = None
    url: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def client(self, **options: Any) -> Any:
        openai = pytest.importorskip("openai")
        return openai.OpenAI(base_url=self.url, api_key="sk-secret-of-a-client", max_retries=0, **options)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and body; ``body`` may be bytes that are no JSON. GET without one."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {"Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(self.url.removesuffix("/v1") + path, data, named)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _read(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _read(error.read())

    def metric(self, name: str) -> int:
        return int(re.findall(rf"^lora_exp_{name} (\d+)", self.ask("/metrics")[1], re.M)[0])

    @staticmethod
    def wait_for(holds: Callable[[], bool], most_s: float = 20) -> bool:
        until = time.monotonic() + most_s
        while time.monotonic() < until:
            if holds():
                return True
            time.sleep(0.02)
        return False

    def end(self, number: int = signal.SIGTERM, wait_s: float = 30) -> int:
        self.process.send_signal(number)
        return self.process.wait(wait_s)


def _read(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


Start = Callable[..., Server]


@pytest.fixture(scope="module")
def start(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a server in a folder of its own; every one that is left over is ended."""
    started: list[Server] = []

    def run(*overrides: str, folder: Path | None = None, **environment: str) -> Server:
        place = folder or tmp_path_factory.mktemp("served")
        command = [sys.executable, "-m", "lora_exp", "task=serve", "model=hf", f"model.path={base_folder}"]
        command += [
            "model.label=tiny",
            "model.dtype=float32",
            "device=cpu",
            "tracking=none",
            "serve.port=0",
            *overrides,
        ]
        process = subprocess.Popen(
            command,
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT), "LORA_EXP_CACHE": str(place / "cache"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        server = Server(process)
        started.append(server)
        _listen(server)
        return server

    yield run
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
        server.reads.join()
        server.process.stdout.close()


def _listen(server: Server) -> None:
    """Gather what it says, until it says where it is."""
    ready = threading.Event()

    def read() -> None:
        assert server.process.stdout is not None
        for line in server.process.stdout:
            server.lines.append(line)
            if found := re.search(r"serve  (http://\S+/v1)", line):
                server.url = found[1]
                ready.set()
        ready.set()

    server.reads = threading.Thread(target=read, daemon=True)
    server.reads.start()
    assert ready.wait(120), server.said
