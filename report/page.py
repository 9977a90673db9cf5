"""The pages: results/README.md and results/q*/README.md, from what else is in results/ alone.

    results/q3/crop/seed0.json -> its figures -> results/q3/README.md and claims.json -> results/README.md, overview.png

What is the same for everyone stands in the templates beside this file; what we found, in findings.md beside each page.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import jinja2
import numpy as np

from common import Run, output_folder, result_path, results_lock
from parts.machine import UserError, rank, require_writable, say, tell
from report import figures, numbers
from report.claims import MARKS, Claim, judge_claims
from report.figures import MADE_BY, RUN_FIGURES, Figure, require_ours, save_figure, stamp_of
from report.numbers import Noise, Result, Results, difference, mean, name_of, values


@dataclass(frozen=True)
class Question:
    """What a script declares of its question."""

    name: str  # "q1"
    command: str  # that trains it: "q1_convnet.py"
    doc: str  # its manual; the first line heads the page
    runs: Sequence[Run]
    claims: Sequence[Claim] = ()
    figures: Callable[[Results], dict[str, Figure]] = lambda results: {}  # of all runs, by file name
    baselines: Sequence[str] = ()  # a run is compared with the first of these that is read at as many epochs
    beside: tuple[str, ...] = ()  # runs of other questions that the figures and claims want: "q1/convnet"


def check_pages(question: Question, runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Before the training of these runs: most of what would fail after it. Raises UserError."""
    if args.list:
        return
    root = output_folder(args)
    folder = root / question.name
    if args.replot and not folder.is_dir():
        raise UserError(f"--replot: there are no results in {folder}; is it the folder they were written to?")
    written = [root / name for name in ("README.md", "overview.png", "claims.png")]
    written += [folder / name for name in ("README.md", "claims.json")]
    drawn = {run.name for run in (*question.runs, *runs)}
    for path in [*written, *(folder / run / f"{name}.png" for run in drawn for name in RUN_FIGURES)]:
        require_ours(path)
    replaced = [] if args.replot else [result_path(args, question.name, run) for run in runs]
    for path in (root, folder, *(folder / run.name for run in runs if (folder / run.name).exists())):
        require_writable(path)
    with results_lock(args):
        found = numbers.read_question(folder, [*question.runs, *runs], args.sample, replaced)
        for result in chain(*found.values()):
            numbers.read_arrays(result)
        numbers.read_beside(root, question.beside, args.sample)
        overview_content(root, args.sample, replaced)


def update_pages(question: Question, args: argparse.Namespace, run: Run) -> None:
    """After a training of a sweep: its figures, and the pages. What a user can mend is said, and ends no sweep."""
    try:
        write_pages(question, args)
    except (UserError, OSError) as error:
        tell(f"{run.name} is trained and its result written, but not all pictures and pages: {error}")


