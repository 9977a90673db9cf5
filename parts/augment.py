"""Augmentations of a batch, with one parameter set per image; given its parameters, each equals torchvision's function.

torchvision's random transforms draw one parameter set per call, hence one for a whole batch (torchvision issue 8484).
These draw one per image, in two steps:

    draw(n, rng) -> the parameters of n images, tensors [n, ...] on the CPU, from the generator `rng` alone
    apply(images, *parameters) -> new images; deterministic, float32 [B, 3, H, W] in [0, 1] on any device

An augmentation of your own is a frozen dataclass with these two methods; its repr names the checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF


def augment(images: Tensor, augmentations: tuple, rng: torch.Generator, n: int, part: slice = slice(None)) -> Tensor:
    """Draw for a batch of n images and apply to `images`, which are this part of it: float32 [b, 3, H, W] in [0, 1]."""
    for augmentation in augmentations:
        drawn = augmentation.draw(n, rng)
        images = augmentation.apply(images, *(values[part].to(images.device) for values in drawn))
    return images


def per_image(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], to broadcast over images."""
    return values.view(-1, 1, 1, 1)


@dataclass(frozen=True)
class HorizontalFlip:
    """torchvision's RandomHorizontalFlip(p)."""

    p: float = 0.5

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.rand(n, generator=rng) < self.p,)

    def apply(self, images: Tensor, applied: Tensor) -> Tensor:
        return torch.where(per_image(applied), TF.horizontal_flip(images), images)


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomCrop(size, padding, padding_mode="reflect") to the images' own size."""

    padding: int = 4

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return torch.randint(2 * self.padding + 1, (2, n), generator=rng).unbind()

    def apply(self, images: Tensor, top: Tensor, left: Tensor) -> Tensor:
        height, width = images.shape[2:]
        padded = F.pad(images, [self.padding] * 4, mode="reflect")
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, 3, top, left, H, W]
        return crops[torch.arange(len(images), device=images.device), :, top, left]


@dataclass(frozen=True)
class Cutout:
    """A square of size x size pixels, anywhere within the image, becomes grey (DeVries and Taylor 2017); as
    torchvision's `erase` with 0.5.
    """

    size: int = 8

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Where in [0, 1) of all places the square lies, down and across."""
        return torch.rand(2, n, generator=rng).unbind()

    def apply(self, images: Tensor, down: Tensor, across: Tensor) -> Tensor:
        rows, columns = (self._covered(place, length) for place, length in zip((down, across), images.shape[2:]))
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.5)

    def _covered(self, place: Tensor, length: int) -> Tensor:
        """[B] -> bool [B, length]: the pixels that the square covers along one edge."""
        start = (place * (length - self.size + 1)).long()[:, None]
        pixels = torch.arange(length, device=place.device)
        return (pixels >= start) & (pixels < start + self.size)


@dataclass(frozen=True)
class Grayscale:
    """torchvision's RandomGrayscale(p): three equal channels."""

    p: float = 0.1

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.rand(n, generator=rng) < self.p,)

    def apply(self, images: Tensor, applied: Tensor) -> Tensor:
        return torch.where(per_image(applied), TF.rgb_to_grayscale(images), images)


@dataclass(frozen=True)
class GaussianBlur:
    """torchvision's RandomApply([GaussianBlur(kernel_size, sigma)], p): sigma uniform between two bounds, in pixels.

    13 pixels hold a Gaussian of sigma 2 up to three sigma each way. Raises ValueError where kernel_size is even.
    """

    kernel_size: int = 13
    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.2

    def __post_init__(self) -> None:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return torch.rand(n, generator=rng) < self.p, torch.empty(n).uniform_(*self.sigma, generator=rng)

    def apply(self, images: Tensor, applied: Tensor, sigma: Tensor) -> Tensor:
        rows = applied.nonzero().squeeze(1)
        radius = self.kernel_size // 2
        offsets = torch.arange(-radius, radius + 1, device=images.device)
        kernel = torch.softmax(-((offsets / sigma[rows, None]) ** 2) / 2, dim=1)  # [b, kernel_size]
        blurred = F.pad(images[rows], [radius] * 4, mode="reflect")
        for dim in (2, 3):  # a Gaussian is separable: first along the columns, then along the rows
            size = images.shape[dim]
            blurred = sum(per_image(tap) * blurred.narrow(dim, i, size) for i, tap in enumerate(kernel.unbind(1)))
        return images.index_copy(0, rows, blurred)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = TF.rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(TF.rgb_to_grayscale(images), images, factor).clamp_(0, 1)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by `factor` of the full circle, through HSV, where a channel's value depends on the distance of the
    hue to the channel's own: it is the highest up to 60 degrees, the lowest from 120 on, and linear between.
    """
    r, g, b = images.split(1, dim=1)  # [B, 1, H, W] each
    low, high = images.amin(1, keepdim=True), images.amax(1, keepdim=True)
    chroma = high - low
    divisor = torch.where(chroma > 0, chroma, 1)  # grey has no hue; any will do
    hue = torch.where(high == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)  # in units of 60 degrees
    hue = torch.where(high == r, (g - b) / divisor, hue) + 6 * factor
    distance = hue - torch.tensor([0.0, 2.0, 4.0], device=images.device).view(1, 3, 1, 1)  # [B, 3, H, W]
    distance = (distance - 6 * (distance / 6).round_()).abs_()  # around the circle, in [0, 3]
    return high - chroma * (distance - 1).clamp_(0, 1)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)  # numbered as in torchvision


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's RandomApply([ColorJitter(brightness, contrast, saturation, hue)], p), in random order per image."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0

    def ranges(self) -> list[tuple[float, float]]:
        """Lowest and highest factor of each adjustment."""
        strengths = (self.brightness, self.contrast, self.saturation)
        return [*((max(0, 1 - s), 1 + s) for s in strengths), (-self.hue, self.hue)]

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        """applied [n]; order [n, 4], the numbers of the adjustments from first to last; factors [n, 4], by number."""
        applied = torch.rand(n, generator=rng) < self.p
        order = torch.rand(n, 4, generator=rng).argsort(1)
        factors = [torch.empty(n).uniform_(low, high, generator=rng) for low, high in self.ranges()]
        return applied, order, torch.stack(factors, 1)

    def apply(self, images: Tensor, applied: Tensor, order: Tensor, factors: Tensor) -> Tensor:
        images = images.clone()
        for turn in order.unbind(1):
            for number, (adjust, (low, high)) in enumerate(zip(ADJUSTMENTS, self.ranges())):
                if low < high:  # as in torchvision, an adjustment of strength 0 is left out
                    rows = (applied & (turn == number)).nonzero().squeeze(1)
                    images[rows] = adjust(images[rows], per_image(factors[rows, number]))
        return images
