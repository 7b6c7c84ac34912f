"""The command line's small networks, sized from the images [C, H, W] and the number of classes that they are for."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["MODELS", "cnn", "mlp"]


def mlp(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """The paper's 784-50-20-10 for grey images, 3072-200-100-K for colour; tanh, which learns faster than the paper's sigmoid."""
    channels, height, width = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    features = channels * height * width
    for i, units in enumerate((50, 20) if channels == 1 else (200, 100), 1):
        layers[f"fc{i}"], layers[f"tanh{i}"] = nn.Linear(features, units), nn.Tanh()
        features = units
    layers["out"] = nn.Linear(features, classes)
    return nn.Sequential(layers)


def cnn(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """SPEC 4's prototypes: 5x5 convolutions with tanh and 2x2 max-pooling, 16-32-fc128 for grey images, 32-64-64-fc256 for colour."""
    channels, height, width = shape
    widths, hidden = ((16, 32), 128) if channels == 1 else ((32, 64, 64), 256)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, units in enumerate(widths, 1):
        layers[f"conv{i}"] = nn.Conv2d(channels, units, 5, padding=2)
        layers[f"tanh{i}"], layers[f"pool{i}"] = nn.Tanh(), nn.MaxPool2d(2)
        channels, height, width = units, height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    layers["fc"], layers["tanh"] = nn.Linear(channels * height * width, hidden), nn.Tanh()
    layers["out"] = nn.Linear(hidden, classes)
    return nn.Sequential(layers)


MODELS = {"mlp": mlp, "cnn": cnn}
