"""The verdict in plain words."""

from __future__ import annotations

from lora_exp.sweep.jobs import text
from lora_exp.sweep.verdict.arms import Arm
from lora_exp.sweep.verdict.effects import LEVEL
from lora_exp.sweep.verdict.judging import Finding, Judgement
from lora_exp.sweep.verdict.verdict import Verdict

_FEW = 4  # arms of which every pair is told; of more the best one's, verdict.json has them all
_UNITS = {"loss": "nats per prediction"}


def lines(verdict: Verdict) -> list[str]:
    """A few of them: what was found, what is recommended, and how it was looked at."""
    if not verdict.judgements:
        return [*_nothing(verdict), *_cautions(verdict)]
    best = verdict.arms[0].label
    told = [each for each in verdict.judgements if len(verdict.arms) <= _FEW or best in (each.first, each.second)]
    order = {Finding.BETTER: 0, Finding.ALIKE: 1, Finding.OPEN: 2}
    told.sort(key=lambda each: (order[each.finding], -each.effect.difference))
    return [
        *(sentence(each, verdict) for each in told),
        *_recommendation(verdict),
        *_method(verdict),
        *_cautions(verdict),
    ]


def sentence(judged: Judgement, verdict: Verdict) -> str:
    """What is known of a pair."""
    first, second, effect = judged.first, judged.second, judged.effect
    size = f"{effect.difference:.4f} ± {effect.half_width:.4f}"
    if judged.finding is Finding.BETTER:
        return f"{first} is better than {second} by {size}"
    if judged.finding is Finding.ALIKE:
        return f"{first} and {second} are indistinguishable within {judged.margin:g} ({size})"
    return f"{first} and {second}: not enough evidence ({size}): {_wanted(judged)}"


def arm_lines(verdict: Verdict) -> list[str]:
    """A line an arm, best first: what it came to and what it costs."""
    return ["  ".join(f"{name} {value}" if name else value for name, value in cells.items() if value)
            for cells in arm_cells(verdict)]  # fmt: skip


def arm_cells(verdict: Verdict) -> list[dict[str, str]]:
    """The same by columns."""
    metric = f"{verdict.measured.split} {verdict.study.metric}"
    return [
        {
            "": _named(arm),
            metric: f"{sample.mean:.4f}",
            "seeds": str(len(sample.replicates)),
            "parameters": f"{cost.trainable:,}",
            "peak GiB": f"{cost.peak_memory_gib:.2f}",
            "wall s": f"{cost.wall_s:.0f}",
            cost.unit: f"{cost.tokens:,.0f}",
        }
        for arm, sample, cost in zip(verdict.arms, verdict.samples, verdict.costs, strict=True)
    ]


def _named(arm: Arm) -> str:
    tuned = " ".join(f"{key}={text(value)}" for key, value in arm.tuned.items())
    return f"{arm.label} ({tuned})" if tuned else arm.label


def _wanted(judged: Judgement) -> str:
    seeds = judged.more_seeds()
    if seeds is not None:
        return f"about {seeds} more seed{'s' if seeds > 1 else ''} would find a difference of {judged.margin:g}"
    rows = judged.more_rows()
    if rows is not None:
        return f"no number of seeds will do with {judged.effect.rows} test rows: about {rows} more of those"
    return f"more seeds than can be told for a difference of {judged.margin:g}: raise study.margin"


def _nothing(verdict: Verdict) -> list[str]:
    best, sample = verdict.arms[0], verdict.samples[0]
    side = "highest" if verdict.higher_is_better else "lowest"
    return [
        f"Nothing can be said: the arms have one seed in common or none. {best.label} came out {side} "
        f"({sample.mean:.4f}), which another seed may turn round: study.replicates=5 trains each arm with five"
    ]


def _recommendation(verdict: Verdict) -> list[str]:
    place = verdict.recommended
    why = "lowest in the mean" if not verdict.higher_is_better else "highest in the mean"
    if place:
        why = f"fewest parameters of those indistinguishable from {verdict.arms[0].label}"
    elif all(each.finding is Finding.BETTER for each in verdict.judgements if each.first == verdict.arms[0].label):
        why = "better than every other"
    return [f"Recommended, as the {why}: {verdict.command}" if "better" not in why else
            f"Recommended, as it is {why}: {verdict.command}"]  # fmt: skip


def _method(verdict: Verdict) -> list[str]:
    found, study = verdict.measured, verdict.study
    unit = _UNITS.get(study.metric, study.metric)
    looked = f"{found.rows} test rows, both drawn anew" if found.rows else f"the {found.split} rows as they are"
    opened = ", opened once, after all tuning" if verdict.has_fresh_seeds and found.split == "test" else ""
    seeds = "fresh seeds" if verdict.has_fresh_seeds else "seeds"
    tuned = f"; {', '.join(study.tune)} chosen for each arm by validation" if any(a.tuned for a in verdict.arms) else ""
    pairs = len(verdict.judgements)
    return [
        f"In {unit}, paired over {verdict.seeds} {seeds} and {looked}{opened}{tuned}; {LEVEL:.0%} intervals of each "
        f"pair alone, findings corrected for {pairs} pair{'s' if pairs > 1 else ''} (Holm), margin {study.margin:g}"
    ]


def _cautions(verdict: Verdict) -> list[str]:
    found = []
    for arm in verdict.arms:
        for key in arm.on_edge:
            tried = sorted(arm.tried[key], key=lambda value: float(str(value)))
            found.append(
                f"{arm.label}: its best {key}={text(arm.tuned[key])} is at the edge of "
                f"{text(tried[0])}…{text(tried[-1])}: widen it"
            )
    if verdict.judgements and verdict.measured.split == "validation":
        chosen = ", which chose the tuned values too" if any(arm.tuned for arm in verdict.arms) else ""
        found.append(f"Of the validation rows{chosen}: data.test_fraction=0.05 holds out others for the verdict")
    if not verdict.measured.is_one_data:
        found.append("The arms were looked at with different rows, which no seed makes alike: compare with care")
    if len({len(sample.replicates) for sample in verdict.samples}) > 1:
        found.append("Some arms lack seeds: only those that both of a pair have are compared")
    return found
