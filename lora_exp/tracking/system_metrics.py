"""What the machine does while a run is open: samples under ``system/``, as MLflow's own pages show them.

MLflow samples for its fluent API alone, first after ten seconds, and asks the server for the run's status each time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

log = logging.getLogger(__name__)
Send = Callable[[Mapping[str, float], int], None]
_INTERVAL_S = 10.0
_CLASSES = {"cpu": "CPU", "gpu": "GPU"}


@contextlib.contextmanager
def sampled(send: Send, run_began_ms: int | None = None, is_wanted: bool | None = None) -> Iterator[None]:
    """Send a sample every ten seconds (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL) of a block, and one at its end.

    Steps count intervals since the run began, so that a run that goes on repeats none. Unless ``is_wanted`` says so,
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false switches it off.
    """
    if is_wanted is None:
        is_wanted = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() not in ("false", "0")
    if not is_wanted:
        yield
        return
    interval_s = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or _INTERVAL_S)
    sampler = _Sampler(send, interval_s, _first_step(run_began_ms, interval_s))
    sampler.start()
    try:
        yield
    finally:
        sampler.stop()


def _first_step(run_began_ms: int | None, interval_s: float) -> int:
    """Behind any that an earlier process can have sent: one an interval, and one at its end."""
    since_s = 0.0 if run_began_ms is None else time.time() - run_began_ms / 1000
    return 0 if since_s < 1 else int(since_s / interval_s) + 2


class _Sampler:
    def __init__(self, send: Send, interval_s: float, step: int) -> None:
        self._send, self._interval_s = send, interval_s
        self._over = threading.Event()
        self._process = _Process()
        self._machine: list[BaseMetricsMonitor] = []
        self._step = step
        self._thread = threading.Thread(target=self._sample_on, name="system metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _sample_on(self) -> None:
        try:
            self._machine = _machine_monitors()
            is_over = False
            while not is_over:
                is_over = self._over.wait(self._interval_s)
                self._send(self._sample(), self._step)
                self._step += 1
        except Exception as error:  # a figure of the machine is not worth a run
            log.debug("system metrics end: %s", error)

    def _sample(self) -> dict[str, float]:
        figures = self._process.figures()
        for monitor in self._machine:
            monitor.collect_metrics()
            figures |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": float(value) for name, value in figures.items()}


class _Process:
    """This process's share of a core, and its resident memory where the system tells."""

    def __init__(self) -> None:
        self._seen = time.monotonic(), time.process_time()

    def figures(self) -> dict[str, float]:
        before, self._seen = self._seen, (time.monotonic(), time.process_time())
        wall_s, busy_s = (now - then for now, then in zip(self._seen, before, strict=True))
        figures = {"process_cpu_percentage": round(100 * busy_s / wall_s, 1)} if wall_s else {}
        with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as stream:  # noqa: PTH123  # Linux
            figures["process_memory_megabytes"] = int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        return figures


def _machine_monitors() -> list[BaseMetricsMonitor]:
    """MLflow's, of what its optional libraries (psutil, nvidia-ml-py) can see here. To be called by who will use them:
    psutil's shares are of the time since the same thread's last look."""
    monitors = []
    for name in ("cpu", "disk", "network", "gpu"):
        with contextlib.suppress(Exception):
            module = import_module(f"mlflow.system_metrics.metrics.{name}_monitor")
            monitor = getattr(module, f"{_CLASSES.get(name, name.title())}Monitor")()
            monitor.collect_metrics()
            monitor.clear_metrics()
            monitors.append(monitor)
    return monitors
