"""The augmentations of batches against torchvision's: the same images from the same parameters, drawn for each image."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from parts.augment import ColorJitter, Cutout, GaussianBlur, Grayscale, HorizontalFlip, RandomCrop, augment

AUGMENTATIONS = [  # with settings that are not their defaults
    HorizontalFlip(p=0.3),
    RandomCrop(padding=3),
    Cutout(size=5),
    Grayscale(p=0.3),
    GaussianBlur(kernel_size=5, sigma=(0.2, 1.5), p=0.3),
    ColorJitter(brightness=0.1, contrast=0.2, saturation=0.3, hue=0.4, p=0.6),
]
EVERY = pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda augmentation: type(augmentation).__name__)
WITH_P = pytest.mark.parametrize("augmentation", [a for a in AUGMENTATIONS if hasattr(a, "p")], ids=repr)
ADJUSTMENTS = ("brightness", "contrast", "saturation", "hue")
ORDERS = list(itertools.permutations(range(4)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_images(n: int, size: int = 32) -> Tensor:
    """[n, 3, size, size], cycling through what is hard."""
    rng = generator(1)
    noise = torch.rand(3, size, size, generator=rng)
    grey = torch.rand(1, size, size, generator=rng).expand(3, -1, -1)
    equal_channels, pure_colours = (torch.randint(k, (3, size, size), generator=rng) / (k - 1) for k in (4, 2))
    nearly_grey = (grey + 1e-6 * (noise - 0.5)).clamp(0, 1)
    black, white = torch.zeros(3, size, size), torch.ones(3, size, size)
    kinds = [noise, grey, equal_channels, pure_colours, nearly_grey, black, white, 0.01 * noise, 1 - 0.01 * noise]
    return torch.stack([kinds[i % len(kinds)] for i in range(n)])


def torchvision_image(augmentation, image: Tensor, parameters: list[Tensor]) -> Tensor:
    """What torchvision's functions make of one image [3, H, W] with its own row of parameters."""
    match augmentation:
        case HorizontalFlip():
            return TF.horizontal_flip(image) if parameters[0] else image
        case RandomCrop(padding=padding):
            top, left = (p.item() for p in parameters)
            return TF.crop(TF.pad(image, [padding] * 4, padding_mode="reflect"), top, left, *image.shape[1:])
        case Cutout(size=size):
            top, left = (int(place * (edge - size + 1)) for place, edge in zip(parameters, image.shape[1:]))
            return TF.erase(image, top, left, size, size, torch.tensor(0.5))
        case Grayscale():
            return TF.rgb_to_grayscale(image, num_output_channels=3) if parameters[0] else image
        case GaussianBlur(kernel_size=size):
            return TF.gaussian_blur(image, [size, size], [parameters[1].item()] * 2) if parameters[0] else image
        case ColorJitter():
            applied, order, factors = parameters
            for number in order.tolist() if applied else []:
                if getattr(augmentation, ADJUSTMENTS[number]):
                    image = getattr(TF, f"adjust_{ADJUSTMENTS[number]}")(image, factors[number].item())
            return image


def assert_like_torchvision(augmentation, images: Tensor, *parameters: Tensor) -> None:
    before = images.clone()
    ours = augmentation.apply(images, *parameters)
    assert torch.equal(images, before), "apply has changed its input"
    theirs = torch.stack([torchvision_image(augmentation, *row) for row in zip(images, zip(*parameters))])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # also compares shape and dtype


@EVERY
def test_drawn_parameters(augmentation):
    """Also on images that are not square, and on none."""
    images = make_images(60)
    parameters = augmentation.draw(60, generator())
    assert_like_torchvision(augmentation, images, *parameters)
    assert_like_torchvision(augmentation, images[:, :, :20], *parameters)
    assert augmentation.apply(images[:0], *(p[:0] for p in parameters)).shape == (0, 3, 32, 32)


@EVERY
def test_each_image_has_its_own_parameters(augmentation):
    """An image alone becomes what it becomes among others; equal images become different ones."""
    images = torch.rand(1, 3, 32, 32, generator=generator(3)).repeat(12, 1, 1, 1)
    parameters = augmentation.draw(12, generator(2))
    together = augmentation.apply(images, *parameters)
    for i in range(12):
        alone = augmentation.apply(images[i : i + 1], *(p[i : i + 1] for p in parameters))
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=0)
    assert len(together.unique(dim=0)) > 1


@pytest.mark.parametrize("place", [0.0, 1 - 2**-24])  # the lowest and the highest that torch.rand draws
def test_cutout_in_the_corners(place):
    images, place = torch.rand(1, 3, 32, 32, generator=generator(3)), torch.tensor([place])
    assert_like_torchvision(Cutout(8), images, place, place)
    assert (Cutout(8).apply(images, place, place) != images).sum() == 3 * 8 * 8


@pytest.mark.parametrize("kernel_size", [1, 3, 13])
def test_blur_sigmas(kernel_size):
    sigma = torch.tensor([0.1, 2.0, 0.1001, 0.5, 1.0, 1.999]).repeat(10)
    assert_like_torchvision(GaussianBlur(kernel_size), make_images(60), torch.ones(60, dtype=torch.bool), sigma)
    with pytest.raises(ValueError, match="odd"):
        GaussianBlur(kernel_size + 1)


