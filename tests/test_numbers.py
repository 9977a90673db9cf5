"""Reading results, and intervals."""

import json
import math
import shutil

import numpy as np
import pytest
from scipy.stats import t

import report.numbers
from common import ROOT, Run, Settings
from parts.machine import UserError
from report.numbers import (
    Noise,
    curve_distance,
    difference,
    mean,
    measure,
    name_of,
    one_more,
    pooled,
    read_arrays,
    read_question,
    read_result,
    read_run,
    report_rows,
    smoothness,
    steady_noise,
    the_report,
)
from results import make, seeds

COMMITTED = ROOT / "results"
RNG = np.random.default_rng(0)


@pytest.fixture
def q1(tmp_path):
    """A copy of question 1's committed results."""
    shutil.copytree(COMMITTED / "q1", tmp_path / "q1")
    return tmp_path / "q1"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ----------------------------------------------------------------------------------------------------------- reading

DAMAGES = {
    "a key is missing": lambda r: r.pop("history"),
    "a machine is missing": lambda r: r["environment"].pop("device"),
    "text for a number": lambda r: r["history"][3].update(train_loss="0.5"),
    "not finite": lambda r: r["history"][3].update(validation_loss=math.nan),
    "an accuracy is missing": lambda r: r["test"]["best"].pop("all_images"),
    "another seed": lambda r: r.update(seed=4),
    "no such epoch": lambda r: r.update(best_epoch=77),
    "an epoch lacks a number": lambda r: r["history"][3].pop("lr"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_is_named(q1, damage):
    path = q1 / "convnet/seed1.json"
    edit(path, DAMAGES[damage])
    with pytest.raises(UserError, match=f"{path} is damaged .*delete it and run again"):
        read_question(q1, [], sample=False)


@pytest.mark.parametrize("content", ["", "[]", "<<<<<<< HEAD", '{"run": "convnet"}'])
def test_what_is_no_result_is_named(q1, content):
    path = q1 / "convnet/seed1.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path} is damaged"):
        read_run(path.parent)


def test_a_result_that_cannot_be_read_is_not_called_damaged(q1, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(UserError, match="cannot read .*seed0.json: Permission denied"):
        read_result(q1 / "convnet/seed0.json")


@pytest.mark.parametrize("setting, value", [("learning_rate", 1e-3), ("batch_norm", True), ("epochs", 21)])
def test_seeds_of_other_settings_are_no_seeds_of_the_run(q1, setting, value):
    path = q1 / "convnet/seed1.json"
    edit(path, lambda result: result["settings"].update({setting: value}))
    with pytest.raises(UserError, match=rf"{path} has {setting} {value}, but .*seed0.json has"):
        read_run(q1 / "convnet")


def test_a_result_of_another_precision_is_a_seed(q1):
    edit(q1 / "convnet/seed1.json", lambda result: result["settings"].update(precision="fp32"))
    assert len(read_run(q1 / "convnet")) == 3


def test_results_of_other_settings_than_the_script_says_are_named_unless_they_are_replaced_now(q1):
    declared = [Run("convnet", Settings(learning_rate=0.1))]
    with pytest.raises(UserError, match="learning_rate 0.002, but the run convnet in q1's script has 0.1"):
        read_question(q1, declared, sample=False)
    replaced = [f"seed{seed}.json" for seed in range(3)]
    assert len(read_question(q1, declared, sample=False, replaced=replaced)["convnet"]) == 3


def test_the_samples_results_do_not_pass_for_real_ones(q1):
    for seed in range(3):
        edit(q1 / f"convnet/seed{seed}.json", lambda result: result["settings"].update(data="cifar10-sample"))
    with pytest.raises(UserError, match="has data 'cifar10-sample', and stands among CIFAR-10's results"):
        read_question(q1, [], sample=False)


def test_a_copy_of_a_run_is_not_counted(q1, capsys):
    shutil.copytree(q1 / "convnet", q1 / "convnet_old")
    assert list(read_question(q1, [], sample=False)) == ["convnet"]
    assert f"{q1 / 'convnet_old'} holds results of q1's convnet, a copy: not counted" in capsys.readouterr().err


def test_arrays_of_another_training_are_refused(q1):
    result = read_result(q1 / "convnet/seed0.json")
    assert read_arrays(result)["last"].shape == (128, 3, 3, 3)
    shutil.copy(q1 / "convnet/seed1.npz", q1 / "convnet/seed0.npz")
    with pytest.raises(UserError, match="seed0.npz is of another training than seed0.json"):
        read_arrays(result)
    (q1 / "convnet/seed0.npz").write_bytes(b"cut")
    with pytest.raises(UserError, match="seed0.npz is missing or damaged"):
        read_arrays(result)


@pytest.mark.parametrize("content", [None, "", '{"numbers": {}}'])
def test_the_reports_numbers_are_an_input(monkeypatch, tmp_path, content):
    monkeypatch.setattr(report.numbers, "HERE", tmp_path)
    the_report.cache_clear()
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match="report.json .* a part of this repository, is missing or damaged"):
        the_report()
    monkeypatch.undo()
    assert the_report()["numbers"]["q1"]


# ---------------------------------------------------------------------------------------------------------- measures


def test_measures():
    curves = {"train_loss": [1.0, 0.5, 0.4], "validation_loss": [1.0, 0.8, 1.0], "validation_accuracy": [70, 75, 74]}
    result = make(test=80, alike=81, curves=curves | {"augmented_validation_loss": [1, 1, 0.6]})
    assert measure(result, "test") == 80 and measure(result, "alike") == 81 and measure(result, "validation") == 75
    assert measure(result, "gap") == pytest.approx(0.2) and measure(result, "narrowness") == pytest.approx(-0.2)
    assert measure(make(curves=curves), "rise") == pytest.approx(25)


def test_the_result_of_a_schedule_that_ends_at_zero_are_its_last_weights():
    assert make(schedule="linear").weights == "last" and make().weights == "best"


def test_smoothness_of_known_filters_and_of_none():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(4000, 3, 3, 3))
    assert smoothness(noise)[0] == pytest.approx(100 / 3, abs=1)
    flat, edge = np.ones((1, 3, 3, 3)), np.zeros((1, 3, 3, 3))
    edge[..., 0], edge[..., 2] = 1, -1
    assert smoothness(np.concatenate([flat, edge])) == (pytest.approx(100), 2)
    checkers = (np.indices((3, 3)).sum(0) % 2 * 2.0 - 1) * np.ones((1, 3, 1, 1))
    assert smoothness(checkers - checkers.mean())[0] < 1
    dead = np.zeros((1, 3, 3, 3))
    assert smoothness(np.concatenate([flat, dead])) == (pytest.approx(100), 1)
    assert smoothness(dead) == (0.0, 0)
    subnormal = np.full((1, 3, 3, 3), 1e-42, np.float32)
    assert np.isfinite(smoothness(subnormal)[0])


