"""Check this GPU: `python -m benchmarks.gpu_check` ends with 0 where all is as it should be."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.report import in_a_line, now, table
from benchmarks.rows import Row
from lora_exp.machine.processor import device_name

from . import lanes, layers, models, runs, times
from .checks import Found, run

_ROOMS = {"layers": layers.cases, "lanes": lanes.cases, "models": models.cases, "runs": runs.cases}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu runs the same checks where there is no GPU")
    parser.add_argument("--rooms", nargs="*", choices=[*_ROOMS, "times"], default=[*_ROOMS, "times"])
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_check"), help="folder of gpu.json and GPU.md")
    asked = parser.parse_args(arguments)
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"this torch ({torch.__version__}) sees no GPU; --device cpu runs the same checks on the processor")
        return 2
    device, started = torch.device(asked.device), time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    warnings.simplefilter("ignore")
    about = circumstances(device)
    print(in_a_line(about), flush=True)
    found = list(_checked(asked.rooms, device))
    measured = {**times.measure(device), "lanes": lanes.measure(device)} if "times" in asked.rooms else {}
    about["seconds"] = str(round(time.perf_counter() - started))
    _write(asked.out, about, found, measured)
    bad = [one for one in found if not one.is_good]
    left = sum(bool(one.said) and one.is_good for one in found)
    print(f"{len(found) - len(bad) - left} as they should be, {left} left out, {len(bad)} not; in {about['seconds']} s")
    print(f"written: {asked.out / 'GPU.md'}")
    return 1 if bad else 0


def circumstances(device: torch.device) -> dict[str, str]:
    """What it was measured on."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    versions = {name: metadata.version(name) for name in names if importlib.util.find_spec(name)}
    about = {"date": now(), "device": device_name(device), **versions}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        about |= {"capability": f"{major}.{minor}", "CUDA": str(torch.version.cuda)}
    return about


def _checked(rooms: list[str], device: torch.device) -> Iterator[Found]:
    for room in rooms:
        for one in run(room, _ROOMS[room](device)) if room in _ROOMS else ():
            mark = "left out" if one.said and one.is_good else "ok" if one.is_good else "NOT SO"
            print(f"{mark:8}  {one.error:8.1e} of {one.limit:.0e}  {one.room}: {one.case}  {one.said}", flush=True)
            yield one


def _write(folder: Path, about: dict[str, str], found: list[Found], measured: Row) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [one.row() for one in found]
    (folder / "gpu.json").write_text(json.dumps({"about": about, "checks": rows, "times": measured}, indent=1) + "\n")
    parts = ["# GPU check", in_a_line(about), table(rows)]
    if measured:
        parts += ["PEFT's time over ours, forward and backward of one layer:", table(measured["rows"])]
        parts += [
            "Lanes, each product by itself over batched, forward and backward of one layer:",
            table(measured["lanes"]),
        ]
    (folder / "GPU.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
