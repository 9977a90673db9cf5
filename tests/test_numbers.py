"""Reading results, and intervals."""

import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t

from made import make, seeds
from parts.machine import UserError
from report import numbers
from report.numbers import Noise, difference, measure, name_of, one_more, pooled, read_question, read_run, steady_noise


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "a machine is missing": lambda r: r["environment"].pop("device"),
    "not finite": lambda r: r["history"][3].update(validation_loss=math.nan),
    "no such epoch": lambda r: r.update(best_epoch=77),
    "another seed": lambda r: r.update(seed=4),
    "an epoch lacks a number": lambda r: r["history"][3].pop("lr"),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "[]", "<<<<<<< HEAD", '{"run": "convnet"}'])
def test_a_damaged_result_is_named(q1, damage):
    path = q1 / "convnet/seed1.json"
    if damage in DAMAGES:
        edit(path, DAMAGES[damage])
    else:
        path.write_text(damage)
    with pytest.raises(UserError, match=f"{path} is damaged .*delete it and run again"):
        read_question(q1, [], sample=False)


def test_results_of_other_settings_than_the_other_seeds_are_named(q1):
    path = q1 / "convnet/seed1.json"
    edit(path, lambda result: result["settings"].update(precision="fp32"))
    assert len(read_run(q1 / "convnet")) == 3  # another precision may be
    edit(path, lambda result: result["settings"].update(epochs=21))
    with pytest.raises(UserError, match=f"{path} has epochs 21, but .*seed0.json has"):
        read_run(q1 / "convnet")
    edit(path, lambda result: (result["settings"].update(epochs=20), result["parameters"].update(trainable=1)))
    with pytest.raises(UserError, match=f"{path} is of another network than .*seed0.json"):
        read_run(q1 / "convnet")


def test_the_samples_results_do_not_pass_for_real_ones(q1):
    with pytest.raises(UserError, match="has data 'cifar10', and stands among the sample's results"):
        read_question(q1, [], sample=True)
    for seed in range(3):
        edit(q1 / f"convnet/seed{seed}.json", lambda result: result["settings"].update(data="cifar10-sample"))
    with pytest.raises(UserError, match="has data 'cifar10-sample', and stands among CIFAR-10's results"):
        read_question(q1, [], sample=False)


def test_arrays_of_another_training_are_refused(q1):
    result = numbers.read_result(q1 / "convnet/seed0.json")
    assert numbers.read_arrays(result)["last"].shape == (128, 3, 3, 3)
    shutil.copy(q1 / "convnet/seed1.npz", q1 / "convnet/seed0.npz")
    with pytest.raises(UserError, match="seed0.npz is of another training than seed0.json"):
        numbers.read_arrays(result)
    losses = np.array([[1.0, 1.0, 1.0, 0.5]])  # of three batches, and of a last one that is smaller
    for train_loss, belongs in ((0.99, True), (0.88, True), (0.8, False), (1.1, False)):
        np.savez(q1 / "convnet/seed0.npz", before=losses, last=losses, step_losses=losses)
        other = replace(result, curves={"train_loss": np.array([train_loss])})
        with nullcontext() if belongs else pytest.raises(UserError, match="another training"):
            numbers.read_arrays(other)
    (q1 / "convnet/seed0.npz").write_bytes(b"cut")
    with pytest.raises(UserError, match="seed0.npz is missing or damaged"):
        numbers.read_arrays(result)


def test_names_for_people():
    names = {"scratch_fp32": "VGG11_bn from scratch, fp32", "crop_flip_3epochs": "crop + flip, 3epochs"}
    names["frozen_my_file_0a1b2c3d"] = "frozen on my file 0a1b2c3d (a stand-in)"
    names["frozen_vgg_30epochs_0a1b2c3d"] = "frozen on vgg 30epochs 0a1b2c3d (a stand-in)"
    names["frozen_tinyimagenet_0a1b2c3d"] = "frozen on tinyimagenet 0a1b2c3d (a stand-in)"
    names["finetune_imagenet_3epochs_bf16"] = "fine-tuned on ImageNet's features, 3epochs, bf16"
    names |= {"baseline": "baseline (30 epochs)", "baseline_5epochs": "baseline, 5epochs"}
    names |= {f"baseline{run}_fp32": f"baseline ({epochs} epochs), fp32" for run, epochs in (("", 30), ("_20", 20))}
    assert {run: name_of(run) for run in names} == names


def test_measures():
    curves = {"train_loss": [1.0, 0.5, 0.4], "validation_loss": [1.0, 0.8, 1.0], "validation_accuracy": [70, 75, 74]}
    augmented = {"augmented_validation_loss": [1, 1, 0.6], "augmented_validation_accuracy": [69, 75, 72]}
    result = make(test=80, alike=81, curves=curves | augmented)
    assert measure(result, "test") == 80 and measure(result, "alike") == 81 and measure(result, "validation") == 75
    assert measure(result, "gap") == pytest.approx(0.2) and measure(result, "narrowness") == pytest.approx(-0.2)
    assert measure(result, "augmentation_adds") == -1
    assert measure(make(curves=curves), "rise") == pytest.approx(25)
    assert make(schedule="linear").chosen_weights == "last" and make().chosen_weights == "best"


