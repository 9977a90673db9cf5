import numpy as np
import torch
from torch import nn

from common import ConvNet, count_parameters, filter_grid, filter_tile, parameter_table, visualize_filters


def test_parameter_counts_are_the_reports():
    assert count_parameters(ConvNet()) == 7_678_474
    assert count_parameters(ConvNet(batch_norm=True)) == 7_682_826
    assert count_parameters(ConvNet(dropout=0.5)) == 7_678_474


def test_every_layer_agrees_with_the_reports_formulas():
    rows = parameter_table(ConvNet())
    assert [row["parameters"] for row in rows] == [3_584, 590_336, 2_359_808, 2_359_808, 2_359_808, 5_130]
    for model in (ConvNet(), ConvNet(batch_norm=True)):
        rows = parameter_table(model)
        assert [row["parameters"] for row in rows] == [row["formula"] for row in rows]
        assert sum(row["formula"] for row in rows) == count_parameters(model)


def test_frozen_parameters_are_not_counted():
    model = ConvNet()
    model.features.requires_grad_(False)
    assert count_parameters(model) == 5_130


def test_layers_stand_in_the_order_of_figure_10():
    def layers(**settings) -> list[str]:
        return [type(layer).__name__ for layer in ConvNet(**settings).features]

    assert layers() == ["Conv2d", "MaxPool2d", "ReLU"] * 5
    assert layers(batch_norm=True) == ["Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"] * 5
    assert layers(dropout=0.3) == ["Conv2d", "Dropout", "MaxPool2d", "ReLU"] * 5
    assert layers(dropout=0.3, dropout_after_pool=True) == ["Conv2d", "MaxPool2d", "ReLU", "Dropout"] * 5
    plain = nn.Conv2d(3, 128, 3, padding=1)
    assert str(ConvNet().features[0]) == str(plain)  # the printed network is the report's
    assert ConvNet()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_linear_layers_start_as_the_exercise_says():
    torch.manual_seed(0)
    classifier = ConvNet().classifier
    assert classifier.bias.count_nonzero() == 0
    assert 0.9e-3 < classifier.weight.std().item() < 1.1e-3


def test_filter_grid_puts_every_filter_under_its_number():
    weight = np.random.default_rng(0).uniform(-0.2, 0.2, (128, 3, 3, 3))
    grid = filter_grid(weight, scale=0.2)
    tiles = [filter_tile(number) for number in range(1, 129)]
    assert len({y for y, _ in tiles}) == 8 and len({x for _, x in tiles}) == 16
    for number, (y, x) in enumerate(tiles, 1):
        shown = grid[y : y + 24 : 8, x : x + 24 : 8].transpose(2, 0, 1)  # one pixel of every 8 x 8 square
        np.testing.assert_allclose(shown, 0.5 + weight[number - 1] / 0.4)
    assert (
        filter_tile(111)[0] == tiles[6 * 16][0] and filter_tile(111)[1] == tiles[14][1]
    )  # seventh row, fifteenth column


def test_panels_of_filters_share_one_scale():
    before, after = np.full((128, 3, 3, 3), 0.1), np.full((128, 3, 3, 3), 0.4)
    left, right = visualize_filters({"before": before, "after": after}, "heading", scale=0.4).axes
    shown = [axes.images[0].get_array()[filter_tile(1)] for axes in (left, right)]
    np.testing.assert_allclose(shown[1], 1.0)
    np.testing.assert_allclose(shown[0], 0.5 + 0.1 / 0.8)
    assert [text.get_text() for text in left.texts] == [str(n) for n in range(1, 129)]
