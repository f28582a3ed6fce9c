"""What is held out for validation: the share that ``data.val_fraction`` asks for, as near as can be."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from lora_exp.errors import UserError

SPLITS = ("train", "validation", "test")
VALIDATION, TEST = 1, 2
_NEAR = 0.1  # of the smaller side: how far a cut may be moved to fall between lines, or words


def held_out(count: int, fraction: float) -> list[bool]:
    """Which of ``count`` things are held out: evenly spread, the nearest number to ``fraction``, never none or all.

    For fraction = 1/k, every k-th from the middle of the first k. Raises UserError for fewer than two.
    """
    if count < 2:
        raise UserError(f"{count} cannot be split into training and validation")
    share = Fraction(fraction).limit_denominator(10**6) or Fraction(fraction)  # 0.05 is 1/20, which no float is
    number = -((1 - 2 * count * share) // 2)  # the nearest to count · share; of two equally near the smaller
    chosen = {(2 * place + 1) * share.denominator // (2 * share.numerator) for place in range(number)}
    if not chosen:
        chosen = {count // 2}
    if len(chosen) == count:
        chosen.remove(count // 2)
    return [index in chosen for index in range(count)]


def shares(count: int, validation: float, test: float) -> bytearray:
    """Which of ``SPLITS`` each of ``count`` things is in, each held-out fraction of all evenly spread.

    What is held out for validation does not depend on ``test``, but that of three things one is left for each.
    Raises UserError for fewer things than splits.
    """
    found = bytearray(count)
    if validation and test and count < len(SPLITS):
        raise UserError(f"{count} cannot be split into training, validation and test")
    if validation:
        found = bytearray(VALIDATION if is_held_out else 0 for is_held_out in held_out(count, validation))
    if validation and test and found.count(0) < 2:
        found[found.rindex(VALIDATION)] = 0
    rest = [place for place, share in enumerate(found) if not share]
    if test:
        for place, is_held_out in zip(rest, held_out(len(rest), min(test * count / len(rest), 1.0)), strict=True):
            found[place] = TEST if is_held_out else 0
    return found


def held_out_by_class(labels: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, each class in its share, in the order of the classes.

    Raises UserError for fewer than two.
    """
    by_class = sorted(range(len(labels)), key=lambda index: labels[index])  # stable
    chosen = held_out(len(labels), fraction)
    train = [index for index, is_held_out in zip(by_class, chosen, strict=True) if not is_held_out]
    return train, [index for index, is_held_out in zip(by_class, chosen, strict=True) if is_held_out]


def cut(text: str, fraction: float) -> int:
    """Where the last ``fraction`` of a text starts: at a line if one starts near there, else at a word, else there."""
    position = len(text) - round(len(text) * fraction)
    return near_break(text, position, _NEAR * min(position, len(text) - position))


def near_break(text: str, position: int, within: float) -> int:
    """The start of a line, else of a word, nearest to ``position`` and not further off than ``within``; else it."""
    for separator in ("\n", " "):
        before, after = text.rfind(separator, 0, position) + 1, text.find(separator, position) + 1
        nearest = min((before, after), key=lambda start: abs(start - position))
        if abs(nearest - position) <= within:
            return nearest
    return position