def test_smoothness_of_known_filters_and_of_none():
    noise = np.random.default_rng(1).normal(size=(4000, 3, 3, 3))
    assert numbers.smoothness(noise)[0] == pytest.approx(100 / 3, abs=1)
    flat, edge, dead = np.ones((1, 3, 3, 3)), np.zeros((1, 3, 3, 3)), np.zeros((1, 3, 3, 3))
    edge[..., 0], edge[..., 2] = 1, -1
    assert numbers.smoothness(np.concatenate([flat, edge, dead])) == (pytest.approx(100), 2)
    checkers = (np.indices((3, 3)).sum(0) % 2 * 2.0 - 1) * np.ones((1, 3, 1, 1))
    assert numbers.smoothness(checkers - checkers.mean())[0] < 1
    assert numbers.smoothness(dead) == (0.0, 0)


def test_the_deviation_is_pooled_and_a_training_counts_once():
    assert pooled([[1, 2, 3], [10, 14]]) == Noise(math.sqrt((2 + 8) / 3), 3)
    assert pooled([[1], [2]]) is pooled([[80.3, 80.3], [2]]) is None  # equal by chance
    one, again, other = seeds("a", [80, 81]), seeds("b", [80, 81]), seeds("c", [80, 84], batch_norm=True)
    unsteady = seeds("d", [30, 60, 50], dropout=0.6)
    assert steady_noise([one, again, other, unsteady], "test") == pooled([[80, 81], [80, 84]])
    fewer_epochs, one_seed, trial = seeds("e", [79, 82], epochs=3), seeds("f", [9]), seeds("f_2epochs", [1, 9])
    assert steady_noise([one, fewer_epochs, one_seed, trial], "test") == Noise(math.sqrt((0.5 + 4.5) / 2), 1)


def test_a_difference_is_the_subtraction_of_what_tables_print():
    one, other = seeds("a", [80.11, 80.22, 80.34], batch_norm=True), seeds("b", [79.77, 79.91])
    found = difference(one, other, "test", Noise(0.5, 6))
    assert found.value == round(numbers.mean(one, "test") - numbers.mean(other, "test"), 2) == 0.38
    assert found.half == pytest.approx(t.ppf(0.975, 6) * 0.5 * math.sqrt(1 / 3 + 1 / 2))
    assert difference(one, other, "test", None).half is None


def test_readings_of_the_same_trainings_are_compared_seed_by_seed_and_unsteady_runs_by_their_own():
    one, other = seeds("a", [80, 81, 85]), seeds("b", [79, 80.2, 84.1], patience=5)
    found = difference(one, other, "test", Noise(9, 6))
    assert found.half == pytest.approx(t.ppf(0.975, 2) * np.std([1, 0.8, 0.9], ddof=1) / math.sqrt(3))
    assert difference(one, other[:2], "test", Noise(9, 6)).half > 9  # not the same seeds: two runs like any
    elsewhere = seeds("b", [79, 80.2, 84.1], curves={"train_loss": [1.1, 0.5]})  # another precision's, say
    assert difference(one, elsewhere, "test", Noise(9, 6)).half > 9
    assert difference(one, seeds("b", [79, 80, 84], patience=5), "test", Noise(9, 6)).half is None  # all alike
    unsteady = seeds("c", [40, 60, 45], dropout=0.6)
    assert difference(one, unsteady, "test", Noise(0.1, 99)).half > 10
    assert difference(one, unsteady[:1], "test", Noise(0.1, 99)).half is None
    collapsed = [seeds(run, [10, 10], dropout=rate) for run, rate in (("d", 0.8), ("e", 0.9))]
    assert difference(*collapsed, "test", Noise(0.1, 99)).half is None


def test_where_one_more_seed_falls():
    half = one_more(seeds("a", [80, 82]), Noise(1, 6))
    assert half == pytest.approx(t.ppf(0.975, 6) * math.sqrt(1 + 1 / 2))
    rows = [numbers.ReportRow("q1", "a", told, seeds("a", [80, 82]), 2.0) for told in (78.9, 79.1, 82.9, 83.1)]
    assert [row.verdict for row in rows] == ["outside", "inside", "inside", "outside"]
    verdicts = [replace(rows[0], half=half).verdict for half in (None, 9.0, 11.0)]
    assert verdicts == ["too few seeds", "inside", "inside, but wide"]
    unsteady = seeds("b", [40, 60, 50], dropout=0.6)
    assert one_more(unsteady, Noise(0.1, 99)) > 30
    assert one_more(unsteady[:2], Noise(0.1, 99)) is None


def test_question_1s_training_may_stand_in_question_2():
    results = {"q1": {}, "q2": {"convnet": seeds("convnet", [80, 82])}, "q3": {}, "q4": {}}
    first, *others = numbers.report_rows(results)
    assert (first.question, first.run, len(first.results)) == ("q1", "convnet", 2)
    assert not any(row.results for row in others)
