"""Figures: of every run beside the report's curves, the overview, and the pieces that questions draw theirs with."""

import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from common import CLASSES, visualize_filters
from parts.machine import UserError, write_atomic
from report.claims import MARKS
from report.numbers import ReportRow, Result, figures_of, measure, name_of, read_arrays, the_report, values

MADE_BY = "Written by the question scripts"  # in every page and picture: no others are ever replaced
GREYS = ("0.4", "0.7")  # of the report's curves: it shows some runs twice
COLORS = {"holds": "tab:green", "does not hold": "tab:red", "inside": "tab:green", "outside": "tab:red"}  # else grey


def plain_style():
    """matplotlib's own defaults, whatever the user's matplotlibrc says: figures are the same for everyone."""
    return matplotlib.style.context({"svg.hashsalt": MADE_BY}, after_reset=True)


def require_ours(path: Path) -> None:
    """Raises UserError where there is a file that these scripts did not write."""
    if path.exists() and MADE_BY.encode() not in path.read_bytes():
        raise UserError(f"{path} was not written by these scripts: move it away, or choose another --output-dir")


def write_ours(path: Path, data: bytes) -> None:
    require_ours(path)
    write_atomic(path, data)


def save_figure(figure: Figure, path: Path, also: str | None = None, stamp: str = "") -> None:
    """As PNG, and in the format `also`. stamp: what it is drawn from (see `is_drawn`)."""
    note = f"{MADE_BY} {stamp}."
    metadata = {
        "png": {"Software": None, "Comment": note},
        "pdf": {"Creator": note, "CreationDate": None, "Producer": None},
        "svg": {"Creator": note, "Date": None},
    }
    for kind in ("png", also) if also else ("png",):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=110, bbox_inches="tight", metadata=metadata[kind])
        write_ours(path.with_suffix(f".{kind}"), buffer.getvalue())


def stamp_of(found: Iterable[Result]) -> str:
    """Of a picture that is drawn from these."""
    return "-".join(result.digest for result in found)


def is_drawn(path: Path, stamp: str) -> bool:
    """Is the picture there, and drawn from what has this stamp?"""
    return path.exists() and f"{MADE_BY} {stamp}.".encode() in path.read_bytes()


def title(result: Result, text: str) -> str:
    """Heading of a figure. Those of the sample say so."""
    return f"{'SAMPLE (not all of CIFAR-10): ' if result.is_sample else ''}question {result.question[1:2]}: {text}"


def style_axes(axes, ylabel: str, xlabel: str = "epoch") -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)


def new_axes(result: Result, text: str, ylabel: str):
    """A figure with one set of axes over epochs, headed by `title`; returns both."""
    figure = Figure(figsize=(7.5, 4.5))
    axes = figure.add_subplot(title=textwrap.fill(title(result, text), 64))
    style_axes(axes, ylabel)
    return figure, axes


def new_panels(result: Result, text: str, ylabels: tuple[str, str], xlabel: str = "epoch"):
    """A figure with two panels, headed by `title`; returns it and both axes."""
    figure, panels = new_grid(1, 2, (7, 4.8))
    for axes, ylabel in zip(panels, ylabels):
        style_axes(axes, ylabel, xlabel)
    figure.suptitle(title(result, text))
    return figure, panels


def new_grid(rows: int, columns: int, size: tuple[float, float], **options):
    """A figure of rows x columns panels of this size (inches); returns it and the axes, row by row."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows))
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()


def shades(count: int) -> np.ndarray:
    """Colours for an ordered family of curves, [count, 4]."""
    return matplotlib.colormaps["turbo"](np.linspace(0, 0.95, count))


def plot_curve(axes, found: Sequence[Result], curve: str, label: str | None, **style) -> None:
    """Over epochs: the mean over seeds; of several, a band of one standard deviation too.

    Seeds that early stopping ended after different epochs have a line each. A single epoch is a dot.
    """
    if len({result.epochs for result in found}) > 1:
        for result in found:
            plot_curve(axes, [result], curve, label if result is found[0] else None, **style)
        return
    curves = np.array([result.curves[curve] for result in found])  # [seeds, epochs]
    epochs, mean = np.arange(1, found[0].epochs + 1), curves.mean(0)
    (line,) = axes.plot(epochs, mean, label=label, marker="o" if len(epochs) == 1 else None, **style)
    if len(found) > 1:
        deviation = curves.std(0, ddof=1)
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)


def plot_reports_curves(axes, result: Result, styles: dict[str, str]) -> None:
    """The report's curves of a run, unobtrusive; none beside the sample. styles: curve -> line style."""
    if result.is_sample:
        return
    drawn = [figure for figure in figures_of(result.run) if styles.keys() & figure.keys()]
    for figure, grey in zip(drawn, GREYS):
        for curve in [curve for curve in styles if curve in figure]:
            label = f"report, Figure {figure['figure']}"
            if len(styles) > 1:
                label += ": training" if curve == "train_loss" else ": validation"
            epochs = range(1, len(figure[curve]) + 1)
            axes.plot(epochs, figure[curve], color=grey, linewidth=1, linestyle=styles[curve], label=label)


