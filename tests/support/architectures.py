"""The networks that people train, as small as they stay what they are: torchvision's where it can be imported, else written here.

Each takes a batch [N, 3, 32, 32] to [N, 10].
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbkernels.lab import models

SHAPE, CLASSES = (3, 32, 32), 10


def vgg(norm: bool) -> nn.Module:
    """Simonyan & Zisserman 2015, VGG-11 (BatchNorm: Ioffe & Szegedy), a tenth as wide."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (6, "M", 12, "M", 24, 24, "M", 48, 48, "M", 48, 48, "M"):
        if isinstance(width, int):
            layers += [nn.Conv2d(channels, width, 3, padding=1), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2, 2))
    net = nn.Module()
    net.features, net.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((1, 1))
    net.classifier = nn.Sequential(
        nn.Linear(48, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, CLASSES)
    )
    return Forward(net, lambda m, x: m.classifier(torch.flatten(m.avgpool(m.features(x)), 1)))


class Forward(nn.Module):
    """A module with a hand-written forward."""

    def __init__(self, net: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.run = net, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.net, x)


class Bottleneck(nn.Module):
    """He et al. 2016; the stride is the 3x3 convolution's, as in torchvision. One relu module for all three."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet50(nn.Module):
    """He et al. 2016 with ImageNet's stem: 7x7, max-pooling."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool, self.avgpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d((1, 1))
        channels = width
        for i, depth in enumerate((3, 4, 6, 3)):
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(channels, width * 2**i, 2 if i and not j else 1))
                channels = 4 * width * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PaddedBlock(nn.Module):
    """He et al. 2016 for CIFAR, shortcut A: every other pixel, and zeros for the channels that are new. Functions in forward."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stride, self.new = stride, width - channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return F.relu(out + x, inplace=True)


def resnet56(width: int = 4) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    channels = width
    for i in range(3):
        layers += [PaddedBlock(channels if not j else width * 2**i, width * 2**i, 2 if i and not j else 1) for j in range(9)]
        channels = width * 2**i
    net = nn.Module()
    net.body, net.fc = nn.Sequential(*layers), nn.Linear(channels, CLASSES)
    return Forward(net, lambda m, x: m.fc(F.avg_pool2d(m.body(x), 8).view(x.size(0), -1)))


class DenseLayer(nn.Module):
    """Huang et al. 2017, with the 1x1 bottleneck: it reads all that came before."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        h = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return F.dropout(self.conv2(self.relu(self.norm2(h))), 0.2, self.training)


class DenseNet(nn.Module):
    def __init__(self, growth: int = 4, depths: tuple[int, ...] = (2, 2, 2)) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv0, self.stages, self.transitions = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.ModuleList(), nn.ModuleList()
        for i, depth in enumerate(depths):
            self.stages.append(nn.ModuleList(DenseLayer(channels + growth * j, growth) for j in range(depth)))
            channels += growth * depth
            if i + 1 < len(depths):
                parts = (
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(channels, channels // 2, 1, bias=False),
                    nn.AvgPool2d(2, 2),
                )
                self.transitions.append(nn.Sequential(*parts))
                channels //= 2
        self.norm, self.classifier = nn.BatchNorm2d(channels), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        for i, stage in enumerate(self.stages):
            features = [x]
            for layer in stage:
                features.append(layer(features))
            x = torch.cat(features, 1)
            if i < len(self.transitions):
                x = self.transitions[i](x)
        out = F.relu(self.norm(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018: expand, depthwise, project without an activation."""

    def __init__(self, channels: int, width: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = channels * expand
        conv = lambda i, o, k, s=1, g=1: [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]  # noqa: E731
        layers = [*conv(channels, hidden, 1), nn.ReLU6(inplace=True)] if expand != 1 else []
        layers += [*conv(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True), *conv(hidden, width, 1)]
        self.conv, self.residual = nn.Sequential(*layers), stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)]
        channels = 4
        for expand, width, depth, stride in ((1, 4, 1, 1), (6, 6, 2, 2), (6, 8, 2, 2)):
            for i in range(depth):
                layers.append(InvertedResidual(channels, width, stride if not i else 1, expand))
                channels = width
        layers += [nn.Conv2d(channels, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)]
        self.features, self.classifier = nn.Sequential(*layers), nn.Sequential(nn.Dropout(0.2), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class DropPath(nn.Module):
    """Huang et al. 2016, stochastic depth, as timm writes it: a sample's whole branch is dropped."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * mask.div_(1 - self.p)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.gamma, self.drop_path = nn.Parameter(0.1 * torch.ones(width)), DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        h = self.gamma * self.pwconv2(self.act(self.pwconv1(h)))
        return x + self.drop_path(h.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 16), depths: tuple[int, ...] = (2, 2)) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), LayerNorm2d(widths[0], eps=1e-6))])
        for a, b in itertools.pairwise(widths):
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(a, eps=1e-6), nn.Conv2d(a, b, 2, 2)))
        self.stages = nn.ModuleList(nn.Sequential(*(ConvNeXtBlock(w, 0.2) for _ in range(d))) for w, d in zip(widths, depths, strict=True))
        self.norm, self.head = nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean([-2, -1])))


