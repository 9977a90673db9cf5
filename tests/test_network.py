"""The report's network, its parameters and the picture of its filters."""

import math

import numpy as np
import torch
from torch import nn

from common import ConvNet, all_parameters, count_parameters, describe, filter_grid, filter_tile, visualize_filters


def test_parameter_counts_are_the_reports():
    with torch.device("meta"):
        assert count_parameters(ConvNet()) == 7_678_474
        assert count_parameters(ConvNet(batch_norm=True)) == 7_682_826
        assert count_parameters(ConvNet(dropout=0.5)) == 7_678_474


def test_every_layer_agrees_with_the_reports_formulas():
    with torch.device("meta"):
        plain, batch_norm = ConvNet(), ConvNet(batch_norm=True)
    counted = [layer["parameters"] for layer in all_parameters(plain)["layers"]]
    assert counted == [3_584, 590_336, 2_359_808, 2_359_808, 2_359_808, 5_130]
    for model in (plain, batch_norm):
        parameters = all_parameters(model)
        assert all(layer["parameters"] == layer["formula"] for layer in parameters["layers"])
        assert sum(layer["formula"] for layer in parameters["layers"]) == parameters["trainable"]
        assert str(model) in describe(model) and f"{parameters['trainable']:,}" in describe(model)


def test_frozen_parameters_are_not_trainable(narrow):
    model = ConvNet()
    model.features.requires_grad_(False)
    assert count_parameters(model) == 10 * (16 + 1) == all_parameters(model)["trainable"]


def test_layers_stand_in_the_order_of_figure_10(narrow):
    def layers(**settings) -> list[str]:
        return [type(layer).__name__ for layer in ConvNet(**settings).features]

    assert layers() == ["Conv2d", "MaxPool2d", "ReLU"] * 5
    assert layers(batch_norm=True) == ["Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"] * 5
    assert layers(dropout=0.3) == ["Conv2d", "Dropout", "MaxPool2d", "ReLU"] * 5
    assert layers(dropout=0.3, dropout_after_pool=True) == ["Conv2d", "MaxPool2d", "ReLU", "Dropout"] * 5
    assert str(ConvNet().features[0]) == str(nn.Conv2d(3, 8, 3, padding=1))  # the printed network is the report's
    assert ConvNet()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_linear_layers_start_as_the_exercise_says():
    torch.manual_seed(0)
    classifier = ConvNet().classifier
    assert classifier.bias.count_nonzero() == 0
    assert abs(classifier.weight.std().item() / 1e-3 - 1) < 5 / math.sqrt(2 * 5_120)


def test_filter_grid_puts_every_filter_under_its_number():
    """Row by row, 16 to a row, for filters of 3 x 3 and others."""
    for size in (3, 5):
        weight = np.random.default_rng(0).uniform(-0.2, 0.2, (40, 3, size, size))
        grid = filter_grid(weight, scale=0.2)
        tiles = [filter_tile(number, size) for number in range(1, 41)]
        assert tiles == sorted(tiles) and [y for y, _ in tiles].count(tiles[0][0]) == 16
        assert tiles[36] == (tiles[32][0], tiles[4][1])  # filter 37: the third row, the fifth column
        for kernel, (y, x) in zip(weight, tiles):
            shown = grid[y : y + 8 * size : 8, x : x + 8 * size : 8].transpose(2, 0, 1)  # one of every 8 x 8 pixels
            np.testing.assert_allclose(shown, 0.5 + kernel / 0.4)
            assert (grid[y - 8 : y, x : x + 8 * size] == 1).all()  # room for its number


def test_panels_of_filters_share_one_scale():
    before, after = np.full((32, 3, 3, 3), 0.1), np.full((32, 3, 3, 3), 0.4)
    panels = visualize_filters({"before": before, "after": after}, "heading", scale=0.4).axes
    shown = [axes.images[0].get_array()[filter_tile(1, 3)] for axes in panels]
    np.testing.assert_allclose(shown, [[0.5 + 0.1 / 0.8] * 3, [1.0] * 3])
    for axes in panels:
        assert [text.get_text() for text in axes.texts] == [str(number) for number in range(1, 33)]
