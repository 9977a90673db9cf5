"""The pages: results/README.md and results/q*/README.md, from the JSON files in results/ alone.

    results/q3/crop/seed0.json -> its figures -> results/q3/README.md and claims.json -> results/README.md, overview.png

What is the same for everyone stands in the templates beside this file; what we found, in results/q*/findings.md.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from scipy.stats import binomtest

from common import ROOT, Run, output_folder, seeds_of
from parts.machine import UserError, file_lock, rank, require_writable, say, tell
from report.claims import MARKS, Claim, judge_claims
from report.figures import (
    MADE_BY,
    RUN_FIGURES,
    Figure,
    draw_run,
    plain_style,
    plot_claims,
    plot_overview,
    require_ours,
    save_figure,
    write_ours,
)
from report.numbers import (
    HERE,
    ReportRow,
    Result,
    Results,
    curve_distance,
    difference,
    figures_of,
    mean,
    measure,
    name_of,
    read_arrays,
    read_question,
    read_run,
    report_filters,
    report_rows,
    reported,
    smoothness,
    steady_noise,
    the_report,
    values,
)


@dataclass(frozen=True)
class Question:
    """What a script declares of its question."""

    name: str  # "q1"
    title: str
    runs: Sequence[Run]
    claims: Sequence[Claim] = ()
    figures: Callable[[Results], dict[str, Figure]] = lambda results: {}  # of all runs, by file name
    baselines: Sequence[str] = ()  # a run is compared with the first of these that is read at as many epochs
    beside: tuple[str, ...] = ()  # runs of other questions that the figures and claims want: "q1/convnet"

    @property
    def script(self) -> str:
        return next(path.name for path in ROOT.glob(f"{self.name[:2]}_*.py"))


# ------------------------------------------------------------------------------------------------------------ writing


def check_report(question: Question, args: argparse.Namespace) -> None:
    """Before the training: what would fail after it. Raises UserError."""
    if args.list:
        return
    root = output_folder(args)
    folder = root / question.name
    the_report(), report_filters()
    pages = [
        root / "README.md",
        root / "overview.png",
        root / "claims.png",
        folder / "README.md",
        folder / "claims.json",
    ]
    for path in [*pages, *(folder / run.name / f"{name}.png" for run in question.runs for name in RUN_FIGURES)]:
        require_ours(path)
    replaced = set() if args.replot else {f"seed{seed}.json" for seed in seeds_of(args)}
    own = read_question(folder, question.runs, args.sample, replaced)
    for result in (result for found in own.values() for result in found if result.path.name not in replaced):
        read_arrays(result)
    read_beside(root, question)
    if not args.sample:
        report_rows(root)
        read_claims(root)
    for path in (root, folder):
        require_writable(path)


def update_report(question: Question, args: argparse.Namespace, run: Run) -> None:
    """After a training of a sweep: its figures, and the pages. What goes wrong is said, and does not end the sweep."""
    try:
        write_report(question, args)
    except (UserError, OSError) as error:
        tell(f"{run.name} is trained and its result written, but not all pictures and pages: {error}")


def finish_report(question: Question, args: argparse.Namespace) -> None:
    """At the end: figures and pages, and what there is on the screen. Raises UserError."""
    if rank() == 0 and not args.list:
        own = write_report(question, args, anew=args.replot)
        show(question, own, args)


def write_report(question: Question, args: argparse.Namespace, anew: bool = False) -> Results:
    """All figures and pages that a question's results change. anew: figures too that are drawn already."""
    root = output_folder(args)
    folder = root / question.name
    with file_lock(root / ".page.lock"), plain_style():
        own = read_question(folder, question.runs, args.sample)
        results = own | read_beside(root, question)
        for found in own.values():
            draw_run(found, args.figures, anew)
        drawings = question.figures(results) if own else {}
        for name, figure in drawings.items():
            save_figure(figure, folder / name, args.figures)
        claims = [] if args.sample else judge_claims(question.claims, results)
        if claims:
            content = {"made_by": MADE_BY, "claims": claims}
            write_ours(folder / "claims.json", (json.dumps(content, indent=1) + "\n").encode())
        write_page(
            folder / "README.md", "question.md.jinja", question_page(question, own, results, claims, drawings, args)
        )
        write_overview(root, args)
    return own


