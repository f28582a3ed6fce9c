"""What the suites find: rows of tables, whose columns differ."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
