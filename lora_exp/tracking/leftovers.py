"""What earlier processes could not tell MLflow, told now."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config import TrackingConfig
from lora_exp.credentials import redacted
from lora_exp.tracking.client import tracking_uri, without_retries
from lora_exp.tracking.delivery import Delivery
from lora_exp.tracking.outbox import InDeliveryError, Outbox
from lora_exp.tracking.telling import Teller

_HIDDEN = "***"


@dataclass(frozen=True)
class Told:
    """``lines`` of a journal were delivered, ``left`` were not, because of ``trouble``."""

    lines: int
    left: int
    trouble: str = ""


def tell_rest(folder: Path, run_id: str, patience_s: float, at_most_s: float = math.inf) -> Told:
    """Deliver the journal of ``run_id`` in ``folder``. A live process's own is left to it."""
    try:
        outbox = Outbox(folder, run_id)
    except InDeliveryError:
        return Told(0, 0)
    before, section = outbox.left(), TrackingConfig(uri=outbox.address.get("uri"))
    where = outbox.address.get("where") or ""
    if section.uri is None and _HIDDEN in where:
        outbox.close()
        return Told(0, before, f"it belongs to {where}, whose login is not kept: set MLFLOW_TRACKING_URI")
    teller = Teller(section, folder, run_id, is_new=False)
    try:
        with without_retries():
            delivery = Delivery(outbox, teller.tell, redacted(tracking_uri(section)))
            delivery.drain(patience_s, at_most_s)
        return Told(before - outbox.left(), outbox.left(), delivery.trouble)
    finally:
        outbox.close()