def plot_loss_curves(axes, found: Sequence[Result]) -> None:
    """All losses of a run, and the report's."""
    plot_curve(axes, found, "train_loss", "training", color="tab:blue")
    plot_curve(axes, found, "validation_loss", "validation", color="tab:orange")
    plot_augmented(axes, found, "augmented_validation_loss")
    plot_reports_curves(axes, found[0], {"train_loss": "-", "validation_loss": "--"})


def plot_augmented(axes, found: Sequence[Result], curve: str) -> None:
    """Validation on augmented images, where one of the report's questions has it."""
    if found[0].question in the_report()["numbers"] and curve in found[0].curves:
        label = "validation, augmented as in the report"
        plot_curve(axes, found, curve, label, color="tab:orange", linestyle=":")


def plot_losses(found: Sequence[Result]) -> Figure:
    """Training and validation loss over epochs, all seeds, beside the report's curves."""
    figure, axes = new_axes(found[0], f"{name_of(found[0].run)}, loss", "cross entropy")
    plot_loss_curves(axes, found)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def plot_accuracy(found: Sequence[Result]) -> Figure:
    """Validation accuracy over epochs, every seed's best epoch marked, beside the report's curves."""
    figure, axes = new_axes(found[0], f"{name_of(found[0].run)}, validation accuracy", "accuracy (%)")
    plot_curve(axes, found, "validation_accuracy", "validation", color="tab:orange")
    plot_augmented(axes, found, "augmented_validation_accuracy")
    for result in found:
        best, value = result.best_epoch, measure(result, "validation")
        axes.plot(best, value, "o", color="tab:red", label=f"seed {result.seed}: best {value:.1f} %, epoch {best}")
    plot_reports_curves(axes, found[0], {"validation_accuracy": "--"})
    axes.legend(fontsize=8)
    return figure


def plot_confusion(found: Sequence[Result]) -> Figure:
    """Confusion matrix of the result's weights on all test images, summed over seeds; percent of the true class."""
    counts = sum(result.confusion[result.chosen_weights] for result in found)
    percent = 100 * counts / counts.sum(1, keepdims=True)
    heading = title(found[0], f"{name_of(found[0].run)}, test confusion (% of the true class)")
    figure = Figure(figsize=(7, 6))
    axes = figure.add_subplot(title=textwrap.fill(heading, 64), xlabel="predicted", ylabel="true")
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(10), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), CLASSES)
    for (row, column), value in np.ndenumerate(percent):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else "black")
    return figure


def plot_filters(found: Sequence[Result]) -> Figure:
    """The first seed's filters before training and at its last epoch, on one scale, above the report's."""
    first, arrays = found[0], read_arrays(found[0])
    scale = float(np.quantile(np.abs([arrays["before"], arrays["last"]]), 0.998))
    colours = f"(grey = 0, full colour = ±{scale:.2f})"
    panels = {f"before training {colours}": arrays["before"], f"after {first.epochs} epochs {colours}": arrays["last"]}
    for figure in [] if first.is_sample else figures_of(first.run):
        if "filters" in figure:
            ours, theirs = arrays[figure["filters"]], the_report()["filters"][figure["filters"]]
            name = f"report, Figure {figure['figure']} (known up to a factor: drawn with our standard deviation)"
            panels[name] = theirs * ours.std() / theirs.std()
    heading = title(first, f"{name_of(first.run)}, first-layer filters, seed {first.seed}")
    return visualize_filters(panels, heading, scale)


RUN_FIGURES = {"losses": plot_losses, "accuracy": plot_accuracy, "filters": plot_filters, "confusion": plot_confusion}


