"""Question 3: augmentation and dropout.

    python q3_augment_dropout.py                                 # the baselines and all runs, about an hour each
    python q3_augment_dropout.py --list                          # every run, its state, the time left
    python q3_augment_dropout.py --only crop_flip dropout_0.1    # some of them
    python q3_augment_dropout.py --sample --only flip_p0.5       # minutes, the bundled images
    python q3_augment_dropout.py --preview                       # look at what every augmentation does, train nothing
    python q3_augment_dropout.py --dropout 0.05 --only dropout_0.05    # a further dropout rate, alone

The report: crop + flip (84.6 %) and the full mixture (83.0 %) are the best augmentations, though its flips of p = 0.7
have 83.8 %; dropout helps a little at 0.1 (83.5 %) and ruins the network at 0.6 (51.6 %). What we found:
results/README.md

The baseline is question 1's network at 30 epochs, the same trajectory, continued; beside dropout it is read at 20. The
report's code drops units before the pooling; two runs of ours, `dropout_after_pool`, drop them at the usual place.

Crop + flip comes to the report's validation accuracy where validation images are augmented, as they are there; on the
images as they are it is higher. Crop alone does as well on the test images, and grayscale, blur and jitter on top add
nothing that one seed can tell. Cropped, grey and mixed validation images are harder than the images as they are;
flipped ones are not. The report's text and its Figure 26 disagree about the mixture's best validation accuracy: ours is
near the figure's on augmented images, and near the text's on the images as they are. With all that crop, validation
loss hardly rises at the end, by 7 % with grayscale at most, where the baseline's is a third above its lowest. Grayscale
alone and colour jitter alone follow Figures 22 and 24 closely, and overfit as the baseline does. Colour jitter and seed
1 of dropout 0.6 were trained on a CPU where --precision auto means float32, all else in bfloat16; comparisons say so.

Flips of p and 1 - p vary the images as much, so training loss should be highest at 0.5 and lowest at 0.1 and 0.9. In
ours they end so; all of one seed start from the same weights. In the report's (Figures 15 to 19) 0.1 is out of place,
level with 0.3 and 0.7. In the first eight epochs its five lie further apart than ours, and until epoch 17 so do its
three trainings of question 1's network (Figures 1, 5 and 9) against our three seeds; we do not know why. Later they are
about as far apart. It finds that p = 0.9 hurts: its test accuracy falls 5 points below that of p = 0.7. That is more
than 1,000 images explain, but each is one training; it is 2 points below Figure 5's, without flips, which 1,000 images
cannot tell from chance. In ours 0.9 is less than half a point below 0.7, and above the network without flips. Only 0.3
and 0.5 are above that by more than another seed may change, and not if one allows for five rates tried; no two rates
differ by that much.

Dropout of 0.2 helps beyond noise, though not if one allows for the three rates tried, of 0.1 and 0.3 within it; the
report's own 0.2 and 0.3 are no better than its Figure 5. From 0.4 on accuracy falls, and from 0.6 on it collapses, and
validation loss is above training loss from the first epoch on, as in the report. Up to 0.3 our validation accuracies
stay within 2 points of its curves on average, and at 0.9 both are near chance. In between they are several points
apart, at 0.7 most, and in both directions, though the training losses fall alike (at 0.4 ours ends higher). There one
seed tells little, ours or the report's: three seeds at 0.6 reach nearly the same training loss and lie up to 14 points
apart on test. Intervals of one seed are too narrow there.

The place does most of the harm: dropped after the pooling, at the same rate, units cost about a third of the accuracy
that they cost before it. Scaling keeps the mean of a unit, not that of a maximum of four: trained on the maximum of
those that are left, scaled up, every block puts out smaller values in evaluation than in training. After three epochs
at 0.6 (a trial that is not among the results) their mean was 1.7 times smaller behind the first block and 8 times behind
the fifth. The logits shrink as much, and small offsets between the classes decide, which nothing in training restrains:
with dropout left on, the same weights were right more often.
"""

import argparse
import re
import statistics
import textwrap
from collections.abc import Sequence
from functools import partial

