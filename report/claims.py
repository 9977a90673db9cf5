"""A claim of the report as data: its parts, each a comparison of two runs, and the mark that our trainings give it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from report.numbers import DIGITS, UNITS, Difference, Results, difference, mean, name_of, steady_noise

MARKS = {"holds": "✓", "does not hold": "✗", "cannot be told": "?", "not run": "–", "by eye": "◦"}


@dataclass(frozen=True)
class Part:
    """Of a measure (see `numbers.measure`), the run minus the one of the others with the greatest mean lies in `zone`.

    Without others it is the run's own value.
    """

    run: str
    others: tuple[str, ...] = ()
    on: str = "test"
    zone: tuple[float, float] = (0.0, math.inf)
    text: str = ""  # what it says, where the runs' names do not


def better(run: str, *others: str, on: str = "test") -> Part:
    """Than all of the others."""
    return Part(run, others, on)


def about_equal(run: str, other: str, margin: float) -> Part:
    """Within `margin` points of each other: so is the whole interval."""
    return Part(run, (other,), zone=(-margin, margin))


def narrowest_gap(run: str, *others: str) -> Part:
    """Of all these it has the smallest gap between training and validation loss in the last epoch."""
    text = "how much narrower the gap between the losses of {run} is than that of {other}"
    return Part(run, others, "narrowness", text=text)


def overfits(run: str) -> Part:
    """The validation loss ends more than 5 percent above its lowest value."""
    text = "the validation loss of {run} ends above its lowest (judged as: by more than 5 %)"
    return Part(run, (), "rise", (5.0, math.inf), text)


def by_eye(text: str) -> Part:
    """Nothing that a number decides."""
    return Part("", text=text)


@dataclass(frozen=True)
class Claim:
    """One of the report's ten conclusions. Where none of its parts is told, the overview shows the first."""

    number: int
    text: str
    parts: tuple[Part, ...]
    note: str = ""  # where it is not quite the report's


def mark_of(found: Difference, zone: tuple[float, float]) -> str:
    """Told by the 95 % interval, against the zone: inside, outside, or neither; without one it cannot be told."""
    if found.half is None:
        return "cannot be told"
    low, high = found.value - found.half, found.value + found.half
    if zone[0] < low and high < zone[1]:
        return "holds"
    return "does not hold" if high < zone[0] or zone[1] < low else "cannot be told"


def judge(part: Part, results: Results) -> dict:
    """The part's text, its mark, the runs compared, their difference and half its interval, as JSON can hold them."""
    if not part.run:
        return {"text": part.text, "mark": "by eye"}
    if not {part.run, *part.others} <= results.keys():
        return {"text": words(part, part.others), "mark": "not run"}
    ours = results[part.run]
    runs = [part.run]
    if part.others:
        runs.append(max(part.others, key=lambda name: mean(results[name], part.on)))
        found = difference(ours, results[runs[1]], part.on, steady_noise(results.values(), part.on))
    else:
        own = steady_noise([ours], part.on)
        found = Difference(mean(ours, part.on), own.half(1 / len(ours)) if own else None)
    return {
        "text": words(part, runs[1:]),
        "mark": mark_of(found, part.zone),
        "runs": runs,
        "on": part.on,
        "difference": found.value,
        "half": None if found.half is None else round(found.half, DIGITS.get(part.on, 2)),
        "unit": UNITS.get(part.on, "points"),
    }


def words(part: Part, others: Sequence[str]) -> str:
    """ "crop + flip against crop", and on what where that is not the test images. others: the one that was compared, or
    all where none was.
    """
    run, other = name_of(part.run), ", ".join(map(name_of, others))
    if len(part.others) > 1:
        other = f"the best of {other}" if len(others) > 1 else f"the best of the others, {other}"
    if part.text:
        return part.text.format(run=run, other=other)
    text = f"{run} against {other}"
    if part.on != "test":
        text += f", {part.on.replace('_', ' ')}"
    if math.isfinite(part.zone[1]):
        text += f" (judged as: within ±{part.zone[1]:g})"
    return text


def judge_claims(claims: Sequence[Claim], results: Results) -> list[dict]:
    """As claims.json holds them."""
    judged = []
    for claim in claims:
        parts = [judge(part, results) for part in claim.parts]
        judged.append({"number": claim.number, "text": claim.text, "note": claim.note, "parts": parts})
    return judged