@pytest.mark.parametrize("number", range(4), ids=ADJUSTMENTS)
def test_one_adjustment_alone(number):
    """On every kind of image, at the ends of its range and where the hue changes sector."""
    values = [-0.5, -1 / 3, -1 / 6, -1e-6, 0, 1e-6, 1 / 6, 1 / 3, 0.5] if number == 3 else [0, 1e-6, 0.5, 1, 1.5, 3]
    n = 9 * len(values)
    factors = torch.full((n, 4), 0.3)  # those of the others must not matter
    factors[:, number] = torch.tensor(values).repeat_interleave(9)
    order = torch.tensor(ORDERS)[torch.arange(n) % 24]
    jitter = ColorJitter(**{ADJUSTMENTS[number]: 0.5})
    assert_like_torchvision(jitter, make_images(n), torch.ones(n, dtype=torch.bool), order, factors)


def test_adjustments_in_every_order():
    """All 24 orders with all combinations of the ends of the ranges."""
    jitter = ColorJitter(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5)
    ends = list(itertools.product((0.0, 2.0), (0.0, 2.0), (0.0, 2.0), (-0.5, 0.25, 0.5)))
    order, factors = map(torch.tensor, zip(*itertools.product(ORDERS, ends)))
    applied = torch.ones(len(order), dtype=torch.bool)
    assert_like_torchvision(jitter, make_images(len(order), size=8), applied, order, factors)


@WITH_P
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_p_is_the_share_of_changed_images(augmentation, p):
    """Images that are not chosen keep the very same pixels."""
    augmentation, n = dataclasses.replace(augmentation, p=p), 10_000
    images, parameters = torch.rand(40, 3, 32, 32, generator=generator(3)), augmentation.draw(40, generator(4))
    changed = (augmentation.apply(images, *parameters) != images).flatten(1).any(1)
    assert torch.equal(changed, parameters[0])
    applied = augmentation.draw(n, generator(7))[0]
    assert abs(applied.sum().item() - n * p) <= 4 * math.sqrt(n * p * (1 - p))  # exact for p 0 and 1


def test_augmentations_follow_one_another():
    images, rng, crop, cutout = make_images(12), generator(5), RandomCrop(), Cutout()
    offsets, places = crop.draw(12, rng), cutout.draw(12, rng)
    expected = cutout.apply(crop.apply(images, *offsets), *places)
    assert torch.equal(augment(images, (crop, cutout), generator(5), 12), expected)


@EVERY
def test_draws_come_from_the_generator_alone(augmentation):
    global_state = torch.get_rng_state()
    first = augmentation.draw(50, generator(5))
    assert torch.equal(torch.get_rng_state(), global_state)
    rng = generator(5)
    again, later = augmentation.draw(50, rng), augmentation.draw(50, rng)
    assert all(len(p) == 50 and p.device.type == "cpu" for p in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Kolmogorov and Smirnov's test; by chance it fails about once in 10,000 times."""
    assert values.min() >= low - 1e-6 and values.max() <= high + 1e-6
    expected = torch.linspace(low, high, len(values))
    assert (values.sort().values - expected).abs().max() < 2.23 * (high - low) / math.sqrt(len(values))


def assert_equally_frequent(cases: Tensor, number: int) -> None:
    """Pearson's test; by chance it fails about once in 10,000 times (the normal approximation)."""
    counts = cases.unique(dim=0, return_counts=True)[1]
    expected = len(cases) / number
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert len(counts) == number and abs(statistic - (number - 1)) < 3.9 * math.sqrt(2 * (number - 1))


@pytest.mark.parametrize("strengths", [(0.1, 0.2, 0.3, 0.4), (1.5, 1.0, 0.6, 0.5)])
def test_jitter_draws_from_torchvisions_ranges(strengths):
    applied, order, factors = ColorJitter(*strengths, p=0.5).draw(20_000, generator(9))
    theirs = v2.ColorJitter(*strengths)
    for number, name in enumerate(ADJUSTMENTS):
        assert_uniform(factors[:, number], *getattr(theirs, name))
    assert_equally_frequent(order, 24)
    correlations = torch.corrcoef(torch.column_stack([applied, order[:, 0] == 3, factors]).T) - torch.eye(6)
    assert correlations.abs().max() < 4 / math.sqrt(20_000)  # no draw is used twice


def test_places_and_sigmas_are_uniform():
    assert_equally_frequent(torch.stack(RandomCrop(padding=4).draw(20_000, generator(8)), 1), 81)
    for place in Cutout().draw(20_000, generator(11)):
        assert_uniform(place, 0, 1)
    applied, sigma = GaussianBlur(sigma=(0.5, 1.0), p=0.5).draw(20_000, generator(12))
    assert_uniform(sigma, 0.5, 1.0)
    assert_uniform(sigma[applied], 0.5, 1.0)  # whatever else was drawn


@EVERY
def test_its_repr_holds_every_setting(augmentation):
    """It names the checkpoints."""
    assert all(getattr(augmentation, f.name) != f.default for f in dataclasses.fields(augmentation))
    assert eval(repr(augmentation)) == augmentation