def write_page(path: Path, template: str, content: dict) -> None:
    """Of a template; blank lines that blocks leave behind are dropped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "−")
    environment.filters["format_thousands"] = lambda value: f"{value:,}"
    text = environment.get_template(template).render(**content, MADE_BY=MADE_BY, MARKS=MARKS, name_of=name_of)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    write_ours(path, (text.strip() + "\n").encode())


def read_beside(root: Path, question: Question) -> Results:
    found = {path.split("/")[1]: read_run(root / path) for path in question.beside}
    return {run: results for run, results in found.items() if results}


def show(question: Question, own: Results, args: argparse.Namespace) -> None:
    """The table, and unless it is the sample the claims, on the screen."""
    folder = output_folder(args) / question.name
    results = own | read_beside(folder.parent, question)
    head, *rows = run_table(question, own, args.sample, results)
    table = [head, *([row[0].split("]")[0].lstrip("["), *row[1:]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    say("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table) + "\n")
    for claim in [] if args.sample else judge_claims(question.claims, results):
        say(f"claim {claim['number']}: {claim['text']}")
        for part in claim["parts"]:
            say(f"  {part['mark']}: {part['text']} {interval_in_words(part)}".rstrip())
    say(f"\nfigures and numbers: {folder}/, page: {folder / 'README.md'}")


# ----------------------------------------------------------------------------------------------------- question's page


def question_page(
    question: Question, own: Results, results: Results, claims: list[dict], drawings: dict, args: argparse.Namespace
) -> dict:
    """What question.md.jinja shows."""
    findings = output_folder(args) / question.name / "findings.md"
    shown = [] if args.sample else the_report()["figures"]
    table = run_table(question, own, args.sample, results)
    stand_ins = {r[0].settings["weights"] for r in own.values() if " sha256:" in r[0].settings["weights"]}
    return {
        "question": question,
        "sample": args.sample,
        "findings": findings.read_text(encoding="utf-8").strip() if findings.exists() else "",
        "figures": list(drawings) or [f"{run}/{name}.png" for run in own for name in RUN_FIGURES],
        "table_head": table[0],
        "table_rows": table[1:],
        "starred": any("*" in row[3] for row in table if not args.sample),
        "claims": [
            claim | {"parts": [part | {"words": interval_in_words(part)} for part in claim["parts"]]}
            for claim in claims
        ],
        "report_figures": [figure_row(figure, own) for figure in shown if figure["question"] == question.name],
        "layers": next(iter(own.values()))[0].parameters if own else None,
        "machines": machines(own),
        "stand_ins": sorted(stand_ins),
        "noise": steady_noise(results.values(), "test"),
        "run_figures": list(RUN_FIGURES),
        "by_parts": [
            name_of(run) for run, found in own.items() if any("batch_norm" in e for r in found for e in r.environments)
        ],
    }


def with_deviation(found: Sequence[Result], what: str, digits: int = 2) -> str:
    """ "80.70", or with several seeds "80.70 ± 0.31" (standard deviation)."""
    text = f"{mean(found, what):.{digits}f}"
    return text if len(found) == 1 else f"{text} ± {values(found, what).std(ddof=1):.{digits}f}"


def run_table(question: Question, own: Results, sample: bool, results: Results | None = None) -> list[list[str]]:
    """A head, and a row per run: the report's numbers beside ours, measured alike, then what we would report.

    results: the question's own, and those beside them: all tell how far seeds lie apart.
    """
    head = [
        "run",
        "best epoch of each seed",
        "test as the report: report / ours",
        "validation as the report: report / ours",
    ]
    head += ["ours: test", "validation", "test − baseline", "from the report's curve", "gap"]
    noise, rows = steady_noise((results or own).values(), "test"), []
    for run in dict.fromkeys([*(run.name for run in question.runs), *own]):
        printed = {} if sample else reported(question.name, run)
        theirs = [str(printed.get("test", "-")), validation_of_the_report(run, printed)]
        if not (found := own.get(run)):
            if not sample:
                rows.append([name_of(run), "not run", f"{theirs[0]} / -", f"{theirs[1]} / -", *["-"] * 5])
            continue
        seeds = ", ".join(f"{result.best_epoch}/{result.epochs}" for result in found)
        if [result.seed for result in found] != [*range(len(found))]:
            seeds += f" (seed {', '.join(str(result.seed) for result in found)})"
        if len(precisions := {result.settings["precision"] for result in found}) > 1:
            seeds += f" ({', '.join(sorted(precisions))})"
        baseline = baseline_of(question, found, own)
        against = difference(found, own[baseline], "test", noise) if baseline else None
        apart = [curve_distance(figure, found, "validation_accuracy") for figure in figures_of(run)]
        apart = [value for value in apart if value is not None and not sample]
        rows.append(
            [
                f"[{name_of(run)}]({run}/)",
                seeds,
                f"{theirs[0]} / {with_deviation(found, 'alike', 1)}",
                f"{theirs[1]} / {with_deviation(found, 'alike_validation', 1)}",
                with_deviation(found, "test"),
                with_deviation(found, "validation"),
                in_words(against.value, against.half) if against else "-",
                f"{min(apart):.1f}" if apart else "-",
                f"{mean(found, 'gap'):+.3f}".replace("-", "−"),
            ]
        )
    if sample:  # without the report's columns
        return [[*row[:2], *row[4:7], row[8]] for row in (head, *rows)]
    return [head, *rows]


def validation_of_the_report(run: str, printed: dict) -> str:
    """What its text prints; else, with a star, the best that its figure shows. "-" where there is neither."""
    if "validation" in printed or not printed:
        return str(printed.get("validation", "-"))
    drawn = [max(figure["validation_accuracy"]) for figure in figures_of(run) if "validation_accuracy" in figure]
    return f"{drawn[-1]:.1f}*" if drawn else "-"


def baseline_of(question: Question, found: Sequence[Result], own: Results) -> str | None:
    if found[0].run in question.baselines:
        return None
    same = [
        run
        for run in question.baselines
        if run in own and own[run][0].settings["epochs"] == found[0].settings["epochs"]
    ]
    return same[0] if same else None


def in_words(value: float, half: float | None, digits: int = 2) -> str:
    """+1.91 ± 1.58"""
    text = f"{value:+.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
    return text.replace("-", "−")


def interval_in_words(part: dict) -> str:
    """A judged part's difference; empty where nothing was run."""
    if "difference" not in part:
        return ""
    text = in_words(part["difference"], part["half"], 3 if part["unit"] == "in loss" else 2)
    return f"{text} {part['unit']}".replace(" %", " %")


