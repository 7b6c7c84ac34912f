"""The command line's networks, sized from the images [C, H, W] and the number of classes that they are for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "block_points", "cnn", "mlp", "paper_cnn", "resnet18", "resnet20", "wrn16_4"]


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


def paper_cnn(shape: tuple[int, int, int], classes: int, width: float = 1.0, norm: bool = False) -> nn.Sequential:
    """The paper's CNN for CIFAR-100: 5x5 convolutions 96-128-256, each with relu and 3x3/2 max-pooling, fc 2048-2048 with dropout.

    ``norm``: a BatchNorm behind each layer, which keeps the activities bounded while B is young; the authors have none. They pad the
    pooling at the bottom and the right; torch at the top and the left, which mirrors the images.
    """
    channels, height, side = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, units in enumerate((96, 128, 256), 1):
        units = round(units * width)
        layers[f"conv{i}"] = nn.Conv2d(channels, units, 5, padding=2)
        if norm:
            layers[f"bn{i}"] = nn.BatchNorm2d(units)
        layers[f"relu{i}"], layers[f"pool{i}"] = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        channels, height, side = units, (height + 1) // 2, (side + 1) // 2
    layers["flatten"] = nn.Flatten()
    features, hidden = channels * height * side, round(2048 * width)
    for i in (1, 2):
        layers[f"fc{i}"] = nn.Linear(features, hidden)
        if norm:
            layers[f"bn{i + 3}"] = nn.BatchNorm1d(hidden)
        layers[f"relu{i + 3}"], layers[f"dropout{i}"] = nn.ReLU(), nn.Dropout(0.5)
        features = hidden
    layers["out"] = nn.Linear(hidden, classes)
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """He et al. 2016: two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        h = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(h)) + shortcut)
        return out


class PreActivationBlock(nn.Module):
    """He et al. 2016b, Zagoruyko & Komodakis 2016: norm and relu before each convolution; a shortcut of another shape branches off behind
    the first of them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if stride != 1 or channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(h)), inplace=True)) + shortcut
        return out


def _residual(
    block: type[BasicBlock] | type[PreActivationBlock],
    shape: tuple[int, int, int],
    classes: int,
    stem: int,
    widths: Sequence[int],
    depth: int,
) -> nn.Sequential:
    """The stem for small images (3x3, no pooling), a stage of ``depth`` blocks for each of ``widths``, the head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=nn.Conv2d(shape[0], stem, 3, 1, 1, bias=False))
    if block is BasicBlock:
        layers["bn"], layers["relu"] = nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
    channels = stem
    for i, width in enumerate(widths, 1):
        blocks = [block(channels if j == 0 else width, width, 2 if i > 1 and j == 0 else 1) for j in range(depth)]
        layers[f"layer{i}"], channels = nn.Sequential(*blocks), width
    if block is PreActivationBlock:
        layers["bn"], layers["relu"] = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
    layers["pool"], layers["flatten"], layers["out"] = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    for layer in layers.values():
        for m in layer.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layers)


def resnet20(shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Sequential:
    """He et al. 2016 for CIFAR: three stages of three basic blocks, 16-32-64 wide, with 1x1 convolutions as shortcuts."""
    w = round(16 * width)
    return _residual(BasicBlock, shape, classes, w, (w, 2 * w, 4 * w), 3)


def resnet18(shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Sequential:
    """He et al. 2016, four stages of two basic blocks, 64-128-256-512 wide, with the stem that is usual for CIFAR."""
    w = round(64 * width)
    return _residual(BasicBlock, shape, classes, w, (w, 2 * w, 4 * w, 8 * w), 2)


def wrn16_4(shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Sequential:
    """Zagoruyko & Komodakis 2016, WRN-16-4: three stages of two pre-activation blocks, 64-128-256 wide."""
    w = round(16 * width)
    return _residual(PreActivationBlock, shape, classes, w, (4 * w, 8 * w, 16 * w), 2)


def block_points(net: nn.Module) -> list[str] | None:
    """For ``convert(points=)``: behind the stem and each residual block; None where there is none."""
    children = [name for name, _ in net.named_children()]
    blocks = [name for name, m in net.named_modules() if isinstance(m, (BasicBlock, PreActivationBlock))]
    return [children[children.index("layer1") - 1], *blocks] if blocks else None


# from shape and classes, and but for the first two from width, a factor of channels and hidden units
MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "mlp": mlp,
    "cnn": cnn,
    "paper_cnn": partial(paper_cnn, norm=True),
    "resnet20": resnet20,
    "resnet18": resnet18,
    "wrn16_4": wrn16_4,
}