from common import (
    VALIDATION_IMAGES,
    Run,
    Settings,
    generator,
    list_runs,
    load_sample,
    make_parser,
    question_folder,
    select_runs,
    train_runs,
)

# isort: split
# common stands first: it answers Ctrl-C while torch loads

import numpy as np
from torch import Tensor

from augment import ColorJitter, GaussianBlur, Grayscale, HorizontalFlip, RandomCrop, augment
from machine import UserError, on_first, require_writable, session
from report import (
    NOT_RUN,
    Check,
    Claim,
    Difference,
    Figure,
    Finding,
    Results,
    Table,
    as_the_report_validates,
    augmented_validation,
    beats,
    best_validation,
    command,
    figures_of,
    is_sample,
    make_difference,
    mean_and_deviation,
    mean_test_accuracy,
    new_axes,
    new_grid,
    new_panels,
    paired_difference,
    plot_curve,
    plot_loss_curves,
    reported,
    save_figure,
    shades,
    style_axes,
    test_accuracy,
    test_interval,
    title,
    training_variance,
    values_of,
    write_report,
)

CROP, FLIP, GRAY = RandomCrop(padding=4), HorizontalFlip(p=0.5), Grayscale(p=0.1)
BLUR = GaussianBlur(kernel_size=13, sigma=(0.1, 2.0), p=0.2)
JITTER = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.4)

AUGMENTATIONS = {  # run: augmentation
    "flip_p0.1": (HorizontalFlip(p=0.1),),
    "flip_p0.3": (HorizontalFlip(p=0.3),),
    "flip_p0.5": (HorizontalFlip(p=0.5),),
    "flip_p0.7": (HorizontalFlip(p=0.7),),
    "flip_p0.9": (HorizontalFlip(p=0.9),),
    "crop": (CROP,),
    "crop_flip": (CROP, FLIP),
    "grayscale": (Grayscale(p=0.2),),
    "crop_flip_gray": (CROP, FLIP, GRAY),
    "color_jitter": (JITTER,),
    "crop_flip_gray_blur": (CROP, FLIP, GRAY, BLUR),
    "crop_flip_gray_blur_jitter": (CROP, FLIP, JITTER, GRAY, BLUR),
}
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
AFTER_POOL_RATES = (0.5, 0.6)
BASELINES = ("baseline", "baseline_20")  # 30 epochs, 20 epochs
FLIPS = {augmentation[0].p: run for run, augmentation in AUGMENTATIONS.items() if run.startswith("flip")}
REPORTED = [run for run in AUGMENTATIONS if reported("q3", run)]  # the claims are about these
SINGLES = [run for run in REPORTED if len(AUGMENTATIONS[run]) == 1]
MIXTURE = "crop_flip_gray_blur_jitter"


def dropout_run(rate: float) -> Run:
    return Run(f"dropout_{rate:g}", Settings(epochs=20, dropout=rate))


def after_pool_run(rate: float) -> Run:
    return Run(f"dropout_after_pool_{rate:g}", Settings(epochs=20, dropout=rate, dropout_after_pool=True))


RUNS = [
    Run("baseline", Settings(epochs=30)),
    Run("baseline_20", Settings(epochs=20)),
    *(Run(name, Settings(epochs=30, augment=augmentation)) for name, augmentation in AUGMENTATIONS.items()),
    *map(dropout_run, RATES),
    *map(after_pool_run, AFTER_POOL_RATES),
]


# ------------------------------------------------------------------------------------------------------------ claims


def about_equal(one: str, other: str, margin: float) -> Check:
    """A check that a run makes no difference: the interval of the paired difference lies within +-`margin` points."""

    def check(results: Results, comparisons: int = 1) -> Finding:
        if (found := paired_difference(results, one, other)) is None:
            return NOT_RUN
        measured = f"{one} − {other}, test: {found.in_words()}; the claim: within ±{margin:g} points"
        return Finding(found.verdict((-margin, margin), comparisons), measured, not found.training)

    return check


