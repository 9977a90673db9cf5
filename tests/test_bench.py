import torch

import bench
from common import Run, Settings, build, make_optimizer, train_epoch

CPU = torch.device("cpu")


class Silent:
    """A progress bar that shows nothing."""

    def update(self, *_):
        pass

    def set_postfix_str(self, *_, **__):
        pass


def test_both_loops_take_the_same_step(small):
    """In float32, on the same batch, the plain loop's step is ours: the bench compares speed alone."""
    settings = Settings(data="cifar10-sample", precision="fp32", batch_size=120)
    run = Run("bench", settings)
    ours = build(run, CPU)
    train_epoch(ours, make_optimizer(ours, settings, CPU), small["train"], settings, 1, Silent())
    plain, adam = bench.plain_setup(run, CPU)
    images, labels = small["train"].batch(torch.arange(120), settings)
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    bench.plain_epoch(plain, adam, iter([(images.contiguous(), labels)]), 1, CPU)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if a.dim() > 1:  # the gradients agree to rounding; Adam makes a whole step of the rounding of a tiny one
            assert ((a - b).norm() / (b - start[name]).norm()).item() < 0.1, name
