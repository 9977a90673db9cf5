"""The report's network, its parameters and the picture of its filters."""

import math

import numpy as np
import torch
from torch import nn

from common import ConvNet, all_parameters, count_parameters, describe, visualize_filters


def test_parameter_counts_are_the_reports_and_every_layers_its_formulas():
    with torch.device("meta"):
        plain, batch_norm, dropout = ConvNet(), ConvNet(batch_norm=True), ConvNet(dropout=0.5)
    counted = [layer["parameters"] for layer in all_parameters(plain)["layers"]]
    assert counted == [3_584, 590_336, 2_359_808, 2_359_808, 2_359_808, 5_130]
    for model, total in ((plain, 7_678_474), (batch_norm, 7_682_826), (dropout, 7_678_474)):
        parameters = all_parameters(model)
        assert count_parameters(model) == total
        assert all(layer["parameters"] == layer["formula"] for layer in parameters["layers"])
        assert sum(layer["formula"] for layer in parameters["layers"]) == total
        assert str(model) in describe(model) and f"{total:,}" in describe(model)


def test_layers_stand_in_the_order_of_figure_10(narrow):
    def layers(**settings) -> list[str]:
        return [type(layer).__name__ for layer in ConvNet(**settings).features]

    assert layers() == ["Conv2d", "MaxPool2d", "ReLU"] * 5
    assert layers(batch_norm=True) == ["Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"] * 5
    assert layers(dropout=0.3) == ["Conv2d", "Dropout", "MaxPool2d", "ReLU"] * 5
    assert layers(dropout=0.3, dropout_after_pool=True) == ["Conv2d", "MaxPool2d", "ReLU", "Dropout"] * 5
    assert str(ConvNet().features[0]) == str(nn.Conv2d(3, 8, 3, padding=1))  # the printed network is the report's
    assert ConvNet()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_network_starts_as_the_exercise_says():
    torch.manual_seed(0)
    model = ConvNet()
    assert model.classifier.bias.count_nonzero() == 0
    assert abs(model.classifier.weight.std().item() / 1e-3 - 1) < 5 / math.sqrt(2 * 5_120)
    torch.manual_seed(0)
    assert torch.equal(model.features[0].weight, nn.Conv2d(3, 128, 3).weight)  # the rest as PyTorch's layers


def test_every_filter_stands_under_its_number():
    """Row by row, 16 to a row; every panel on the one scale."""
    weight = np.random.default_rng(0).uniform(-0.2, 0.2, (40, 3, 3, 3)).astype(np.float32)
    panels = visualize_filters({"before": weight, "after": 4 * weight}, "heading", scale=0.4).axes
    for axes, shown in zip(panels, (weight, 4 * weight), strict=True):
        grid = axes.images[0].get_array()
        assert [text.get_text() for text in axes.texts] == [str(number) for number in range(1, 41)]
        places = [tuple(math.ceil(p) for p in text.get_position()) for text in axes.texts]  # x, y of a pixel
        assert places == sorted(places, key=lambda place: place[::-1])
        assert [y for _, y in places].count(places[0][1]) == 16
        for kernel, (x, y) in zip(shown, places):
            tile = grid[y : y + 3, x : x + 3].transpose(2, 0, 1)
            np.testing.assert_allclose(tile, np.clip(0.5 + kernel / 0.8, 0, 1), rtol=1e-6)
