"""The batch-wise augmentations against torchvision: the same images for the same parameters, the same distributions."""

import dataclasses
import itertools
import math

import pytest
import torch
from PIL import ImageFilter
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.transforms.v2.functional import to_pil_image

import q3_augment_dropout
from augment import ColorJitter, Cutout, GaussianBlur, Grayscale, HorizontalFlip, RandomCrop

AUGMENTATIONS = [
    HorizontalFlip(p=0.5),
    RandomCrop(padding=4),
    Cutout(size=8),
    Grayscale(p=0.2),
    GaussianBlur(kernel_size=13, sigma=(0.1, 2.0), p=0.2),
    GaussianBlur(kernel_size=5, sigma=(0.1, 2.0), p=0.5),
    ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
    ColorJitter(brightness=1.5, contrast=1.5, saturation=1.5, hue=0.5),
    ColorJitter(contrast=0.5, hue=0.2, p=0.5),
]
EVERY = pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=repr)
ORDERS = list(itertools.permutations(range(4)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_images(n: int, size: int = 32) -> Tensor:
    """[n, 3, size, size], cycling through what is hard: equal channels, saturated colours, greys and nearly greys."""
    rng = generator(1)
    noise = torch.rand(3, size, size, generator=rng)
    grey = torch.rand(1, size, size, generator=rng).expand(3, -1, -1)
    kinds = [
        noise,
        torch.randint(256, (3, size, size), generator=rng) / 255,  # as images are stored
        torch.randint(4, (3, size, size), generator=rng) / 3,  # often two channels are equal
        torch.randint(2, (3, size, size), generator=rng).float(),  # black, white and the pure colours
        grey,
        (grey + 1e-6 * (noise - 0.5)).clamp(0, 1),
        0.01 * noise,
        1 - 0.01 * noise,
        torch.zeros(3, size, size),
        torch.ones(3, size, size),
    ]
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
            names = ("brightness", "contrast", "saturation", "hue")
            for number in order.tolist() if applied else []:
                if getattr(augmentation, names[number]):
                    image = getattr(TF, f"adjust_{names[number]}")(image, factors[number].item())
            return image


def assert_like_torchvision(augmentation, images: Tensor, *parameters: Tensor) -> None:
    before = images.clone()
    ours = augmentation.apply(images, *parameters)
    assert torch.equal(images, before), "apply has changed its input"
    theirs = torch.stack([torchvision_image(augmentation, *row) for row in zip(images, zip(*parameters))])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # also compares shape and dtype
    assert ours.min() >= 0 and ours.max() <= 1 + 1e-6


# ------------------------------------------------------------------------------------------------------------- apply


@EVERY
def test_apply_random_parameters(augmentation):
    images = make_images(60)
    assert_like_torchvision(augmentation, images, *augmentation.draw(60, generator()))


def test_flip_and_grayscale_choose_images():
    images, applied = make_images(20), torch.arange(20) % 3 == 0
    assert_like_torchvision(HorizontalFlip(), images, applied)
    assert_like_torchvision(Grayscale(), images, applied)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_every_offset(padding):
    offsets = torch.cartesian_prod(torch.arange(2 * padding + 1), torch.arange(2 * padding + 1))
    top, left = offsets.unbind(1)
    images = torch.rand(len(offsets), 3, 32, 32, generator=generator(13))  # no two columns alike: every shift shows
    assert_like_torchvision(RandomCrop(padding), images, top, left)
    unshifted = (top == padding) & (left == padding)
    assert torch.equal(RandomCrop(padding).apply(images, top, left)[unshifted], images[unshifted])


def test_crop_keeps_rectangles():
    images = make_images(9)[:, :, :20]  # [9, 3, 20, 32]
    top, left = RandomCrop(4).draw(9, generator())
    assert_like_torchvision(RandomCrop(4), images, top, left)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 9, 13])
def test_blur_sigmas(kernel_size):
    sigma = torch.tensor([0.1, 2.0, 0.1001, 0.5, 1.0, 1.999]).repeat(10)
    assert_like_torchvision(GaussianBlur(kernel_size), make_images(60), torch.ones(60, dtype=torch.bool), sigma)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_blur_is_nearly_pils(sample, sigma):
    """The report blurs with PIL's GaussianBlur(radius), whose radius is the sigma: three box blurs that repeat the edge.

    Within 0.006 of the full range on average over the images, and 0.02 at any pixel away from the edges.
    """
    images = sample["train"].images[:100]
    pil = [to_pil_image(image).filter(ImageFilter.GaussianBlur(sigma)) for image in images]
    theirs = torch.stack([TF.pil_to_tensor(image) for image in pil]) / 255
    ours = q3_augment_dropout.BLUR.apply(images / 255, torch.ones(100, dtype=torch.bool), torch.full((100,), sigma))
    difference = (ours - theirs).abs()
    assert difference.mean() < 0.006 and difference[:, :, 6:-6, 6:-6].max() < 0.02