def finish_pages(question: Question, args: argparse.Namespace) -> None:
    """At the end: figures and pages, and the table and the claims on the screen. Raises UserError."""
    if rank() != 0 or args.list:
        return
    content = write_pages(question, args, anew=args.replot)
    table = [[row[0].split("]")[0].lstrip("["), *row[1:]] for row in content["table"]]  # without links
    widths = [max(map(len, column)) for column in zip(*table)]
    say("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table) + "\n")
    for claim in content["claims"]:
        say(f"claim {claim['number']}: {claim['text']}")
        for part in claim["parts"]:
            say(f"  {part['mark']}: {part['text']} {interval_in_words(part)}".rstrip())
    folder = output_folder(args) / question.name
    say(f"\nfigures and numbers: {folder}/, page: {folder / 'README.md'}")


def write_pages(question: Question, args: argparse.Namespace, anew: bool = False) -> dict:
    """A question's figures and page, and the overview; returns what its page shows. anew: figures too that are drawn
    already.
    """
    root = output_folder(args)
    folder = root / question.name
    with results_lock(args), figures.plain_style():
        own = numbers.read_question(folder, question.runs, args.sample)
        results = own | numbers.read_beside(root, question.beside, args.sample)
        for found in own.values():
            figures.draw_run(found, args.figures, anew)
        drawings = question.figures(results) if own else {}
        for name, figure in drawings.items():
            save_figure(figure, folder / name, args.figures, stamp_of(chain(*results.values())))
        claims = [] if args.sample else judge_claims(question.claims, results)
        if claims:
            text = json.dumps({"made_by": MADE_BY, "claims": claims}, indent=1) + "\n"
            figures.write_ours(folder / "claims.json", text.encode())
        shown = list(drawings) or [f"{run}/{name}.png" for run in own for name in RUN_FIGURES]
        content = question_content(question, own, results, args) | {"claims": claims, "figures": shown}
        write_page(folder / "README.md", "question.md.jinja", content)
        overview = overview_content(root, args.sample)
        if not args.sample:
            stamp = stamp_of(chain(*(row.results for row in overview["rows"])))
            save_figure(figures.plot_overview(overview["rows"]), root / "overview.png", args.figures, stamp)
        if overview.get("claims"):
            save_figure(figures.plot_claims(overview["claims"]), root / "claims.png", args.figures)
        write_page(root / "README.md", "overview.md.jinja", overview)
    return content


def write_page(path, template: str, content: dict) -> None:
    """Of a template; blank lines that blocks leave behind are dropped."""
    loader = jinja2.FileSystemLoader(numbers.HERE)
    strict = jinja2.StrictUndefined
    environment = jinja2.Environment(loader=loader, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    for function in (distance, in_words, interval_in_words, name_of, values, with_deviation, np.median):
        environment.globals[function.__name__] = function
    text = environment.get_template(template).render(**content, MADE_BY=MADE_BY, MARKS=MARKS, WIDE=numbers.WIDE)
    figures.write_ours(path, (re.sub(r"\n{3,}", "\n\n", text).strip() + "\n").encode())


def in_words(value: float, half: float | None = None, digits: int = 2) -> str:
    """+1.91 ± 1.58"""
    text = f"{value:+.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
    return text.replace("-", "−")


def interval_in_words(part: dict) -> str:
    """A judged part's difference; empty where nothing was run."""
    if "difference" not in part:
        return ""
    text = f"{in_words(part['difference'], part['half'], numbers.DIGITS.get(part['on'], 2))} {part['unit']}"
    if part["half"] is not None:
        return text
    alike = len(part["runs"]) > 1 and not part["difference"]
    return f"{text} (alike in every seed)" if alike else f"{text} (too few seeds)"


def read_findings(folder) -> str:
    """What was written by hand; empty without."""
    path = folder / "findings.md"
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""


def with_deviation(found: Sequence[Result], what: str, digits: int = 2) -> str:
    """ "80.70", or with several seeds "80.70 ± 0.31" (standard deviation)."""
    text = f"{mean(found, what):.{digits}f}"
    return text if len(found) == 1 else f"{text} ± {values(found, what).std(ddof=1):.{digits}f}"


def question_content(question: Question, own: Results, results: Results, args: argparse.Namespace) -> dict:
    """What question.md.jinja shows, but for the claims and the figures. results: its own, and those beside."""
    noise = numbers.steady_noise(results.values(), "test")
    weights = {found[0].settings["weights"] for found in own.values()}
    runs = dict.fromkeys([*(run.name for run in question.runs), *own])
    table = [HEAD, *(run_row(question, run, own, noise) for run in runs if run in own or not args.sample)]
    if question.name not in numbers.the_report()["numbers"]:  # which has nothing to stand beside
        table = [[cell.removesuffix(": report / ours").removeprefix("- / ") for cell in row] for row in table]
    shown = [c for c in zip(*table) if set(c[1:]) != {"-"} and not (args.sample and "report" in c[0])]  # columns
    by_parts = []
    for run, found in own.items():
        environments = chain(*(result.environments for result in found))
        if any("batch_norm" in here for here in environments):
            by_parts.append(name_of(run))
    return {
        "question": question,
        "sample": args.sample,
        "findings": read_findings(output_folder(args) / question.name),
        "own": own,
        "table": list(zip(*shown)),
        "report_figures": [f for f in numbers.the_report()["figures"] if f["question"] == question.name],
        "machines": machines(own),
        "settings": shared_settings(own) if own else "",
        "stand_ins": sorted(name for name in weights if " sha256:" in name),
        "noise": noise,
        "beside": [path for path in question.beside if path.split("/")[1] in results],
        "by_parts": by_parts,
    }


HEAD = [
    "run",
    "best / last epoch of each seed",
    "test as the report: report / ours",
    "validation as the report: report / ours",
    "ours: test",
    "validation",
    "test − baseline",
    "from the report's curve",
    "gap",
]


def shared_settings(own: Results) -> str:
    """What all these runs are trained with, but for what is switched off."""
    every = [result.settings for result in chain(*own.values())]
    shared = [name for name in every[0] if all(settings[name] == every[0][name] for settings in every)]
    words = {name: str(every[0][name]) for name in shared if every[0][name] not in (None, "none", [], 0)}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in words.items())


def run_row(question: Question, run: str, own: Results, noise: Noise | None) -> list[str]:
    """A row of the table: the report's numbers beside ours, measured alike, then what we would report."""
    printed = numbers.reported(question.name, run)
    test, validation = (printed.get(what, "-") for what in ("test", "validation"))
    drawn = [figure for figure in numbers.figures_of(run) if "validation_accuracy" in figure]
    if printed and drawn:
        best = max(drawn[-1]["validation_accuracy"])
        if validation == "-" or (isinstance(validation, float) and abs(best - validation) > 0.1):
            validation = f"{best:.1f}*"  # not printed, or not what its figure shows
    if run not in own:
        return [name_of(run), "not run", f"{test} / -", f"{validation} / -", *["-"] * 5]
    found = own[run]
    seeds = ", ".join(f"{result.best_epoch}/{result.epochs}" for result in found)
    if [result.seed for result in found] != [*range(len(found))]:
        seeds += f" (seed{'s' if len(found) > 1 else ''} {', '.join(str(result.seed) for result in found)})"
    everywhere = {result.settings["precision"] for result in chain(*own.values())}
    precisions = {result.settings["precision"] for result in found}
    if len(everywhere) > 1 and precisions != {"bf16"}:
        seeds += f" (in {' and '.join(sorted(precisions))})"
    epochs = found[0].settings["epochs"]
    baselines = [own[name] for name in question.baselines if name in own and own[name][0].settings["epochs"] == epochs]
    against = "-"
    if baselines and run not in question.baselines:
        against = in_words(*difference(found, baselines[0], "test", noise))
    apart = [numbers.curve_distance(figure, found, "validation_accuracy") for figure in drawn]
    return [
        f"[{name_of(run)}]({run}/)",
        seeds,
        f"{test} / {with_deviation(found, 'alike', 1)}",
        f"{validation} / {with_deviation(found, 'alike_validation', 1)}",
        with_deviation(found, "test"),
        with_deviation(found, "validation"),
        against,
        f"{min(apart):.1f}" if apart else "-",
        in_words(mean(found, "gap"), digits=3),
    ]


def machines(own: Results) -> list[str]:
    """Where the question's epochs were trained, how long one took, and how many; every training once."""
    by_length = sorted(chain(*own.values()), key=lambda result: result.epochs)
    longest = {result.identity(): result for result in by_length}
    seconds: dict[str, list[np.ndarray]] = {}
    for result in longest.values():
        moves = [here["from_epoch"] - 1 for here in result.environments[1:]]
        for here, part in zip(result.environments, np.split(result.curves["seconds"], moves)):
            place = f"{here['device']} ({here['precision']}, torch {here['torch']})"
            seconds.setdefault(place, []).append(part)
    lines = []
    for place, trained in sorted(seconds.items()):
        medians = sorted(map(np.median, trained))
        ends = dict.fromkeys(f"{median:.1f}" for median in (medians[0], medians[-1]))
        lines.append(f"{place}: {' to '.join(ends)} s, {sum(map(len, trained))} epochs")
    return lines


CURVES = {
    "validation_accuracy": "accuracy {:.1f}",
    "train_loss": "training loss {:.3f}",
    "validation_loss": "validation loss {:.3f}",
}


def distance(figure: dict, own: Results) -> str | None:
    """How far ours is from one of the report's figures, in words; None where we ran nothing of it."""
    if "bars" in figure:
        ours = {rate: own[f"dropout_{rate}"] for rate in figure["bars"] if f"dropout_{rate}" in own}
        apart = [abs(mean(found, "validation") - figure["bars"][rate]) for rate, found in ours.items()]
        return f"accuracy {np.mean(apart):.1f} over {len(apart)} of {len(figure['bars'])} rates" if apart else None
    if figure["run"] not in own:
        return None
    found = own[figure["run"]]
    parts = [
        text.format(numbers.curve_distance(figure, found, curve)) for curve, text in CURVES.items() if curve in figure
    ]
    last = np.mean([result.curves["validation_accuracy"][-1] for result in found])
    ours = {"best_validation": mean(found, "validation"), "last_validation": last, "test": mean(found, "alike")}
    for name, theirs in figure.get("printed", {}).items():
        parts.append(f"{name.replace('_', ' ')} {theirs} / {ours[name]:.1f}")
    if "parameters" in figure:
        parts.append(f"parameters {figure['parameters']:,} / {found[0].parameters['trainable']:,}")
    if "filters" in figure:
        theirs, _ = numbers.smoothness(numbers.the_report()["filters"][figure["filters"]])
        ours, count = numbers.smoothness(numbers.read_arrays(found[0])[figure["filters"]])
        parts.append(f"smoothness {theirs:.1f} / {ours:.1f} % (seed {found[0].seed}, {count} filters)")
    return "; ".join(parts) or "-"


def read_claims(root) -> list[dict]:
    """Of all questions, as they were judged last. Raises UserError where a file is damaged."""
    claims = []
    for path in sorted(root.glob("q[0-9]/claims.json")):
        try:
            for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]:
                for part in claim["parts"]:
                    _ = MARKS[part["mark"]], part["text"], interval_in_words(part)  # what is shown
                claims.append({name: claim[name] for name in ("number", "text", "note", "parts")})
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path} is damaged, or of an older version: delete it, and run that question with --replot"
            ) from error
    return claims


