"""What came of a run, noted with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from lora_exp.config import TrackingConfig
from lora_exp.credentials import redacted
from lora_exp.tracking.client import checked_client, reason, said_clearly, without_retries

log = logging.getLogger(__name__)


def note_export(section: TrackingConfig, run_id: str, name: str, figures: Mapping[str, float], place: Path) -> None:
    """Metrics ``export/NAME/…`` and the tag ``export.NAME`` of the run. A server that fails costs a warning."""
    if not section.enabled:
        return
    try:
        with said_clearly(section), without_retries():
            from mlflow.entities import Metric, RunTag

            client, now = checked_client(section), int(time.time() * 1000)
            metrics = [Metric(f"export/{name}/{key}", value, now, 0) for key, value in figures.items()]
            client.log_batch(run_id, metrics=metrics, tags=[RunTag(f"export.{name}", redacted(str(place)))])
    except Exception as error:
        log.warning("MLflow does not get the figures of this export, which is whole: %s", reason(error)[:300])