def machines(own: Results) -> list[str]:
    """Where the question's epochs were trained, and how long one took."""
    seconds: dict[str, list[float]] = {}
    for result in (result for found in own.values() for result in found):
        starts = [e["from_epoch"] for e in result.environments]
        for here, start, end in zip(result.environments, starts, [*starts[1:], result.epochs + 1]):
            place = f"{here['device']} ({here['precision']}, torch {here['torch']})"
            seconds.setdefault(place, []).extend(result.curves["seconds"][start - 1 : end - 1])
    return [
        f"{place}: {statistics.median(found):.1f} s, {len(found)} epochs" for place, found in sorted(seconds.items())
    ]


def figure_row(figure: dict, own: Results) -> dict:
    """One of the report's figures: what it shows, ours, and how far ours is from it."""
    runs = [f"dropout_{rate}" for rate in figure["bars"]] if "bars" in figure else [figure["run"]]
    there = [run for run in runs if run in own]
    remark = f" ({figure['remark']})" if "remark" in figure else ""
    ours = " ".join(f"[{kind}]({path})" for kind, path in figure["ours"].items()) if there else "not run"
    apart = bars_distance(figure, own) if "bars" in figure else distances(figure, own[there[0]]) if there else "-"
    return {"figure": figure["figure"], "shows": figure["shows"] + remark, "ours": ours, "apart": apart or "-"}