def overview_content(root, sample: bool, replaced: Sequence = ()) -> dict:
    """What overview.md.jinja shows: all questions, of the sample a list of its pages. Raises UserError."""
    content = {"sample": sample, "pages": [path.parent.name for path in sorted(root.glob("q[0-9]/README.md"))]}
    if sample:
        return content
    questions, claims = numbers.read_questions(root, replaced), read_claims(root)
    rows = numbers.report_rows(questions)
    content |= {"findings": read_findings(root), "rows": rows, "claims": claims}
    content["modern"] = [numbers.read_run(root / "q5" / run, replaced=replaced) for run in ("strong", "fast")]
    content["marks"] = [part["mark"] for claim in claims if not claim["note"] for part in claim["parts"]]
    content["noise"] = numbers.noise_alike((row.results for row in rows), "ConvNet")
    # a reading that several questions share counts once; those that stopped early stand apart
    every = [result for results in questions.values() for result in chain(*results.values())]
    readings = {(r.training(), r.settings["epochs"], r.seed): r for r in every if not r.settings["patience"]}
    content |= {"readings": list(readings.values()), "stopped": [r for r in every if r.settings["patience"]]}
    return content | question_3_content(questions["q3"])


def question_3_content(q3: Results) -> dict:
    """Question 3's runs; what the report's validation adds to those with an augmentation; the best three of them."""
    augmented = {run: found for run, found in q3.items() if "augmented_validation_accuracy" in found[0].curves}
    added = sorted((mean(found, "augmentation_adds"), run) for run, found in augmented.items())
    top = sorted(augmented.values(), key=lambda found: mean(found, "test"), reverse=True)[:3]
    apart = difference(*top[:2], "test", numbers.steady_noise(q3.values(), "test")) if len(top) > 1 else None
    after_pool = [run.removeprefix("dropout_after_pool_") for run in q3 if run.startswith("dropout_after_pool_")]
    rates = [rate for rate in after_pool if f"dropout_{rate}" in q3]
    return {"q3": q3, "rates": rates, "augmented": added, "top": top, "apart": apart}
