"""Records that cannot be used: counted, the first three kept, passed over up to a share of all."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_exp.errors import UserError

_SHOWN = 3


@dataclass(frozen=True)
class Broken:
    """What stands where a record should be, and why it is none."""

    reason: str


@dataclass
class BadRecords:
    """``seen``: how many records were looked at; ``shared``: how many training records are a held-out one's twins."""

    max_bad_fraction: float = 0.0
    seen: int = 0
    count: int = 0
    shared: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        """``where`` is as ``records`` gives it; ``reason`` goes on from there, such as "output is null, …"."""
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{where}: {reason}")

    def check(self, total: int | None = None) -> None:
        """Raise UserError if more than ``max_bad_fraction`` of ``total`` records (else of those seen) are broken."""
        total = max(self.seen if total is None else total, self.count)
        if self.count <= self.max_bad_fraction * total:
            return
        more = f"\n  … and {self.count - _SHOWN:,} more" if self.count > _SHOWN else ""
        listed = "".join(f"\n  {line}" for line in self.first)
        share = self.count / total
        raise UserError(
            f"{self.count:,} of {total:,} records cannot be used ({share:.2%}), and data.max_bad_fraction="
            f"{self.max_bad_fraction:g}:{listed}{more}\nMend them, or pass over them by data.max_bad_fraction="
            f"{_rounded_up(share):g}"
        )

    def said(self, total: int | None = None) -> list[str]:
        """The same for a person to hear where it is no error (``Data.said``): the count, and the first three."""
        total = max(self.seen if total is None else total, self.count)
        found = []
        if self.count:
            listed = "".join(f"\n  {line}" for line in self.first)
            found.append(f"{self.count:,} of {total:,} records cannot be used and are passed over:{listed}")
        if self.shared:
            found.append(f"{self.shared:,} records to train on equal held-out ones and are left out")
        return found


def _rounded_up(share: float) -> float:
    """A share of at most three figures that is not below ``share``."""
    for digits in (2, 3, 4, 6, 9):
        rounded = round(share, digits)
        near = rounded if rounded >= share else rounded + 10.0**-digits
        if near <= 1.2 * share or digits == 9:
            return min(round(near, digits), 1.0)
    return 1.0