def loss_gap(result: dict) -> float:
    """Validation loss minus training loss in the last epoch: the gap that the report's curves show. Where training images
    are augmented, so are those of validation: of easier images the loss would be lower, whatever the network has learnt.
    """
    return as_the_report_validates(result, "validation_loss")[-1] - result["history"][-1]["train_loss"]


def mean_gap(found: Sequence[dict]) -> float:
    return statistics.mean(map(loss_gap, found))


LOSS_ERROR = (
    0.06  # standard error of a validation loss, a mean over 1,000 images: measured on question 1's last weights
)


def narrowest_gap(run: str, others: Sequence[str]) -> Check:
    """A check that of all these runs, `run` has the smallest gap between training and validation loss, either way."""

    def check(results: Results, comparisons: int = 1) -> Finding:
        ours, *theirs = results.seeds_of(run, *others)
        if not ours:
            return NOT_RUN
        gaps = {
            name: {seed: abs(loss_gap(r)) for seed, r in by_seed.items()}
            for name, by_seed in zip((run, *others), (ours, *theirs))
        }
        means = {name: statistics.mean(by_seed.values()) for name, by_seed in gaps.items()}
        rival = min(others, key=means.get)
        leads = np.array([gaps[rival][seed] - gaps[run][seed] for seed in ours])
        data = next(iter(ours.values()))["settings"]["data"]
        image_variance = 2 * LOSS_ERROR**2 * 1000 / VALIDATION_IMAGES[data]
        noise = results.noise_of((run, rival), loss_gap)
        training = training_variance(leads, *(values_of(groups, loss_gap) for groups in noise))
        compared = [*ours.values(), *theirs[others.index(rival)].values()]
        found = make_difference(leads, image_variance, training, compared)
        ranking = ", ".join(f"{name} {means[name]:.3f}" for name in sorted(means, key=means.get))
        measured = (
            f"loss gap in the last epoch, augmented alike: {ranking}; {rival} − {run}: {found.in_words('in loss')}"
        )
        chosen_from = comparisons - 1 + len(others)
        return Finding(found.verdict(comparisons=chosen_from), measured, not found.training)

    return check


def two_best(named: Sequence[str], of: Sequence[str]) -> Check:
    """A check that the lesser of the two named runs beats the best of the others, on the test images, over the seeds that
    all have.
    """

    def check(results: Results, comparisons: int = 1) -> Finding:
        seeds = results.seeds_of(*of)
        if not seeds[0]:
            return NOT_RUN
        shared = {run: [*by_seed.values()] for run, by_seed in zip(of, seeds)}
        accuracy = {run: mean_test_accuracy(found) for run, found in shared.items()}
        lesser = min(named, key=accuracy.get)
        rival = max((run for run in of if run not in named), key=accuracy.get)
        found = paired_difference(results, lesser, rival, seeds=seeds[0])
        ranking = ", ".join(
            f"{run} {accuracy[run]:.2f}" for run in sorted(accuracy, key=accuracy.get, reverse=True)[:4]
        )
        measured = f"best four: {ranking}; {lesser} − {rival}: {found.in_words()}"
        chosen_from = len(named) * (len(of) - len(named))
        return Finding(found.verdict(comparisons=chosen_from), measured, not found.training)

    return check


CLAIMS = [
    Claim(
        "5",
        "Horizontal flipping helps, best near p=0.5 to 0.7, and p=0.9 hurts.",
        (
            *(beats(f"flip_p{p}", "baseline") for p in (0.5, 0.7)),
            *(beats(f"flip_p{p}", f"flip_p{q}") for p in (0.5, 0.7) for q in (0.1, 0.3, 0.9)),
            beats("baseline", "flip_p0.9"),
        ),
    ),
    Claim(
        "6",
        "Random crop helps; crop + flip is best of the simple ones "
        "and narrows the gap between training and validation.",
        (
            beats("crop", "baseline"),
            *(beats("crop_flip", single) for single in SINGLES),
            narrowest_gap("crop_flip", ["baseline"]),
        ),
    ),
    Claim("7", "Grayscale alone barely helps or hurts.", (about_equal("grayscale", "baseline", margin=2.0),)),
    Claim(
        "8",
        "The full mixture (crop, flip, gray, blur, jitter) and crop + flip are the best augmentations.",
        (two_best(["crop_flip", MIXTURE], REPORTED),),
    ),
    Claim(
        "9",
        "Dropout helps a little at 0.1 to 0.3, then accuracy falls, to 51.6 % at 0.6; "
        "0.2 narrows the train/validation gap the most.",
        (
            *(beats(f"dropout_{p}", "baseline_20") for p in (0.1, 0.2, 0.3)),
            *(beats(f"dropout_{p}", f"dropout_{q}") for p, q in ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6))),
            narrowest_gap("dropout_0.2", [f"dropout_{p}" for p in RATES[:6] if p != 0.2]),
        ),
    ),
]


