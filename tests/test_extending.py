"""docs/extending.md, done as it says: its files written into an empty folder, its commands run there."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text()
FILES = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]


@pytest.fixture
def stranger(workplace: Path, tiny_llama: Path, text_file: Path) -> Path:
    """An empty folder with the page's files, whose default experiment takes a second."""
    for name, content in FILES.items():
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_text(content)
    return workplace


def run(folder: Path, command: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The command as it is typed, in a process of its own; what it does not say is made small."""
    name, *arguments = shlex.split(command)
    assert name == "lora-exp"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    program = "import sys; sys.path.remove(''); sys.argv[0] = 'lora-exp'; from lora_exp.__main__ import main; main()"
    more = [*overrides, arguments.pop()] if arguments[-1] == "-m" else overrides
    call = [sys.executable, "-c", program, *arguments, *more]  # as the console script, which sees no local files
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def small(tiny_overrides: list[str]) -> list[str]:
    kept = [override for override in tiny_overrides if not override.startswith("data")]
    return [*kept, "tracking=none", "train.steps=2", "train.warmup_steps=0"]


def test_the_page_has_a_variant_a_kind_of_data_and_a_metric() -> None:
    assert {"my_variant.py", "my_data.py", "my_metric.py", "capitals.tsv"} <= set(FILES)
    assert len(COMMANDS) == 5


@pytest.mark.slow
def test_the_pages_commands_do_what_it_says(stranger: Path, small: list[str], text_file: Path) -> None:
    mine = ["data=text", f"data.path={text_file}", "data.block_size=16"]
    for number, command in enumerate(COMMANDS):
        given = small if "capitals" in command else [*small, *mine]
        place = "hydra.sweep.dir" if "-m" in command else "hydra.run.dir"
        done = run(stranger, command, *given, f"{place}=out/{number}")
        assert done.returncode == 0, done.stderr + done.stdout
    results = {n: json.loads((stranger / f"out/{n}/result.json").read_text()) for n in (0, 1, 2, 3)}
    assert results[0]["values"]["adapter"] == "orthonormal"
    assert results[0]["values"]["adapter.options"] == {"gain": 0.5}
    values = results[1]["values"]
    assert (values["data"], values["data.length"]) == ("capitals", 64)
    assert not [name for name in values if name in ("data.block_size", "data.image_size", "data.text_field")]
    assert set(results[1]["result"]["metrics"]) == {"perplexity"}
    assert results[2]["result"]["tokens_per_step"] == 2 * 48
    metrics, loss = results[3]["result"]["metrics"], results[3]["result"]["eval_loss"]
    assert metrics["bits"] == pytest.approx(loss / 0.6931471805599453)
    rows = list(csv.DictReader((stranger / "out/4/comparison.csv").read_text().splitlines()))
    assert {row["rank"] for row in rows} == {"2", "4"}
    assert all(float(row["bits"]) > 0 and row["status"] == "FINISHED" for row in rows)


def test_an_orthonormal_start_is_what_trains(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch import nn

    from lora_exp.adapters import LoraConfig, LoraModel
    from lora_exp.adapters.variants import registry

    registry._VARIANTS.names()  # all of them, as they register themselves once a process
    monkeypatch.setattr(registry._VARIANTS, "_entries", dict(registry._VARIANTS._entries))
    exec(compile(FILES["my_variant.py"], "my_variant.py", "exec"), {"__name__": "my_variant"})
    config = LoraConfig(rank=3, target_modules=["0"], variant="orthonormal", variant_options={"gain": 0.5})
    model = LoraModel(nn.Sequential(nn.Linear(8, 5)), config, verbose=False)
    (factor,) = [value for name, value in model.adapter_parameters().items() if "lora_A" in name]
    torch.testing.assert_close(factor.T @ factor, 0.25 * torch.eye(3))


WRONG = [
    ("plugins=[my_metrics]", "my_metrics is neither in", "did you mean my_metric?", False),
    ("plugins=[absent.module]", "plugins: absent.module is neither in", "install it", False),
    ("plugins=[broken]", "broken fails to import (ZeroDivisionError", "broken.py, line 2", True),
    (
        "plugins=[needs]",
        "needs fails to import (ModuleNotFoundError: No module",
        "needs.py, line 1",
        True,
    ),
    ("plugins=[taken]", "data.kind=text is registered already, as lora_exp.data.kinds.text.Text", "taken.py", True),
    ("plugins=[my_data] data=capitals data.lenght=3", "data.lenght", "did you mean data.length?", False),
    ("plugins=[my_data] data=capitals data.length=long", "data.length=long is not a whole number", "", False),
    ("plugins=[my_data] data=capitals data.length=1", "data.length=1 is below 2", "", False),
    ("plugins=[my_data] data=capitals data.length=2", "data.length=2 cuts off the answer to 'The capital", "", False),
    ("data=capitals", "data.kind=pairs is not known: choose one of chat, images, text, text_classification", "", False),
    ("plugins=[my_metric] train.metrics=[bit]", "train.metrics=bit is not known", "bits", False),
]


@pytest.mark.parametrize(("arguments", "says", "also", "filed"), WRONG, ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_said_by_name(
    stranger: Path, small: list[str], arguments: str, says: str, also: str, filed: bool
) -> None:
    (stranger / "broken.py").write_text("def broken():\n    return 1 / 0\nbroken()\n")
    (stranger / "needs.py").write_text("import no_such\n")
    taken = "from lora_exp.data import DataKind, data_kind\n\n@data_kind('text')\nclass Mine(DataKind):\n    pass\n"
    (stranger / "taken.py").write_text(taken)
    done = run(stranger, f"lora-exp --config-dir my_conf {arguments}", *small, "hydra.run.dir=out")
    assert done.returncode == 1
    assert says in done.stderr + done.stdout
    assert also in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert (stranger / "out/traceback.txt").exists() == filed
    if filed:
        assert Path("out/traceback.txt").name in done.stderr
        assert "Error" in (stranger / "out/traceback.txt").read_text()
