"""CIFAR-100 by backprop and by learned feedback: ``python bench/gpu_train.py [--small] [--name N] DATA OUT MODEL/METHOD...``.

After each epoch OUT/MODEL-METHOD.run says how far the run is. 5,000 training images are held out and evaluated after each epoch; the test
set is read once, after the last. ``--small``: a few images once, to see that all of it runs. ``--name``: of the images, for each result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fbkernels as fb
from fbkernels.bench.rivals import cnn, resnet18

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HELD_OUT, STD, SEED = 128, 5000, 0.05, 0
EPOCHS = {"paper_cnn": 12, "resnet18": 8}  # what a GPU may have time for, four runs side by side
# share: of neighbouring places of a map, which have one row of B; a dense B of ResNet-18 has 55 million numbers
SHARE = {"paper_cnn": 1, "resnet18": 4}


def network(name: str) -> nn.Module:
    """The paper's CNN with BatchNorm behind each hidden layer, without which learned feedback runs away; or ResNet-18."""
    torch.manual_seed(SEED)
    if name == "resnet18":
        return resnet18()
    layers: list[nn.Module] = []
    for m in cnn():
        layers.append(m)
        if isinstance(m, nn.Conv2d):
            layers.append(nn.BatchNorm2d(m.out_channels))
        elif isinstance(m, nn.Linear) and m.out_features == 2048:
            layers.append(nn.BatchNorm1d(m.out_features))
    return nn.Sequential(*layers)


def learned(net: nn.Module, model: str, method: str, steps: int) -> nn.Module:
    """With feedback in place of backprop; B that learns has an epoch of ``steps`` for itself first."""
    if method == "weight-mirror":
        return fb.convert(net, feedback="layerwise", rule=fb.WeightMirror(), noise_std=STD, warmup=steps, seed=SEED)
    rule, warmup = {"joint": (fb.Joint(signal="output"), steps), "dfa": (fb.Fixed(), 0)}[method]
    return fb.convert(net, feedback="direct", rule=rule, noise_std=STD, warmup=warmup, share=SHARE[model], seed=SEED)


def optimizer(model: str, net: nn.Module) -> torch.optim.Optimizer:
    if model == "resnet18":
        return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)


def factor(step: int, steps: int) -> float:
    """Of the learning rate: it rises over the first twentieth, then falls as half a cosine."""
    rise = -(-steps // 20)
    return (step + 1) / rise if step < rise else (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def read(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """uint8 images, and their fine labels."""
    records = torch.from_numpy(np.fromfile(data / "cifar-100-binary" / f"{split}.bin", np.uint8).reshape(-1, 3074)).to(DEVICE)
    return records[:, 2:].reshape(-1, 3, 32, 32), records[:, 1].long()


def crop_and_flip(x: Tensor) -> Tensor:
    """Each image moved by up to 4 pixels, and half of them mirrored."""
    n, places = len(x), torch.arange(32, device=DEVICE)
    across, down = (places + torch.randint(9, (n, 1), device=DEVICE) for _ in range(2))
    across = torch.where(torch.rand(n, 1, device=DEVICE) < 0.5, across, across.flip(1))
    rows = torch.arange(n, device=DEVICE)[:, None, None, None]
    channels = torch.arange(3, device=DEVICE)[:, None, None]
    return F.pad(x, (4, 4, 4, 4))[rows, channels, down[:, None, :, None], across[:, None, None, :]]


class Images:
    def __init__(self, data: Path, small: bool) -> None:
        (x, y), test = read(data, "train"), read(data, "test")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        held = min(HELD_OUT, len(x) // 10)
        self.held, self.train = ((x[rows], y[rows]) for rows in (order[:held], order[held:]))
        self.test = test
        if small:
            self.held, self.train, self.test = ((x[:2], y[:2]) for x, y in (self.held, self.train, self.test))
        pixels = self.train[0].float() / 255
        self.mean, self.std = (t.view(3, 1, 1) for t in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))))

    def ready(self, x: Tensor) -> Tensor:
        return ((x / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def accuracy(net: nn.Module, images: Images, split: tuple[Tensor, Tensor]) -> float:
    net.eval()
    right = torch.zeros((), device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        for x, y in zip(split[0].split(1000), split[1].split(1000), strict=True):
            right += (net(images.ready(x)).argmax(1) == y).sum()
    net.train()
    return 100 * right.item() / len(split[1])


def train(model: str, method: str, images: Images, file: Path, facts: dict[str, Any], small: bool) -> None:
    batch, epochs = (2, 1) if small else (BATCH, EPOCHS[model])
    x, y = images.train
    per_epoch = len(x) // batch  # of whole batches
    net = network(model).to(DEVICE, memory_format=torch.channels_last)
    if method != "backprop":
        net = learned(net, model, method, 1 if small else per_epoch)
    criterion: nn.Module = nn.CrossEntropyLoss()
    if method != "backprop":
        criterion = fb.PerturbedLoss(criterion, net)
    descent = optimizer(model, net)
    rate = descent.param_groups[0]["lr"]
    run: dict[str, Any] = {"model": model, "method": method, **facts, "seed": SEED, "batch": batch, "epochs": epochs, "noise_std": STD}
    run |= {"lr": rate, "optimizer": type(descent).__name__, "complete": False, "epoch": []}

    def keep() -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(run) + "\n")
        os.replace(part, file)

    keep()
    torch.manual_seed(SEED)
    for epoch in range(epochs):
        start, total = time.perf_counter(), torch.zeros((), device=DEVICE)
        for i, rows in enumerate(torch.randperm(len(x), device=DEVICE)[: per_epoch * batch].split(batch)):
            for group in descent.param_groups:
                group["lr"] = rate * factor(epoch * per_epoch + i, epochs * per_epoch)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                loss = criterion(net(images.ready(crop_and_flip(x[rows]))), y[rows])
            descent.zero_grad()
            loss.backward()
            descent.step()
            total += loss.detach()
        train_loss = total.item() / per_epoch  # waits for the device
        seconds = time.perf_counter() - start
        validation = accuracy(net, images, images.held)
        numbers = {"train_loss": train_loss if math.isfinite(train_loss) else None, "validation": validation, "seconds": round(seconds, 3)}
        run["epoch"].append(numbers)
        print(
            f"{model} {method}, {facts['data']}: epoch {epoch + 1} of {epochs}, loss {train_loss:.3f}, validation {validation:.2f} %",
            flush=True,
        )
        keep()
    run |= {"test": accuracy(net, images, images.test), "complete": True}
    keep()
    print(f"{model} {method}, {facts['data']}: test {run['test']:.2f} % after {epochs} epochs", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--name", default="CIFAR-100")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", metavar="MODEL/METHOD")
    args = parser.parse_args()
    images = Images(args.data, args.small)
    facts = {"data": args.name, "torch": torch.__version__, "build": fb.build_info()}
    facts["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    for name in args.runs:
        model, method = name.split("/")
        train(model, method, images, args.out / f"{model}-{method}.run", facts, args.small)


if __name__ == "__main__":
    main()
