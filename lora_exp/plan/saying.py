"""The library's warnings while one configuration is planned again and again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from lora_exp.adapters.surgery import injection, left_out


@contextlib.contextmanager
def said_once(said: set[str] | None) -> Iterator[None]:
    """Hold back the library's warnings that are in ``said``; None holds all of them back."""

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if said is None or message in said:
            return False
        said.add(message)
        return True

    logs = (injection.log, left_out.log)
    for log in logs:
        log.addFilter(is_new)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(is_new)
