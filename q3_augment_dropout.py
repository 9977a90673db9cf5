"""Question 3: augmentation and dropout.

    python q3_augment_dropout.py                                 # the baselines and all runs
    python q3_augment_dropout.py --only crop_flip dropout_0.1    # some of them
    python q3_augment_dropout.py --sample --only flip_p0.5       # minutes, the bundled images
    python q3_augment_dropout.py --preview                       # look at what every augmentation does, train nothing
    python q3_augment_dropout.py --dropout 0.05 --only dropout_0.05    # a further dropout rate, alone

The report: crop + flip (84.6 %) and the full mixture (83.0 %) are among the best augmentations (flips of p = 0.7 have
83.8 %); dropout of 0.1 to 0.3 helps a little, 0.2 is the one to pick, and 0.6 ruins the network (51.6 %).

The baseline is question 1's network, read after 30 epochs and, beside dropout, after 20. The report's
code drops units before the pooling; two runs of ours, `dropout_after_pool`, drop them at the usual place.
What we found: results/q3/README.md
"""

import argparse
import re
import textwrap
from collections.abc import Sequence

from torch import Tensor

import report.figures as fig
from common import Run, Settings, generator, load_sample, make_parser, output_folder, select_runs, train_runs
from parts.augment import ColorJitter, GaussianBlur, Grayscale, HorizontalFlip, RandomCrop, augment
from parts.machine import UserError, require_writable, say, session
from report.claims import Claim, about_equal, better, narrowest_gap
from report.numbers import Result, Results, figures_of, mean, name_of, reported, values
from report.page import Question, check_pages, finish_pages, update_pages

CROP, FLIP, GRAY = RandomCrop(padding=4), HorizontalFlip(p=0.5), Grayscale(p=0.1)
BLUR = GaussianBlur(kernel_size=13, sigma=(0.1, 2.0), p=0.2)
JITTER = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.4)

FLIPS = (0.1, 0.3, 0.5, 0.7, 0.9)
AUGMENTATIONS = {  # run: augmentations, applied in this order
    **{f"flip_p{p}": (HorizontalFlip(p),) for p in FLIPS},
    "crop": (CROP,),
    "crop_flip": (CROP, FLIP),
    "grayscale": (Grayscale(p=0.2),),
    "crop_flip_gray": (CROP, FLIP, GRAY),
    "color_jitter": (JITTER,),
    "crop_flip_gray_blur": (CROP, FLIP, GRAY, BLUR),
    "crop_flip_gray_blur_jitter": (CROP, FLIP, JITTER, GRAY, BLUR),
}
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def dropout_run(rate: float, after_pool: bool = False) -> Run:
    name = "dropout_after_pool" if after_pool else "dropout"
    return Run(f"{name}_{rate:g}", Settings(epochs=20, dropout=rate, dropout_after_pool=after_pool))


RUNS = [
    Run("baseline", Settings(epochs=30)),
    Run("baseline_20", Settings(epochs=20)),
    *(Run(name, Settings(epochs=30, augment=augmentations)) for name, augmentations in AUGMENTATIONS.items()),
    *map(dropout_run, RATES),
    *(dropout_run(rate, after_pool=True) for rate in (0.5, 0.6)),
]

MIXTURE = "crop_flip_gray_blur_jitter"
SIMPLE = (*(f"flip_p{p}" for p in FLIPS), "crop", "grayscale", "color_jitter")
OTHERS = (*SIMPLE, "crop_flip_gray", "crop_flip_gray_blur")  # of the report's, whatever is added above

CLAIMS = [
    Claim(
        5,
        "Horizontal flipping helps, best near p=0.5 to 0.7 (judged as: each is better than the other three rates), "
        "and p=0.9 hurts.",
        (
            *(better(f"flip_p{p}", "baseline") for p in (0.5, 0.7, 0.3, 0.1)),
            *(better(f"flip_p{p}", "flip_p0.1", "flip_p0.3", "flip_p0.9") for p in (0.5, 0.7)),
            better("baseline", "flip_p0.9"),
        ),
    ),
    Claim(
        6,
        "Random crop helps; crop + flip is best of the simple ones "
        "and narrows the gap between training and validation.",
        (better("crop", "baseline"), better("crop_flip", *SIMPLE), narrowest_gap("crop_flip", "baseline")),
    ),
    Claim(
        7,
        "Grayscale alone barely helps or hurts: a little boost on validation.",
        (about_equal("grayscale", "baseline", margin=2.0), better("grayscale", "baseline", on="validation")),
    ),
    Claim(
        8,
        "The full mixture (crop, flip, gray, blur, jitter) and crop + flip are among the best augmentations "
        "(judged as: each is better than all but these two).",
        (better(MIXTURE, *OTHERS), better("crop_flip", *OTHERS)),
    ),
    Claim(
        9,
        "Dropout of 0.1 to 0.3 helps validation accuracy a little, then accuracy falls, to 51.6 % on test at 0.6; "
        "0.2 narrows the train/validation gap the most.",
        (
            *(better(f"dropout_{p}", "baseline_20", on="validation") for p in (0.1, 0.2, 0.3)),
            *(better(f"dropout_{p}", f"dropout_{q}") for p, q in ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6))),
            better("baseline_20", "dropout_0.6"),
            narrowest_gap("dropout_0.2", *(f"dropout_{p}" for p in RATES[:6] if p != 0.2)),
        ),
    ),
]


