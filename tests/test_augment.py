"""The augmentations of batches against torchvision's: the same images from the same parameters, drawn per image."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from common import ROOT
from parts import augment
from parts.augment import ColorJitter, Cutout, GaussianBlur, Grayscale, HorizontalFlip, RandomCrop

AUGMENTATIONS = [  # with settings that are not their defaults
    HorizontalFlip(p=0.3),
    RandomCrop(padding=3),
    Cutout(size=5),
    Grayscale(p=0.3),
    GaussianBlur(kernel_size=5, sigma=(0.2, 1.5), p=0.3),
    ColorJitter(brightness=0.1, contrast=0.2, saturation=0.3, hue=0.4, p=0.6),
]
EVERY = pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda augmentation: type(augmentation).__name__)
ADJUSTMENTS = ("brightness", "contrast", "saturation", "hue")
ORDERS = list(itertools.permutations(range(4)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_readmes_augmentation_works_as_it_stands():
    (code,) = re.findall(r"```python\n(@dataclass.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(code, space := dict(vars(augment)))  # noqa: S102 - our own README
    darkened = augment.augment(torch.ones(9, 3, 4, 4), (space["Darken"](0.5),), generator(), 9)
    shades = darkened.flatten(1).unique(dim=1)  # one for each image
    assert shades.shape == (9, 1) and len(shades.unique()) == 9 and 0.5 <= shades.min()


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
    raise NotImplementedError(f"torchvision's function that {augmentation} is to equal: add a case")


def assert_like_torchvision(augmentation, images: Tensor, *parameters: Tensor) -> Tensor:
    before = images.clone()
    ours = augmentation.apply(images, *parameters)
    assert torch.equal(images, before), "apply has changed its input"
    theirs = torch.stack([torchvision_image(augmentation, *row) for row in zip(images, zip(*parameters))])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # also compares shape and dtype
    return ours


@EVERY
def test_every_image_has_its_own_drawn_parameters(augmentation):
    """Also images that are not square, and none."""
    images = make_images(60)
    parameters = augmentation.draw(60, generator())
    ours = assert_like_torchvision(augmentation, images, *parameters)
    assert torch.equal(images[0], images[9]) and len(ours[::9].unique(dim=0)) > 1
    assert_like_torchvision(augmentation, images[:, :, :20], *parameters)
    assert augmentation.apply(images[:0], *(p[:0] for p in parameters)).shape == (0, 3, 32, 32)


def test_cutout_in_the_corners_and_blur_at_its_ends():
    images = make_images(60)
    for place in (0.0, 1 - 2**-24):  # the lowest and the highest that torch.rand draws
        ours = assert_like_torchvision(Cutout(8), images, torch.full((60,), place), torch.full((60,), place))
        assert (ours[0] != images[0]).sum() == 3 * 8 * 8
    sigma = torch.tensor([0.1, 2.0, 0.1001, 0.5, 1.0, 1.999]).repeat(10)
    assert_like_torchvision(GaussianBlur(13), images, torch.ones(60, dtype=torch.bool), sigma)
    with pytest.raises(ValueError, match="odd"):
        GaussianBlur(14)


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


@pytest.mark.parametrize("augmentation", [a for a in AUGMENTATIONS if hasattr(a, "p")], ids=repr)
def test_p_is_the_share_of_changed_images(augmentation):
    """Images that are not chosen keep the very same pixels."""
    images, parameters = torch.rand(40, 3, 32, 32, generator=generator(3)), augmentation.draw(40, generator(4))
    changed = (augmentation.apply(images, *parameters) != images).flatten(1).any(1)
    assert torch.equal(changed, parameters[0]) and 0 < changed.sum() < 40
    for p in (0.0, augmentation.p, 1.0):
        applied = dataclasses.replace(augmentation, p=p).draw(10_000, generator(7))[0]
        assert abs(applied.sum().item() - 10_000 * p) <= 4 * math.sqrt(10_000 * p * (1 - p))  # exact for p 0 and 1


@EVERY
def test_draws_come_from_the_generator_alone(augmentation):
    global_state, rng = torch.get_rng_state(), generator(5)
    first, again, later = (augmentation.draw(50, each) for each in (generator(5), rng, rng))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(torch.equal(a, b) and len(a) == 50 for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    assert kstest(values, "uniform", (low, high - low)).pvalue > 1e-4


def assert_equally_frequent(cases: Tensor, number: int) -> None:
    counts = cases.unique(dim=0, return_counts=True)[1]
    assert len(counts) == number and chisquare(counts).pvalue > 1e-4


def test_parameters_are_uniform_and_independent():
    assert_equally_frequent(torch.stack(RandomCrop(padding=4).draw(20_000, generator(8)), 1), 81)
    for place in Cutout().draw(20_000, generator(11)):
        assert_uniform(place, 0, 1)
    applied, sigma = GaussianBlur(sigma=(0.5, 1.0), p=0.5).draw(20_000, generator(12))
    for drawn in (sigma, sigma[applied]):  # whatever else was drawn
        assert_uniform(drawn, 0.5, 1.0)
    strengths = (1.5, 0.2, 0.3, 0.4)
    applied, order, factors = ColorJitter(*strengths, p=0.5).draw(20_000, generator(9))
    for number, name in enumerate(ADJUSTMENTS):
        assert_uniform(factors[:, number], *getattr(v2.ColorJitter(*strengths), name))  # torchvision's ranges
    assert_equally_frequent(order, 24)
    correlations = torch.corrcoef(torch.column_stack([applied, order[:, 0] == 3, factors]).T) - torch.eye(6)
    assert correlations.abs().max() < 4 / math.sqrt(20_000)  # no draw is used twice