def draw_run(found: Sequence[Result], also: str | None, anew: bool) -> None:
    """RUN_FIGURES of one run, beside its results; of those that are drawn already only with `anew`."""
    for name, plot in RUN_FIGURES.items():
        shown = found[:1] if plot is plot_filters else found
        stamp = stamp_of(shown)
        path = found[0].path.with_name(f"{name}.png")
        kinds = ("png", also) if also else ("png",)
        if anew or not all(is_drawn(path.with_suffix(f".{kind}"), stamp) for kind in kinds):
            save_figure(plot(shown), path, also, stamp)


SCALE = (0, 60, 100), (0, 0.27, 1)  # percent, and how far to the right of the overview they are


def plot_overview(rows: Sequence[ReportRow]) -> Figure:
    """A line per test accuracy of the report: its number, ours measured alike, where one more of ours would fall."""
    lines = {}  # headings and rows, from top to bottom
    for row in rows:
        part = ": dropout" if row.run.startswith("dropout") else ": augmentation"
        heading = f"question {row.question[1:]}" + (part if row.question == "q3" else "")
        lines |= {heading: None, name_of(row.run): row}
    figure = Figure(figsize=(9.6, 0.255 * len(lines) + 1.2))
    axes = figure.add_subplot(xlabel=f"test accuracy (%); the scale changes at {SCALE[0][1]}")
    axes.set_xscale("function", functions=(lambda x: np.interp(x, *SCALE), lambda y: np.interp(y, *SCALE[::-1])))
    axes.set(xlim=SCALE[0][::2], ylim=(len(lines) - 0.4, -0.6), xticks=(0, 20, 40, *range(60, 100, 5)))
    axes.set_yticks(range(len(lines)), lines)
    axes.axvline(SCALE[0][1], color="0.5", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    for place, (label, row) in enumerate(zip(axes.get_yticklabels(), lines.values())):
        if row:
            plot_row(axes, place, row)
        else:
            axes.axhspan(place - 0.5, place + 0.5, color="0.95", linewidth=0)
            label.set_fontweight("bold")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.89)}
    figure.legend(unique.values(), unique.keys(), **above, ncols=2, frameon=False)
    return figure


def plot_row(axes, place: int, row: ReportRow) -> None:
    alike = values(row.results, "alike")
    if row.half is not None:
        label, left = "where one more seed of ours would fall (95 %)", alike.mean() - row.half
        axes.barh(place, 2 * row.half, 0.55, left=left, color="tab:blue", alpha=0.22, linewidth=0, label=label)
    label = "ours, measured as the report does, a dot per seed"
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.7, "zorder": 3}  # apart where they overlap
    axes.plot(alike, [place] * len(alike), "o", color="tab:blue", markersize=6.5, **edge, label=label)
    if row.results:
        label, test = "ours, best weights, all 10,000 test images, mean", values(row.results, "test").mean()
        axes.plot(test, place, "|", color="tab:orange", markersize=12, markeredgewidth=2, label=label)
    axes.plot(row.reported, place, "x", color="black", markersize=10, markeredgewidth=2, label="the report")
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9}
    axes.text(1.01, place, row.verdict, color=COLORS.get(row.verdict, "0.5"), **beside)


def plot_claims(claims: Sequence[dict]) -> Figure:
    """The report's claims, each with the marks of its parts."""
    texts = [textwrap.wrap(f"{claim['text']} {claim['note']}", 98) for claim in claims]
    places = np.cumsum([0, *(0.78 * len(text) + 0.5 for text in texts)])
    figure = Figure(figsize=(9.6, 0.21 * places[-1] + 0.5))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(places[-1] + 0.2, -1.3))
    axes.axis("off")
    axes.text(0.04, -1, "The report's claims", va="center", fontweight="bold")
    key = ", ".join(f"{sign} {mark}" for mark, sign in MARKS.items())
    axes.text(0.98, -1, f"each part by its 95 % interval: {key}", ha="right", va="center", fontsize=8, color="0.35")
    for claim, text, place in zip(claims, texts, places):
        axes.text(0.03, place, claim["number"], ha="right", va="top", fontsize=9, fontweight="bold")
        grey = "0.5" if claim["note"] else "black"  # not quite the report's
        axes.text(0.04, place, "\n".join(text), va="top", fontsize=9, linespacing=1.25, color=grey)
        for i, part in enumerate(claim["parts"]):
            color = COLORS.get(part["mark"], "0.55")
            x = 0.775 + 0.0235 * i
            axes.text(x, place, MARKS[part["mark"]], va="top", fontsize=11, color=color, fontweight="bold")
    return figure
