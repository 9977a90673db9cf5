import torch

import bench
import common
from common import Run, Settings, Split, build, convnet
from parts.layers import Conv2d, Dropout
from q4_vgg_transfer import VGG, vgg

CPU = torch.device("cpu")


def test_both_loops_take_the_same_step(small, monkeypatch):
    """In float32, on the same batch, the plain loop's step is ours: the bench compares speed alone."""
    settings, models = Settings(precision="fp32", batch_size=24), []
    run, split = Run("bench", settings), Split(small["train"].images[:24], small["train"].labels[:24])
    monkeypatch.setattr(common, "load_data", lambda *_: {"train": split})
    monkeypatch.setattr(bench, "build", lambda *of: models.append(build(*of)) or models[-1])
    bench.our_loop.__wrapped__(run, convnet, None, CPU)(1)
    plain, adam = bench.plain_setup(run, convnet, CPU)
    images, labels = split.batch(torch.arange(24), settings)
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    bench.plain_epoch(plain, adam, iter([(images.contiguous(), labels)]), 1, CPU)
    for (name, a), b in zip(models[0].named_parameters(), plain.parameters(), strict=True):
        if a.dim() > 1:  # the gradients agree to rounding; Adam makes a whole step of the rounding of a tiny one
            assert ((a - b).norm() / (b - start[name]).norm()).item() < 0.1, name


def test_the_plain_network_is_pytorchs_own_with_our_weights(narrow):
    for settings, network in ((Settings(dropout=0.5), convnet), (VGG, vgg)):
        ours = build(Run("bench", settings), CPU, network)
        plain, _ = bench.plain_setup(Run("bench", settings), network, CPU)
        assert not any(isinstance(layer, (Conv2d, Dropout)) for layer in plain.modules())
        assert str(plain) == str(ours)
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values()))
        assert all(p.is_contiguous() and p.requires_grad for p in plain.parameters())