def figures(results: Results) -> dict[str, fig.Figure]:
    """Those that the available runs allow."""
    flips, rates, after_pool = (rates_of(results, prefix) for prefix in ("flip_p", "dropout_", "dropout_after_pool_"))
    drawn = {}
    if any(run in results for run in AUGMENTATIONS):
        drawn["augmentations.png"] = plot_augmentations(results)
    if flips:
        baseline = results.get("baseline")
        drawn["flip_sweep.png"] = plot_sweep(flips, "horizontal flip", "probability of a flip", baseline)
    if rates:
        drawn["dropout_validation.png"] = plot_dropout(results, rates)
        drawn["dropout_bars.png"] = plot_bars(rates)
        heading = "dropout before the pooling, and after it"
        drawn["dropout_sweep.png"] = plot_sweep(rates, heading, "dropout rate", results.get("baseline_20"), after_pool)
    return drawn


def rates_of(results: Results, prefix: str) -> dict[float, list[Result]]:
    """The results of runs named by this prefix and a rate, by rate."""
    found = {float(run.removeprefix(prefix)): results[run] for run in results if re.fullmatch(rf"{prefix}[\d.]+", run)}
    return dict(sorted(found.items()))


def plot_augmentations(results: Results) -> fig.Figure:
    """Small multiples: losses of every augmentation there is, on common axes, beside the report's."""
    runs = [run for run in ("baseline", *AUGMENTATIONS) if run in results]
    columns = min(3, len(runs))
    figure, grid = fig.new_grid(-(-len(runs) // columns), columns, (4, 3), sharex=True, sharey=True)
    legend = {}
    for axes, run in zip(grid, runs):
        fig.style_axes(axes, "cross entropy")
        fig.plot_loss_curves(axes, results[run])
        axes.set_title(f"{name_of(run)}: test {mean(results[run], 'test'):.1f} %", fontsize=10)
        axes.tick_params(labelbottom=True)
        for line, label in zip(*axes.get_legend_handles_labels()):
            legend[re.sub(r", Figure \d+", "", label)] = line
    grid[0].set_ylim(bottom=0)  # of all: the axes are common
    figure.legend(legend.values(), legend.keys(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False)
    for axes in grid[len(runs) :]:
        axes.axis("off")
    figure.suptitle(fig.title(results[runs[0]][0], "augmentations (test accuracy: best weights, all images)"), y=1)
    figure.tight_layout()
    return figure


def plot_dropout(results: Results, rates: dict[float, list[Result]]) -> fig.Figure:
    """Validation accuracy over epochs for all dropout rates: the report's Figures 27 to 29 in one."""
    figure, axes = fig.new_axes(rates[min(rates)][0], "dropout before the pooling", "validation accuracy (%)")
    runs = {0.0: results["baseline_20"]} | rates if "baseline_20" in results else rates
    for (p, found), color in zip(runs.items(), fig.shades(len(runs))):
        label = f"{p:g} (loss gap {mean(found, 'gap'):+.2f})"
        fig.plot_curve(axes, found, "validation_accuracy", label, color=color)
    axes.legend(title="dropout", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def plot_bars(rates: dict[float, list[Result]]) -> fig.Figure:
    """The report's Figure 30: best validation accuracy of every rate, as bars."""
    first = rates[min(rates)][0]
    figure, axes = fig.new_axes(first, "dropout before the pooling", "best validation accuracy (%)")
    ours = {p: mean(found, "validation") for p, found in rates.items()}
    axes.bar([p - 0.018 for p in ours], list(ours.values()), width=0.035, label="ours: mean, and a dot per seed")
    plot_seeds(axes, rates, "validation", "tab:cyan", -0.018)
    for theirs in [] if first.is_sample else figures_of("dropout"):
        bars = {float(p): value for p, value in theirs["bars"].items()}
        axes.bar([p + 0.018 for p in bars], list(bars.values()), width=0.035, color="0.6", label="report, Figure 30")
    axes.set(xlabel="dropout rate", xticks=list(RATES))
    axes.legend()
    return figure


def plot_sweep(runs: dict[float, list[Result]], heading: str, xlabel: str, baseline, after_pool=None) -> fig.Figure:
    """Over a rate: test accuracy on all images, a dot per seed, beside the report's numbers and ours measured as those,
    the baseline and the runs that drop units after the pooling; and the gap between the losses.
    """
    first = runs[min(runs)][0]
    ylabels = ("test accuracy (%)", "loss gap in the last epoch, augmented alike:\nvalidation − training")
    figure, panels = fig.new_panels(first, heading, ylabels, xlabel)
    for axes, what, of in zip(panels, ("test", "gap"), (", best weights, all images: a dot per seed", "")):
        plot_rates(axes, runs, what, color="tab:blue", label=f"ours{of}")
        if after_pool:
            plot_rates(axes, after_pool, what, color="tab:orange", label=f"ours, after the pooling{of}")
        if what == "test" and not first.is_sample:
            plot_as_the_report(axes, runs)
        if baseline:
            value, digits = mean(baseline, what), 1 if what == "test" else 2
            label = f"our {name_of(baseline[0].run)}: {value:.{digits}f}"
            axes.axhline(value, color="tab:green", linestyle=":", label=label)
        axes.xaxis.get_major_locator().set_params(integer=False)
        rates = runs.keys() | (after_pool or {}).keys()
        axes.set_xlim(min(rates) - 0.05, max(rates) + 0.05)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    return figure


def plot_rates(axes, runs: dict[float, list[Result]], what: str, **style) -> None:
    """A measure over a rate: the means as a line, and the seeds."""
    axes.plot(list(runs), [mean(found, what) for found in runs.values()], "-", **style)
    plot_seeds(axes, runs, what, style["color"])


def plot_seeds(axes, runs: dict[float, list[Result]], what: str, color: str, shift: float = 0.0) -> None:
    """A dot per seed."""
    for x, found in runs.items():
        seeds = values(found, what)
        axes.plot([x + shift] * len(seeds), seeds, "o", color=color, markersize=4)


def plot_as_the_report(axes, runs: dict[float, list[Result]]) -> None:
    """The test accuracies that it prints, and ours measured as those."""
    printed = {x: reported("q3", found[0].run) for x, found in runs.items()}
    theirs = {x: numbers["test"] for x, numbers in printed.items() if "test" in numbers}
    ours = {x: mean(runs[x], "alike") for x in theirs}
    for name, points, marker, color in (("report", theirs, "x", "black"), ("our means", ours, "+", "tab:blue")):
        label = f"{name}, last weights, 1,000 images"
        axes.plot(list(points), list(points.values()), marker, markersize=9, color=color, label=label)


def preview(augmentations: tuple, images: Tensor, heading: str) -> fig.Figure:
    """What an augmentation does: every row one image, uint8 [n, 3, 32, 32], the original and eight draws."""
    figure, grid = fig.new_grid(len(images), 9, (1.22, 1.3))
    original = images.float() / 255
    rng = generator(0, 1, "augment")
    for column, axes in enumerate(grid.reshape(len(images), 9).T):
        drawn = augment(original.clone(), augmentations, rng, len(images)) if column else original
        for ax, image in zip(axes, drawn.clamp(0, 1)):
            ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.axis("off")
        axes[0].set_title(f"draw {column}" if column else "original", fontsize=9)
    figure.suptitle(textwrap.fill(heading, 110), fontsize=10)
    return figure


def preview_runs(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """--preview: one figure for every run with an augmentation, on bundled images."""
    augmented = {run.name: run for run in runs if run.settings.augment}.values()  # not every seed
    if not augmented:
        raise UserError("--preview: none of these runs has an augmentation")
    require_writable(args.output_dir)
    images = load_sample()["train"].images[[3, 11, 25, 40]]
    with fig.plain_style():
        for run in augmented:
            path = output_folder(args) / "q3" / run.name / "preview.png"
            heading = f"{run.name}: {', '.join(map(repr, run.settings.augment))}"
            fig.save_figure(preview(run.settings.augment, images, heading), path, args.figures)
            say(str(path))


QUESTION = Question("q3", "q3_augment_dropout.py", __doc__, RUNS, CLAIMS, figures, ("baseline", "baseline_20"))


def rate(text: str) -> float:
    """Type of --dropout."""
    value = round(float(text), 4)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a rate from 0.0001 to 0.9999, not '{text}'")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preview", action="store_true", help="draw what each augmentation does, train nothing")
    more = "further dropout rates to run"
    parser.add_argument("--dropout", type=rate, nargs="+", action="extend", default=[], metavar="P", help=more)
    with session(parser, argv) as (args, device):
        runs = select_runs([*RUNS, *map(dropout_run, args.dropout)], args, device)
        if args.preview:
            return preview_runs(runs, args)
        check_pages(QUESTION, runs, args)
        for run in train_runs(QUESTION.name, runs, args, device):
            update_pages(QUESTION, args, run)
        finish_pages(QUESTION, args)


if __name__ == "__main__":
    main()