@pytest.mark.parametrize("number", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_jitter_single_adjustment(number):
    """Each adjustment alone, on every kind of image, at the ends of its range and where the hue changes sector."""
    values = [-0.5, -1 / 3, -1 / 6, -1e-6, 0, 1e-6, 1 / 6, 1 / 3, 0.5] if number == 3 else [0, 1e-6, 0.5, 1, 1.5, 3]
    jitter = ColorJitter(**{("brightness", "contrast", "saturation", "hue")[number]: 0.5})
    n = 10 * len(values)
    factors = torch.full((n, 4), 0.3)  # those of the others must not matter
    factors[:, number] = torch.tensor(values).repeat_interleave(10)
    order = torch.tensor(ORDERS)[torch.arange(n) % 24]
    assert_like_torchvision(jitter, make_images(n), torch.ones(n, dtype=torch.bool), order, factors)


def test_jitter_every_order_with_edge_factors():
    """All 24 orders with all 24 combinations of the ends of the ranges; the orders give different images."""
    jitter = ColorJitter(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5)
    edges = list(itertools.product((0.0, 2.0), (0.0, 2.0), (0.0, 2.0), (-0.5, 0.25, 0.5)))
    order, factors = zip(*itertools.product(ORDERS, edges))
    applied = torch.ones(len(order), dtype=torch.bool)
    assert_like_torchvision(
        jitter, make_images(len(order), size=8), applied, torch.tensor(order), torch.tensor(factors)
    )
    same = make_images(1).expand(24, -1, -1, -1)
    jittered = jitter.apply(same, applied[:24], torch.tensor(ORDERS), torch.tensor([[1.7, 0.4, 1.9, 0.2]] * 24))
    assert len({image.numpy().tobytes() for image in jittered}) == 24


def test_jitter_of_strength_0_is_left_out():
    images = make_images(20)
    _, order, factors = ColorJitter().draw(20, generator())
    assert factors.unique(dim=0).tolist() == [[1, 1, 1, 0]]
    assert torch.equal(ColorJitter().apply(images, torch.ones(20, dtype=torch.bool), order, factors), images)


@EVERY
def test_apply_treats_each_image_alone(augmentation):
    images = make_images(12)
    parameters = augmentation.draw(12, generator(2))
    together = augmentation.apply(images, *parameters)
    for i in range(12):
        alone = augmentation.apply(images[i : i + 1], *(p[i : i + 1] for p in parameters))
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [HorizontalFlip, Grayscale, GaussianBlur, ColorJitter])
def test_p(kind):
    """p = 0 and images not chosen: the very same pixels; p = 1: every image is changed."""
    settings = {
        GaussianBlur: {"sigma": (0.5, 1.0)},  # at sigma 0.1 nothing changes
        ColorJitter: {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.5},
    }.get(kind, {})
    images = torch.rand(40, 3, 32, 32, generator=generator(3))
    for p in (0.0, 0.5, 1.0):
        augmentation = kind(**settings, p=p)
        parameters = augmentation.draw(40, generator(4))
        changed = (augmentation.apply(images, *parameters) != images).flatten(1).any(1)
        assert torch.equal(changed, parameters[0])
        assert changed.any() == (p > 0) and changed.all() == (p == 1)


@EVERY
def test_empty_batch(augmentation):
    assert augmentation.apply(make_images(1)[:0], *augmentation.draw(0, generator())).shape == (0, 3, 32, 32)


# -------------------------------------------------------------------------------------------------------------- draw