def test_the_distance_is_over_the_epochs_both_have():
    figure = {"validation_accuracy": [70, 80, 90]}
    found = [make(curves={"validation_accuracy": values}) for values in ([71, 78], [70, 80])]
    assert curve_distance(figure, found, "validation_accuracy") == pytest.approx((1.5 + 0) / 2)
    assert curve_distance(figure, found, "train_loss") is None


# ------------------------------------------------------------------------------------------------------------- noise


def test_the_deviation_is_pooled_and_a_training_counts_once():
    assert pooled([[1, 2, 3], [10, 14]]) == Noise(math.sqrt((2 + 8) / 3), 3)
    assert pooled([[1], [2]]) is None
    one, again, other = seeds("a", [80, 81]), seeds("b", [80, 81]), seeds("c", [80, 84], batch_norm=True)
    unsteady = seeds("d", [30, 60, 50], dropout=0.6)
    assert steady_noise([one, again, other, unsteady], "test") == pooled([[80, 81], [80, 84]])
    fewer_epochs = seeds("e", [79, 81], epochs=3)
    assert steady_noise([one, fewer_epochs], "test").df == 2
    assert steady_noise([one, fewer_epochs], "test", by_epochs=False).df == 1


def test_a_difference_is_the_subtraction_of_what_tables_print():
    one, other = seeds("a", [80.11, 80.22, 80.34], batch_norm=True), seeds("b", [79.77, 79.91])
    found = difference(one, other, "test", Noise(0.5, 6))
    assert found.value == round(mean(one, "test") - mean(other, "test"), 2) == 0.38
    assert found.half == pytest.approx(t.ppf(0.975, 6) * 0.5 * math.sqrt(1 / 3 + 1 / 2))
    assert difference(one, other, "test", None).half is None


