"""Nothing is left on the shelf between tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lora_exp.packing import shelf


@pytest.fixture(autouse=True)
def _an_empty_shelf() -> Iterator[None]:
    yield
    with shelf.shared() as here:
        here.drop()