def distances(figure: dict, found: list[Result]) -> str:
    """How far ours is, in words; empty where there is nothing to compare."""
    parts = []
    if (points := curve_distance(figure, found, "validation_accuracy")) is not None:
        parts.append(f"accuracy {points:.1f}")
    for curve, short in (("train_loss", "training loss"), ("validation_loss", "validation loss")):
        if (apart := curve_distance(figure, found, curve)) is not None:
            parts.append(f"{short} {apart:.3f}")
    last = np.mean([result.curves["validation_accuracy"][-1] for result in found])
    ours = {"best_validation": mean(found, "validation"), "last_validation": last, "test": mean(found, "alike")}
    parts += [
        f"{name.replace('_', ' ')} {theirs} / {ours[name]:.1f}" for name, theirs in figure.get("printed", {}).items()
    ]
    if "parameters" in figure:
        parts.append(f"parameters {figure['parameters']:,} / {found[0].parameters['trainable']:,}")
    if "filters" in figure:
        theirs, _ = smoothness(report_filters()[figure["filters"]])
        ours, count = smoothness(read_arrays(found[0])[figure["filters"]])
        parts.append(f"smoothness {theirs:.1f} / {ours:.1f} % (seed {found[0].seed}, {count} filters)")
    return "; ".join(parts)


def bars_distance(figure: dict, own: Results) -> str:
    """Mean absolute difference of the best validation accuracies, over the rates there are."""
    ours = {rate: own[f"dropout_{rate}"] for rate in figure["bars"] if f"dropout_{rate}" in own}
    apart = [abs(mean(found, "validation") - figure["bars"][rate]) for rate, found in ours.items()]
    return f"accuracy {statistics.mean(apart):.1f} over {len(apart)} of {len(figure['bars'])} rates" if apart else "-"


# ------------------------------------------------------------------------------------------------------------ overview


