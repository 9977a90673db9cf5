"""A claim of the report as data: its parts, each a comparison of two runs, and the mark that our trainings give it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from report.numbers import UNITS, Difference, Results, difference, mean, name_of, steady_noise, values

MARKS = {"holds": "✓", "reversed": "✗", "cannot be told": "?", "one seed": "?", "not run": "–", "for the eye": "◦"}


@dataclass(frozen=True)
class Part:
    """Of a measure (see `numbers.measure`), the least of some runs minus the greatest of others lies in a zone.

    The runs are chosen by their means. Without others it is the one run's own value.
    """

    runs: tuple[str, ...]
    others: tuple[str, ...] = ()
    on: str = "test"
    zone: tuple[float, float] = (0.0, math.inf)
    text: str = ""  # what it says, where the runs' names do not


def better(run: str, other: str, on: str = "test") -> Part:
    return Part((run,), (other,), on)


def about_equal(run: str, other: str, margin: float, on: str = "test") -> Part:
    """Within `margin` points of each other: so is the whole interval."""
    return Part((run,), (other,), on, (-margin, margin))


def among_best(runs: Sequence[str], others: Sequence[str]) -> Part:
    """Each of the runs is better than all others."""
    return Part(tuple(runs), tuple(others))


def narrowest_gap(run: str, others: Sequence[str]) -> Part:
    """Of all these it has the smallest gap between training and validation loss in the last epoch."""
    return Part(
        (run,),
        tuple(others),
        "narrowness",
        text="how much narrower the gap between the losses of {run} is than that of {other}",
    )


def overfits(run: str, by: float = 5.0) -> Part:
    """The validation loss ends more than `by` percent above its lowest value."""
    text = f"the validation loss of {{run}} ends above its lowest (judged as: by more than {by:g} %)"
    return Part((run,), (), "rise", (by, math.inf), text)


def for_the_eye(text: str) -> Part:
    """Nothing that a number decides."""
    return Part((), text=text)


@dataclass(frozen=True)
class Claim:
    """One of the report's ten conclusions. The first of its parts matters most."""

    number: int
    text: str
    parts: tuple[Part, ...]
    note: str = ""  # where it is not quite the report's


def mark_of(found: Difference, zone: tuple[float, float], runs: Sequence[list]) -> str:
    """Told by the 95 % interval, against the zone: inside, outside, or neither."""
    if found.half is None:
        return "one seed" if min(map(len, runs)) == 1 else "cannot be told"
    low, high = found.value - found.half, found.value + found.half
    if zone[0] < low and high < zone[1]:
        return "holds"
    return "reversed" if high < zone[0] or zone[1] < low else "cannot be told"


def judge(part: Part, results: Results) -> dict:
    """The part's text, its mark, the runs compared, their difference and half its interval, as JSON can hold them."""
    if not part.runs:
        return {"text": part.text, "mark": "for the eye"}
    if not set(part.runs + part.others) <= results.keys():
        first = part.others[:1] or ("",)
        return {"text": words(part, part.runs[0], first[0]), "mark": "not run"}
    noise = steady_noise(results.values(), part.on)
    run = min(part.runs, key=lambda name: mean(results[name], part.on))
    if not part.others:
        own = steady_noise([results[run]], part.on)
        found = Difference(
            mean(results[run], part.on), own.half(1 / len(values(results[run], part.on))) if own else None
        )
        compared, other = [results[run]], ""
    else:
        other = max(part.others, key=lambda name: mean(results[name], part.on))
        found = difference(results[run], results[other], part.on, noise)
        compared = [results[run], results[other]]
    return {
        "text": words(part, run, other),
        "mark": mark_of(found, part.zone, compared),
        "runs": [name for name in (run, other) if name],
        "on": part.on,
        "difference": found.value,
        "half": None if found.half is None else round(found.half, 3),
        "unit": UNITS.get(part.on, "points"),
    }


def words(part: Part, run: str, other: str) -> str:
    """ "crop + flip against crop", and on what where that is not the test images."""
    names = {"run": name_of(run), "other": name_of(other)}
    if part.text:
        return part.text.format(**names)
    best_of = "the best of the others, " if len(part.others) > 1 else ""
    text = f"{names['run']} against {best_of}{names['other']}"
    if part.on != "test":
        text += f", {part.on.replace('_', ' ')}"
    if math.isfinite(part.zone[1]):
        text += f" (judged as: within ±{part.zone[1]:g})"
    return text


def judge_claims(claims: Sequence[Claim], results: Results) -> list[dict]:
    """As claims.json holds them."""
    return [
        {
            "number": claim.number,
            "text": claim.text,
            "note": claim.note,
            "parts": [judge(part, results) for part in claim.parts],
        }
        for claim in claims
    ]
