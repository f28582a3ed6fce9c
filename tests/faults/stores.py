"""What the scripts of this folder share: a tracking store of its own, SQLite or PostgreSQL, and a tiny training.

PostgreSQL (initdb, pg_ctl, and psycopg2 on the path) runs as the user ``postgres`` where this is started by root, whom
it refuses.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def tiny_training(folder: Path, steps: int) -> list[str]:
    model = folder / "model"
    _tiny_model(model)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs away\n" * 200)
    return [
        "model=hf", f"model.path={model}", "model.label=tiny", "data=text", f"data.path={folder / 'text.txt'}",
        "data.block_size=16", "device=cpu", f"train.steps={steps}", f"train.eval_every={steps // 2}",
        "train.eval_blocks=2", "train.micro_batch_size=1",
    ]  # fmt: skip


def _tiny_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    signs = {sign: place for place, sign in enumerate(["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzĠ"])}
    tokenizer = Tokenizer(models.BPE(signs, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), max_position_embeddings=32, **sizes)).save_pretrained(folder)


def free_port() -> int:
    """None that the system gives to clients: one of those may be connected to itself while its server is away."""
    while True:
        port = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as ear:
            ear.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def tracking_store(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder}/mlflow.db"
        return
    place, port = folder / "postgresql", free_port()
    place.mkdir()
    folder.chmod(0o755)
    as_user: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(place, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    binaries = _postgresql()
    subprocess.run([*as_user, f"{binaries}/initdb", "-D", place / "data", "-A", "trust", "-U", "mlflow"],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={place}"
    control = [*as_user, f"{binaries}/pg_ctl", "-D", place / "data", "-w", "-l", place / "log"]
    subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL)
    try:
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, stdout=subprocess.DEVNULL)


def _postgresql() -> Path:
    """Debian keeps the server's programs off the path."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("pg_ctl")
    if not installed and found is None:
        sys.exit("PostgreSQL is not installed: apt-get install postgresql")
    return installed[-1] if installed else Path(found or "").resolve().parent
