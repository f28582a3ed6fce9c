"""What an evaluation is summed up by: metrics by name, functions of the sums over its rows.

Letters: B rows, K classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lora_exp.errors import UserError
from lora_exp.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class RowLosses:
    """``total`` (B,): the sum of a row's losses in nats. ``count`` (B,): how many predictions it holds.

    ``counted``: what else is counted a row, (B,) each, such as the ``hits`` among its predictions, or (B, K) for each
    of K classes.
    """

    total: Tensor
    count: Tensor
    counted: Mapping[str, Tensor] = field(default_factory=dict)

    def by_row(self) -> dict[str, list[float]]:
        """As plain numbers, without what is counted for each class."""
        flat = {name: values for name, values in self.counted.items() if values.dim() == 1}
        return {name: values.tolist() for name, values in {"loss": self.total, "count": self.count, **flat}.items()}


@dataclass(frozen=True)
class Sums:
    """The rows' losses, predictions and whatever else they count, over a whole evaluation."""

    loss: float = 0.0
    count: int = 0
    counted: Mapping[str, float | list[float]] = field(default_factory=dict)

    def plus(self, rows: RowLosses) -> Sums:
        """Sums with these rows added."""
        here = {name: values.double().sum(0).tolist() for name, values in rows.counted.items()}
        return self.and_(Sums(rows.total.double().sum().item(), int(rows.count.sum().item()), here))

    def and_(self, other: Sums) -> Sums:
        """Sums of both."""
        theirs = {name: _sum(self.counted.get(name), value) for name, value in other.counted.items()}
        return Sums(self.loss + other.loss, self.count + other.count, {**self.counted, **theirs})

    def of(self, name: str) -> float | list[float]:
        """What was counted under ``name``, a class each where it was so. Raises UserError if nothing was."""
        if name not in self.counted:
            known = f"it counts {', '.join(self.counted)}" if self.counted else "it counts nothing else than losses"
            raise UserError(f"a metric needs {name!r}, which this kind of data does not count ({known}): leave it out")
        return self.counted[name]

    def share(self, name: str) -> float:
        """What was counted under ``name``, a prediction; of no predictions nan. Raises UserError if nothing was."""
        if not self.count:
            return math.nan
        value = self.of(name)
        assert isinstance(value, float)
        return value / self.count


def _sum(before: float | list[float] | None, here: float | list[float]) -> float | list[float]:
    if before is None:
        return here
    if isinstance(before, list) and isinstance(here, list):
        return [one + other for one, other in zip(before, here, strict=True)]
    assert isinstance(before, float)
    assert isinstance(here, float)
    return before + here


def merged(parts: Iterable[Sums]) -> Sums:
    """All parts of an evaluation, added up in their order."""
    return functools.reduce(Sums.and_, parts, Sums())


class Metric:
    """A function of an evaluation's sums. ``better``: whether a ``lower`` or a ``higher`` one is; None: nobody said."""

    def __init__(self, function: Callable[[Sums], float], better: Better | None) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self.better = better

    def __call__(self, sums: Sums) -> float:
        return self._function(sums)


metrics: Registry[Metric] = Registry("train.metrics", __name__)


def metric(name: str, better: Better | None = None) -> Callable[[Callable[[Sums], float]], Metric]:
    """Decorator: this function is what ``train.metrics=[name]`` means. With ``better``, ``train.best_metric``, too."""

    def register(function: Callable[[Sums], float]) -> Metric:
        return metrics.add(name)(Metric(function, better))

    return register


@metric("loss", better="lower")
def mean_loss(sums: Sums) -> float:
    """Nats a prediction; of none nan, which no comparison takes for the best."""
    return sums.loss / sums.count if sums.count else math.nan


@metric("perplexity", better="lower")
def perplexity(sums: Sums) -> float:
    """e to the mean loss; above e^709 a float overflows."""
    return math.exp(min(mean_loss(sums), 700.0))


@metric("accuracy", better="higher")
def accuracy(sums: Sums) -> float:
    """The share of predictions that are right."""
    return sums.share("hits")


@metric("macro_f1", better="higher")
def macro_f1(sums: Sums) -> float:
    """The mean of the classes' F1, of those that are among the labels or the predictions; as scikit-learn has it."""
    if not sums.count:
        return math.nan
    right, predicted, labelled = (sums.of(f"class_{name}") for name in ("hits", "predicted", "labelled"))
    assert isinstance(right, list)
    assert isinstance(predicted, list)
    assert isinstance(labelled, list)
    both = [(2 * hits, said + given) for hits, said, given in zip(right, predicted, labelled, strict=True)]
    scores = [twice / total for twice, total in both if total]
    return sum(scores) / len(scores)


def chosen(*names: str) -> dict[str, Metric]:
    """The metrics of these names, ``loss`` first and each once. Raises UserError for one that there is not."""
    return {name: metrics[name] for name in dict.fromkeys(("loss", *names))}


def higher_is_better(best_metric: str) -> bool:
    """Whether of ``eval/NAME`` a higher one is better. Raises UserError for a metric that does not say so."""
    name = best_metric.removeprefix("eval/")
    better = metrics[name].better
    if better is None:
        raise UserError(
            f"train.best_metric={best_metric}: {name} does not say which is better: register it with "
            f'@metric("{name}", better="higher") or better="lower"'
        )
    return better == "higher"