class Attention(nn.Module):
    """As timm writes it: one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj, self.drop = heads, nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0).transpose(1, 2).reshape(B, N, C)
        return self.drop(self.proj(x))


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True) if fused else Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + (self.attention(h) if isinstance(self.attention, Attention) else self.attention(h, h, h, need_weights=False)[0])
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Dosovitskiy et al. 2021. ``fused``: nn.MultiheadAttention, as in torchvision."""

    def __init__(self, fused: bool, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, width, 8, 8), nn.Parameter(torch.randn(1, 1, width))
        self.position, self.drop = nn.Parameter(0.02 * torch.randn(1, 17, width)), nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(Encoder(width, 4, fused) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(n, -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(self.drop(x)))[:, 0])


class SqueezeExcite(nn.Module):
    """Hu et al. 2018: a map is read by its own gate, and multiplied with it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * self.up(F.relu(self.down(gate))).sigmoid()


class GatedBlock(nn.Module):
    """Tan & Le 2019: depthwise convolution, swish by hand, squeeze and excitation, a projection without an activation."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.conv1, self.bn1 = nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)
        self.gate, self.conv3, self.bn3 = SqueezeExcite(hidden), nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = swish(self.bn2(self.conv2(swish(self.bn1(self.conv1(x))))))
        h = self.bn3(self.conv3(self.gate(h)))
        return h + x if h.shape == x.shape else h


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


class PreActivation(nn.Module):
    """He et al. 2016b: norm and activation come first, and the shortcut reads what the branch reads or what came before them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if stride != 1 or channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class Inception(nn.Module):
    """Szegedy et al. 2015: four branches read one activity, and are joined."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        conv = lambda i, k: nn.Sequential(nn.Conv2d(i, width, k, padding=k // 2), nn.BatchNorm2d(width), nn.ReLU(True))  # noqa: E731
        self.b1, self.b2, self.b3 = conv(channels, 1), nn.Sequential(conv(channels, 1), conv(width, 3)), conv(channels, 5)
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)


class Joined(nn.Module):
    """A layer's map is read twice, by the layer above and by the joint with it, in either order."""

    def __init__(self, channels: int, width: int, first: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.first = nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            kept = F.avg_pool2d(x, 2)
            return torch.cat([kept, F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)], 1)
        h = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return torch.cat([h, F.avg_pool2d(x, 2)], 1)


class UNet(nn.Module):
    """Ronneberger et al. 2015: down, up, and across. Its map of classes is averaged."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))  # noqa: E731
        self.down1, self.down2, self.bottom = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join2, self.join1, self.head = block(4 * width, 2 * width), block(2 * width, width), nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        h = self.up2(self.bottom(F.max_pool2d(b, 2)))
        h = self.up1(self.join2(torch.cat([b, h], 1)))
        return self.head(self.join1(torch.cat([a, h], 1))).mean((2, 3))


class WindowedBlock(nn.Module):
    """Liu et al. 2021: attention in windows, which are rows of a larger batch, shifted by half a window in every other block."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, height, breadth, c = x.shape
        w = self.window
        h = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)) if self.shift else self.norm1(x)
        h = h.view(n, height // w, w, breadth // w, w, c).transpose(2, 3).reshape(-1, w * w, c)
        h = self.attention(h).view(n, height // w, breadth // w, w, w, c).transpose(2, 3).reshape(n, height, breadth, c)
        x = x + (torch.roll(h, (self.shift, self.shift), (1, 2)) if self.shift else h)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Swin(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, width, 4, 4), nn.Sequential(WindowedBlock(width, 2, 4, 0), WindowedBlock(width, 2, 4, 2))
        self.merge, self.norm, self.head = nn.Linear(4 * width, 2 * width), nn.LayerNorm(2 * width), nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patch(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)  # four neighbours are one token
        return self.head(self.norm(self.merge(x)).mean((1, 2)))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


def convmixer(width: int = 8, depth: int = 2) -> nn.Module:
    """Trockman & Kolter 2022: the norm comes behind the activation."""
    behind = lambda conv: nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(width))  # noqa: E731
    layers = [behind(nn.Conv2d(3, width, 4, 4))]
    for _ in range(depth):
        layers.append(
            nn.Sequential(Residual(behind(nn.Conv2d(width, width, 3, groups=width, padding=1))), behind(nn.Conv2d(width, width, 1)))
        )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class Skipped(nn.Module):
    """Huang et al. 2016, stochastic depth as the paper has it: by ``if``, for the whole batch, so the branch does not run at all."""

    def __init__(self, width: int, survival: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.survival = survival

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1).item() > self.survival:
            return x
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + (h if self.training else self.survival * h))