@EVERY
def test_draw_depends_on_the_generator_alone(augmentation):
    torch.manual_seed(0)
    global_state = torch.get_rng_state()
    first = augmentation.draw(50, generator(5))
    assert torch.equal(torch.get_rng_state(), global_state)
    torch.manual_seed(1)
    rng = generator(5)
    again, later = augmentation.draw(50, rng), augmentation.draw(50, rng)
    assert all(len(p) == 50 and p.device.type == "cpu" for p in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


def chi_square(counts: Tensor) -> float:
    """Pearson's statistic of counts that should be equal."""
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_bound(cells: int) -> float:
    """Exceeded by chance about once in 10,000 times (Wilson and Hilferty's approximation, 3.72 standard deviations)."""
    df = cells - 1
    return df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3


def assert_same_distribution(ours: Tensor, theirs: Tensor) -> None:
    """Kolmogorov and Smirnov's test of two samples; the bound is exceeded by chance about once in 10,000 times."""
    points = torch.cat([ours, theirs]).sort().values
    cdfs = [torch.searchsorted(s.sort().values, points, right=True) / len(s) for s in (ours, theirs)]
    assert (cdfs[0] - cdfs[1]).abs().max() < 2.23 * math.sqrt(1 / len(ours) + 1 / len(theirs))


def torchvision_draws(transform: v2.Transform, names: list[str], n: int = 1500) -> Tensor:
    """[n, len(names)], n draws by torchvision for an image, from its global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        draws = [transform.make_params([torch.zeros(3, 32, 32)]) for _ in range(n)]
    return torch.tensor([[draw[name] for name in names] for draw in draws])


@pytest.mark.parametrize("kind", [HorizontalFlip, Grayscale, GaussianBlur, ColorJitter])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_rate_of_p(kind, p):
    n = 10_000
    applied = kind(p=p).draw(n, generator(7))[0]
    assert applied.dtype == torch.bool
    assert abs(applied.sum().item() - n * p) <= 4 * math.sqrt(n * p * (1 - p))  # exact for p 0 and 1


def test_crop_offsets_are_uniform():
    top, left = RandomCrop(padding=4).draw(20_000, generator(8))
    theirs = torchvision_draws(v2.RandomCrop(32, padding=4), ["top", "left"])
    for ours, column in zip((top, left), theirs.unbind(1)):
        assert torch.equal(ours.unique(), column.unique())  # 0 to 8
        assert_same_distribution(ours.float(), column.float())
    cells = torch.bincount(9 * top + left, minlength=81)
    assert chi_square(cells) < chi_square_bound(81)  # uniform each, and independent of each other


@pytest.mark.parametrize("strength, hue", [(0.4, 0.1), (1.0, 0.5), (1.5, 0.25)])
def test_jitter_factors(strength, hue):
    names = ["brightness", "contrast", "saturation", "hue"]
    transform = v2.ColorJitter(strength, strength, strength, hue)
    theirs = torchvision_draws(transform, [f"{name}_factor" for name in names])
    applied, order, factors = ColorJitter(strength, strength, strength, hue, p=0.5).draw(10_000, generator(9))
    for number, name in enumerate(names):
        low, high = getattr(transform, name)
        ours, slack = factors[:, number], 0.01 * (high - low)
        assert low - 1e-6 <= ours.min() < low + slack and high - slack < ours.max() <= high + 1e-6
        assert_same_distribution(ours, theirs[:, number])
    drawn = torch.column_stack([applied, order[:, 0] == 3, factors]).T
    correlations = torch.corrcoef(drawn) - torch.eye(6)
    assert correlations.abs().max() < 4 / math.sqrt(10_000)  # no draw is used twice


def test_jitter_factors_in_their_columns():
    """With four different strengths, each column has the range of its own adjustment."""
    factors = ColorJitter(brightness=0.1, contrast=0.2, saturation=0.3, hue=0.4).draw(10_000, generator(10))[2]
    torch.testing.assert_close(factors.amax(0), torch.tensor([1.1, 1.2, 1.3, 0.4]), atol=1e-3, rtol=0)
    torch.testing.assert_close(factors.amin(0), torch.tensor([0.9, 0.8, 0.7, -0.4]), atol=1e-3, rtol=0)


def test_jitter_orders_are_equally_likely():
    order = ColorJitter().draw(24_000, generator(11))[1]
    orders, counts = order.unique(dim=0, return_counts=True)
    assert orders.tolist() == [list(o) for o in ORDERS]
    assert chi_square(counts) < chi_square_bound(24)


@pytest.mark.parametrize("sigma", [(0.1, 2.0), (0.5, 1.0)])
def test_blur_sigma_is_uniform(sigma):
    theirs = torchvision_draws(v2.GaussianBlur(3, sigma), ["sigma"])[:, 0, 0]
    applied, ours = GaussianBlur(3, sigma, p=0.5).draw(10_000, generator(12))
    assert sigma[0] - 1e-6 <= ours.min() and ours.max() <= sigma[1] + 1e-6
    assert_same_distribution(ours, theirs)
    assert torch.corrcoef(torch.stack([applied.float(), ours]))[0, 1].abs() < 4 / math.sqrt(10_000)


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "augmentation",
    [
        HorizontalFlip(p=0.3),
        RandomCrop(padding=3),
        Grayscale(p=0.3),
        GaussianBlur(kernel_size=5, sigma=(0.2, 1.5), p=0.3),
        ColorJitter(brightness=0.1, contrast=0.2, saturation=0.3, hue=0.4, p=0.6),
    ],
    ids=lambda augmentation: type(augmentation).__name__,
)
def test_repr_holds_every_setting(augmentation):
    """Every setting differs from its default: a repr that leaves one out gives another augmentation back."""
    assert all(getattr(augmentation, f.name) != f.default for f in dataclasses.fields(augmentation))
    assert eval(repr(augmentation)) == augmentation


def test_every_run_of_question_3_is_a_trajectory_of_its_own():
    runs = q3_augment_dropout.RUNS
    twice = {"baseline", "baseline_20"}  # one trajectory, read at 30 and at 20 epochs
    assert len({run.settings.key() for run in runs}) == len(runs) - 1
    assert len({run.settings.key() for run in runs if run.name in twice}) == 1


def test_an_even_blur_is_refused():
    with pytest.raises(ValueError, match="odd"):
        GaussianBlur(kernel_size=4)