# ----------------------------------------------------------------------------------------------------------- figures


def figures(results: Results) -> dict[str, Figure]:
    """Those that the available runs allow."""
    rates = {r[0]["settings"]["dropout"]: run for run, r in results.items() if re.fullmatch(r"dropout_[\d.]+", run)}
    rates[0.0] = "baseline_20"
    dropouts = {p: rates[p] for p in sorted(rates) if rates[p] in results}
    flips = {p: run for p, run in FLIPS.items() if run in results}
    drawn = {}
    if any(run in results for run in AUGMENTATIONS):
        drawn["augmentations.png"] = plot_augmentations(results)
    if flips:
        drawn["flip_sweep.png"] = plot_sweep(results, flips, "horizontal flip", "probability of a flip", "baseline")
    if any(p > 0 for p in dropouts):
        drawn["dropout_validation.png"] = plot_dropout(results, dropouts)
        drawn["dropout_bars.png"] = plot_bars(results, dropouts)
        after_pool = {p: run for p in AFTER_POOL_RATES if (run := after_pool_run(p).name) in results}
        drawn["dropout_sweep.png"] = plot_sweep(results, dropouts, "dropout", "dropout rate", after_pool=after_pool)
    return drawn


def plot_augmentations(results: Results) -> Figure:
    """Small multiples: losses of every augmentation there is, on common axes, beside the report's."""
    runs = [run for run in ("baseline", *AUGMENTATIONS) if run in results]
    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    figure, grid = new_grid(rows, columns, (4, 3), sharex=True, sharey=True)
    legend = {}
    for axes, run in zip(grid, runs):
        style_axes(axes, "cross entropy")
        plot_loss_curves(axes, results[run])
        axes.set_title(f"{run}: test {mean_test_accuracy(results[run]):.1f} %", fontsize=10)
        axes.tick_params(labelbottom=True)
        for line, label in zip(*axes.get_legend_handles_labels()):
            legend[re.sub(r", Figure \d+", "", label)] = line
    grid[0].set_ylim(bottom=0)  # of all: the axes are common
    grid[0].legend(legend.values(), legend.keys(), fontsize=8)
    for axes in grid[len(runs) :]:
        axes.axis("off")
    first = results[runs[0]][0]
    figure.suptitle(title(first, "augmentations"))
    figure.tight_layout()
    return figure