def test_readings_of_the_same_trainings_are_compared_seed_by_seed():
    one, other = seeds("a", [80, 81, 85]), seeds("b", [79, 80.2, 84.1], patience=5)
    found = difference(one, other, "test", Noise(9, 6))
    assert found.half == pytest.approx(t.ppf(0.975, 2) * np.std([1, 0.8, 0.9], ddof=1) / math.sqrt(3))
    assert difference(one, other[:2], "test", Noise(9, 6)).half > 9  # not the same seeds: two runs like any


def test_unsteady_runs_are_compared_by_welchs_test():
    one, other = seeds("a", [80, 81, 80.5]), seeds("b", [40, 60, 45], dropout=0.6)
    assert difference(one, other, "test", Noise(0.1, 99)).half > 10
    assert difference(one, other[:1], "test", Noise(0.1, 99)).half is None


def test_where_one_more_seed_falls():
    low, high = one_more(seeds("a", [80, 82]), "alike", Noise(1, 6))
    assert (low + high) / 2 == pytest.approx(81)
    assert (high - low) / 2 == pytest.approx(t.ppf(0.975, 6) * math.sqrt(1 + 1 / 2))
    unsteady = seeds("b", [40, 60, 50], dropout=0.6)
    assert one_more(unsteady, "alike", Noise(0.1, 99))[1] > 80
    assert one_more(unsteady[:2], "alike", Noise(0.1, 99)) is None


def test_both_intervals_cover_as_often_as_they_say():
    """Brute force: trainings drawn from known distributions, four runs of three seeds and one of a single seed."""
    inside = np.zeros(2)
    rounds = 3000
    for _ in range(rounds):
        truth = RNG.uniform(70, 85, 5)
        drawn = [RNG.normal(centre, 0.7, 1 if i == 4 else 3) for i, centre in enumerate(truth)]
        noise = pooled(drawn)
        half = noise.half(1 / 3 + 1)
        inside[0] += abs((drawn[0].mean() - drawn[4].mean()) - (truth[0] - truth[4])) < half
        inside[1] += abs(RNG.normal(truth[0], 0.7) - drawn[0].mean()) < noise.half(1 + 1 / 3)
    assert np.all(np.abs(inside / rounds - 0.95) < 4 * math.sqrt(0.95 * 0.05 / rounds))


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_reports_rows_stand_in_order_and_once():
    rows = report_rows(COMMITTED)
    names = [(row.question, row.run) for row in rows]
    assert names[0] == ("q1", "convnet") and ("q2", "convnet") not in names and len(set(names)) == len(names) == 27
    assert all(row.inside is None or row.interval[0] < row.interval[1] for row in rows)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("crop_flip_gray", "crop + flip + gray"),
        ("flip_p0.5", "flip 0.5"),
        ("dropout_after_pool_0.5", "dropout 0.5 after the pooling"),
        ("frozen_imagenet", "frozen on ImageNet's features"),
        ("frozen_train_mode_x_0123abcd", "frozen in training mode on other features (a stand-in)"),
        ("batchnorm_patience3", "batch norm (patience 3)"),
    ],
)
def test_names_for_people(run, name):
    assert name_of(run) == name
