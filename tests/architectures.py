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

from fbkernels import models

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


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "paper_cnn": lambda: models.paper_cnn(SHAPE, CLASSES, 1 / 16),
    "vgg11": lambda: vgg(False),
    "vgg11_bn": lambda: vgg(True),
    "resnet18": lambda: models.resnet18(SHAPE, CLASSES, 4),
    "resnet20": lambda: models.resnet20(SHAPE, CLASSES, 4),
    "resnet50": ResNet50,
    "resnet56": resnet56,
    "wrn16_4": lambda: models.wrn16_4(SHAPE, CLASSES, 2),
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