def plot_dropout(results: Results, rates: dict[float, str]) -> Figure:
    """Validation accuracy over epochs for all dropout rates: the report's Figures 27 to 29 in one."""
    first = results[next(iter(rates.values()))][0]
    figure, axes = new_axes(title(first, "dropout before the pooling"), "validation accuracy (%)")
    for (p, run), color in zip(rates.items(), shades(len(rates))):
        label = f"{p:g} (loss gap {mean_gap(results[run]):+.2f})"
        plot_curve(axes, results[run], "validation_accuracy", label, color=color)
    axes.legend(title="dropout", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def plot_bars(results: Results, rates: dict[float, str]) -> Figure:
    """The report's Figure 30: best validation accuracy of every rate, as bars."""
    first = results[next(iter(rates.values()))][0]
    figure, axes = new_axes(title(first, "the report's Figure 30"), "best validation accuracy (%)")
    ours = {p: statistics.mean(map(best_validation, results[run])) for p, run in rates.items() if p}
    axes.bar([p - 0.018 for p in ours], list(ours.values()), width=0.035, label="ours")
    if not is_sample(first):
        theirs = {float(p): value for f in figures_of("dropout") for p, value in f["bars"].items()}
        axes.bar(
            [p + 0.018 for p in theirs], list(theirs.values()), width=0.035, color="0.6", label="report, Figure 30"
        )
    axes.set(xlabel="dropout rate", xticks=list(RATES))
    axes.legend()
    return figure


def plot_sweep(
    results: Results,
    runs: dict[float, str],
    heading: str,
    xlabel: str,
    baseline: str = "",
    after_pool: dict[float, str] | None = None,
) -> Figure:
    """Over a rate: test accuracy on all images with its interval, beside the report's numbers and ours measured as those,
    the baseline and the runs that drop units after the pooling; and the gap between the losses.
    """
    ylabels = ("test accuracy (%)", "loss gap in the last epoch, augmented alike:\nvalidation − training")
    first = results[next(iter(runs.values()))][0]
    figure, (accuracies, gaps) = new_panels(title(first, heading), ylabels, xlabel)
    several = any(len(results[run]) > 1 for run in [*runs.values(), *(after_pool or {}).values()])
    interval = "several seeds: ± standard deviation; one: 95 %" if several else "95 %"
    series = {"ours": (runs, {"fmt": "o-"})}
    if after_pool:
        series["ours, after the pooling"] = (after_pool, {"fmt": "s", "color": "tab:orange"})
    for name, (rates, style) in series.items():
        found = [results[run] for run in rates.values()]
        means = [mean_test_accuracy(r) for r in found]
        bounds = np.array([test_interval(r) for r in found])  # [rates, 2]
        label = f"{name}, best weights, all images ({interval})" if name == "ours" else name
        accuracies.errorbar(list(rates), means, np.abs(bounds.T - means), capsize=4, label=label, **style)
        gaps.errorbar(list(rates), [mean_gap(r) for r in found], label=name, **style)
    if not is_sample(first):
        theirs = {x: reported("q3", run)["test"] for x, run in runs.items() if "test" in reported("q3", run)}
        ours = {x: statistics.mean(test_accuracy(r, "last", "report_images") for r in results[runs[x]]) for x in theirs}
        for name, points, color in (("report", theirs, "gray"), ("ours", ours, "tab:blue")):
            label = f"{name}, last weights, 1,000 images"
            accuracies.plot(list(points), list(points.values()), "x", color=color, label=label)
    if baseline in results:
        accuracy, gap = mean_test_accuracy(results[baseline]), mean_gap(results[baseline])
        accuracies.axhline(accuracy, color="tab:green", linestyle=":", label=f"our baseline {accuracy:.1f} %")
        gaps.axhline(gap, color="tab:green", linestyle=":", label=f"our baseline {gap:.2f}")
    shown = [*runs, *(after_pool or {})]
    for axes in (accuracies, gaps):
        axes.xaxis.get_major_locator().set_params(integer=False)
        axes.set_xlim(min(shown) - 0.05, max(shown) + 0.05)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    return figure


def preview(augmentations: tuple, images: Tensor, heading: str) -> Figure:
    """What an augmentation does: every row one image, uint8 [n, 3, 32, 32], the original and eight draws."""
    figure, grid = new_grid(len(images), 9, (1.22, 1.3))
    rng, original = generator(0, 1, "augment"), images.float() / 255
    for column, axes in enumerate(grid.reshape(len(images), 9).T):
        drawn = augment(original, augmentations, rng, len(images)) if column else original
        for ax, image in zip(axes, drawn.clamp(0, 1)):
            ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.axis("off")
        axes[0].set_title(f"draw {column}" if column else "original", fontsize=9)
    figure.suptitle(textwrap.fill(heading, 110), fontsize=10)
    return figure


def preview_runs(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """--preview: one figure for every run with an augmentation, on bundled images."""
    augmented = [run for run in runs if run.settings.augment]
    if not augmented:
        raise UserError("--preview: none of these runs has an augmentation")
    require_writable(args.output_dir)
    images = load_sample()["train"].images[[3, 11, 25, 40]]
    for run in augmented:
        path = question_folder("q3", args) / run.name / "preview.png"
        heading = f"{run.name}: {', '.join(map(repr, run.settings.augment))}"
        save_figure(preview(run.settings.augment, images, heading), path)
        print(path)


# ------------------------------------------------------------------------------------------------------------ tables


def tables(results: Results) -> list[Table]:
    """Every run's losses in the last epoch, and its paired difference in test accuracy (points) to the baseline of as
    many epochs. "-" where there is none. The gap is that of the losses on augmented images, where there are such.
    """
    if not results:
        return []
    head = ["run", "training loss", "validation loss, as it is / augmented", "gap, augmented alike"]
    head.append("best validation, as it is / augmented")
    names = dict.fromkeys([*(run.name for run in RUNS), *results])
    return [[[*head, "run − baseline, test", "command"], *(gap_row(name, results) for name in names)]]


def gap_row(run: str, results: Results) -> list[str]:
    if not (found := results.get(run)):
        return [run, *["-"] * 5, command("q3", run, sample=is_sample(next(iter(results.values()))[0]))]
    last = [r["history"][-1] for r in found]
    losses = [mean_and_deviation([h[f"{part}_loss"] for h in last], 3) for part in ("train", "validation")]
    validation = mean_and_deviation([best_validation(r) for r in found])
    if "augmented_validation_accuracy" in last[0]:
        losses[1] += f" / {mean_and_deviation([h['augmented_validation_loss'] for h in last], 3)}"
        augmented = [max(as_the_report_validates(r, "validation_accuracy")) for r in found]
        validation += f" / {mean_and_deviation(augmented)}"
    difference = None if run in BASELINES else to_baseline(run, results)
    return [
        run,
        *losses,
        f"{mean_gap(found):+.3f}",
        validation,
        difference.in_words() if difference else "-",
        command("q3", run, found, declared=run in [r.name for r in RUNS]),
    ]


def to_baseline(run: str, results: Results) -> Difference | None:
    """Paired difference to the baseline of as many epochs, over the seeds that both have; None where there are none."""
    for baseline in BASELINES:
        pairs = results.pairs_of(run, baseline)
        if pairs and all(len(ours["history"]) == len(theirs["history"]) for ours, theirs in pairs):
            return paired_difference(results, run, baseline)
    return None


def practices(results: Results) -> list[list[str]]:
    """Validation on augmented images, and dropout before the pooling: what they are worth."""
    rows = []
    if lower := augmented_validation({run: results[run] for run in AUGMENTATIONS if run in results}):
        rows.append(["validates on augmented images (question 3.1)", lower])
    for p in AFTER_POOL_RATES:
        before, after = dropout_run(p).name, after_pool_run(p).name
        if (found := paired_difference(results, after, before)) is not None:
            rows.append([f"drops units before the pooling (rate {p:g})", f"after − before, test: {found.in_words()}"])
    return rows


# -------------------------------------------------------------------------------------------------------------- main


def rate(text: str) -> float:
    """Type of --dropout."""
    try:
        value = round(float(text), 4)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a rate between 0 and 1, not '{text}'")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preview", action="store_true", help="draw what each augmentation does, train nothing")
    more = "further dropout rates to run"
    parser.add_argument("--dropout", type=rate, nargs="+", default=[], metavar="P", help=more)
    with session(parser, argv) as (args, device):
        further = [dropout_run(p) for p in args.dropout if p not in RATES]
        runs = select_runs([*RUNS, *further], args, device)
        if args.list:
            return list_runs("q3", runs, args)
        if args.preview:
            return on_first(lambda: preview_runs(runs, args))
        write = partial(write_report, "q3", __doc__, RUNS, args, CLAIMS, figures, tables, practices)
        for run in train_runs("q3", runs, args, device):
            write(changed=[run.name])
        write(show=True)


if __name__ == "__main__":
    main()