def read_claims(root: Path) -> list[dict]:
    """Of all questions, as they were judged last. Raises UserError where a file is damaged."""
    claims = []
    for path in sorted(root.glob("q[0-9]/claims.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["claims"]
            for claim in found:
                claim["number"] + 0, claim["text"] + claim["note"], [MARKS[part["mark"]] for part in claim["parts"]]
            claims += found
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: delete it, and run that question with --replot") from error
    return claims


def write_overview(root: Path, args: argparse.Namespace) -> None:
    """README.md of all questions, and its pictures; of the sample a list of its pages."""
    pages = [path.parent.name for path in sorted(root.glob("q[0-9]/README.md"))]
    content = {"sample": args.sample, "pages": pages}
    if not args.sample:
        rows, claims = report_rows(root), read_claims(root)
        save_figure(plot_overview(rows), root / "overview.png", args.figures)
        if claims:
            save_figure(plot_claims(claims), root / "claims.png", args.figures)
        trained = {
            f"{q}/{path.name}": read_run(path) for q in the_report()["numbers"] for path in sorted(root.glob(f"{q}/*/"))
        }
        trained = {run: found for run, found in trained.items() if found and found[0].run == run.split("/")[1]}
        for claim in claims:
            shown = [part for i, part in enumerate(claim["parts"]) if i == 0 or part["mark"] == "reversed"]
            claim["measured"] = "; ".join(
                f"{MARKS[p['mark']]} {p['text']} {interval_in_words(p)}".strip() for p in shown
            )
        content |= {
            "claims": claims,
            "tally": tally(claims),
            **headline(rows),
            **habits(trained),
            "best": read_run(root / "q5" / "strong"),
        }
        content |= {"mean": mean, "with_deviation": with_deviation}
    write_page(root / "README.md", "overview.md.jinja", content)


def tally(claims: list[dict]) -> str:
    """Which claims hold with all their parts, which have reversed ones, and which are open; without the stand-in's."""
    marks = {
        claim["number"]: {part["mark"] for part in claim["parts"]} for claim in reversed(claims)
    }  # the first counts
    hold = [number for number, found in sorted(marks.items()) if found == {"holds"}]
    turned = [number for number, found in sorted(marks.items()) if "reversed" in found]
    not_run = [number for number, found in sorted(marks.items()) if found == {"not run"}]
    for_the_eye = [number for number, found in sorted(marks.items()) if found == {"for the eye"}]
    rest = [number for number in sorted(marks) if number not in {*hold, *turned, *not_run, *for_the_eye}]
    groups = {"hold": hold, "open in some part": rest, "reversed in some part": turned, "not run": not_run}
    groups["for the eye"] = for_the_eye
    return "; ".join(f"{name}: {', '.join(map(str, numbers))}" for name, numbers in groups.items() if numbers)


def headline(rows: Sequence[ReportRow]) -> dict:
    """Which of the report's numbers could be one more seed of ours, and why the others cannot be told."""
    steady = [row for row in rows if row.results and row.results[0].is_steady and row.inside is not None]
    unsteady = [row for row in rows if row.results and not row.results[0].is_steady and row.inside is not None]
    alike = [row.results for row in rows if row.results and row.results[0].settings["network"] == "ConvNet"]
    return {
        "rows": rows,
        "steady": steady,
        "widths": [(row.interval[1] - row.interval[0]) / 2 for row in steady],
        "unsteady": unsteady,
        "outside": [row for row in rows if row.inside is False],
        "few": [row for row in rows if row.results and row.inside is None],
        "missing": [row for row in rows if not row.results],
        "noise": steady_noise(alike, "alike", by_epochs=False),
    }


def habits(trained: Results) -> dict:
    """What the report's ways of measuring are worth, from all trainings of its questions, each read once."""
    once = {
        (r.training(), r.settings["epochs"], r.seed): r
        for found in trained.values()
        for r in found
        if not r.settings["patience"]
    }
    restored = [r.tests["best", "all_images"] - r.tests["last", "all_images"] for r in once.values()]
    fewer = [r.tests["last", "report_images"] - r.tests["last", "all_images"] for r in once.values()]
    augmented = {
        run.split("/")[1]: mean(found, "alike_validation") - mean(found, "validation")
        for run, found in trained.items()
        if "augmented_validation_accuracy" in found[0].curves and run.startswith("q3/")
    }
    stopped = [r for found in trained.values() for r in found if r.settings["patience"]]
    unrestored = [r.tests["best", "all_images"] - r.tests["last", "all_images"] for r in stopped]
    pooling = [
        (rate, trained[f"q3/dropout_after_pool_{rate}"], trained[f"q3/dropout_{rate}"])
        for rate in ("0.5", "0.6")
        if f"q3/dropout_after_pool_{rate}" in trained and f"q3/dropout_{rate}" in trained
    ]
    wilson = binomtest(800, 1000).proportion_ci(method="wilson")
    return {
        "trainings": len(once),
        "restored": restored,
        "fewer": fewer,
        "median": statistics.median,
        "augmented": sorted(augmented.items(), key=lambda item: item[1]),
        "unrestored": unrestored,
        "pooling": pooling,
        "on_1000": 50 * float(wilson.high - wilson.low),
        "measure": measure,
    }