class TwoHeads(nn.Module):
    """Two output layers, joined in forward; neither is hidden."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.joined = nn.Conv2d(3, 4, 5, 4), nn.Linear(4 * 7 * 7, 16), joined
        self.head1, self.head2 = nn.Linear(16, 4 if joined else CLASSES), nn.Linear(16, 6 if joined else CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc(F.relu(self.conv(x)).flatten(1)))
        return torch.cat([self.head1(h), self.head2(h)], 1) if self.joined else self.head1(h) + self.head2(h)


class TimeFirst(nn.Module):
    """An image's rows as a sequence, time before batch, as in nn.LSTM and nn.TransformerEncoder by default."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(96, width), nn.LayerNorm(width), nn.Linear(width, width)
        self.mix, self.head = nn.Conv1d(32, 4, 1), nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.permute(2, 0, 1, 3).flatten(2)
        h = torch.tanh(self.fc2(F.relu(self.norm(self.fc1(h)))))
        return self.head(F.relu(self.mix(h.transpose(0, 1))).flatten(1))


class Shuffled(nn.Module):
    """Ma et al. 2018: half of the channels pass, the other half is convolved, and both are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        b = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(b)))))
        x = torch.cat([a, F.relu(b)], 1)
        n, c, height, width = x.shape
        return x.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)


def small(channels: int, *blocks: nn.Module, width: int) -> nn.Module:
    """A stem, blocks, and a linear head on the mean of what the blocks give, ``width`` channels."""
    stem = nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "paper_cnn": lambda: models.paper_cnn(SHAPE, CLASSES, 1 / 16),
    "vgg11": lambda: vgg(False),
    "vgg11_bn": lambda: vgg(True),
    "resnet18": lambda: models.resnet18(SHAPE, CLASSES, 1 / 16),
    "resnet20": lambda: models.resnet20(SHAPE, CLASSES, 1 / 4),
    "resnet50": ResNet50,
    "resnet56": resnet56,
    "wrn16_4": lambda: models.wrn16_4(SHAPE, CLASSES, 1 / 8),
    "densenet": DenseNet,
    "mobilenet_v2": MobileNetV2,
    "convnext": ConvNeXt,
    "vit": lambda: ViT(False),
    "vit_fused_attention": lambda: ViT(True),
}

if importlib.util.find_spec("torchvision"):
    from torchvision import models as torchvision

    ARCHITECTURES |= {
        "vgg11": lambda: torchvision.vgg11(num_classes=CLASSES),
        "vgg11_bn": lambda: torchvision.vgg11_bn(num_classes=CLASSES),
        "resnet50": lambda: torchvision.resnet50(num_classes=CLASSES, width_per_group=16),
        "mobilenet_v2": lambda: torchvision.mobilenet_v2(num_classes=CLASSES, width_mult=0.25),
    }

# what other people's code does that a feedback point has to bear: an activity with several readers, batches that are not in front
KINDS: dict[str, Callable[[], nn.Module]] = {
    "squeeze_excite": lambda: small(4, nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), SqueezeExcite(8), width=8),
    "efficientnet": lambda: small(4, GatedBlock(4, 4), GatedBlock(4, 6), width=6),
    # eight channels: torch 2.13 corrupts memory in the weight gradient of 1x1 convolutions of stride 2 that read 2 to 7, channels last
    "preact_resnet": lambda: small(8, PreActivation(8, 8, 1), PreActivation(8, 16, 2), PreActivation(16, 16, 1), width=16),
    "inception": lambda: small(4, Inception(4, 2), nn.MaxPool2d(2), Inception(8, 2), width=8),
    "dense_kept_first": lambda: small(4, Joined(4, 4, True), Joined(8, 4, True), width=12),
    "dense_kept_last": lambda: small(4, Joined(4, 4, False), Joined(8, 4, False), width=12),
    "unet": UNet,
    "swin": Swin,
    "convmixer": convmixer,
    "stochastic_depth": lambda: small(4, Skipped(4, 0.8), Skipped(4, 0.5), Skipped(4, 0.5), width=4),
    "two_heads_joined": lambda: TwoHeads(True),
    "two_heads_added": lambda: TwoHeads(False),
    "time_first": TimeFirst,
    "shufflenet": lambda: small(8, Shuffled(8), Shuffled(8), width=8),
}
