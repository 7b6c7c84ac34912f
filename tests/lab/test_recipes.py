"""Recipes for CIFAR: what a model trains with, and that augmentation, schedule and the split of the data are what they say."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import interrupt, metrics, same_results
from torch import nn

from fbkernels.lab import cli, models
from fbkernels.lab import train as job
from fbkernels.lab.data import crop_and_flip, draw_crops

pytestmark = pytest.mark.filterwarnings("ignore:.*were published")
SHORT = {"epochs": 2, "batch_size": 32, "validation": 20, "threads": 1}
N, TEST = 100, 30


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> str:
    """CIFAR-10 and CIFAR-100 of 100 + 30 images of noise, in the published binary format."""
    folder = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    for name, n, labels in (
        *((f"data_batch_{i}", N // 5, 1) for i in range(1, 6)),
        ("test_batch", TEST, 1),
        ("train", N, 2),
        ("test", TEST, 2),
    ):
        records = rng.integers(0, 256, (n, labels + 3072), dtype=np.uint8)
        records[:, :labels] = rng.integers(0, 10, (n, labels))
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return str(folder)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, width in (
        ("paper_cnn", 0.05),
        ("resnet20", 1 / 2),
        ("resnet18", 1 / 8),
        ("wrn16_4", 1 / 8),
    ):  # fewer channels crash torch: layers.py
        monkeypatch.setitem(models.MODELS, name, partial(models.MODELS[name], width=width))


def test_every_model_has_a_recipe_that_converts(cifar: str) -> None:
    assert job.RECIPES.keys() == models.MODELS.keys()
    for model in models.MODELS:
        s = job.recipe(data="cifar100", model=model)
        assert s.validation == 5000
        assert s.augment == (model not in ("mlp", "cnn"))
        assert s.dtype == "float32"
        dropped = {"dtype"} & job.RECIPES[model].keys() | ({"share"} & job.RECIPES[model].keys())
        assert {k for k, v in job.RECIPES[model].items() if getattr(s, k) != v} == dropped
        for method in s.methods if s.augment else ():
            net, criterion, optimizer = job.build(replace(s, warmup=0), method, 0, (3, 32, 32), 100)
            criterion(net(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
            assert optimizer.param_groups[0]["weight_decay"] == s.weight_decay
            assert all(p.grad is not None for p in net.parameters())


def test_what_is_given_comes_first() -> None:
    plain = job.recipe(data="cifar10", model="resnet20")
    assert plain.optimizer == "momentum"
    s = job.recipe(data="cifar10", model="resnet20", optimizer="adam", epochs=3, augment=False, validation=7)
    assert (s.lr, s.weight_decay, s.epochs, s.augment, s.validation, s.batch_size) == (None, 0.0, 3, False, 7, plain.batch_size)
    assert job.recipe(model="resnet20", optimizer="adam", lr=0.5).lr == 0.5
    assert job.recipe() == job.Settings()
    s = job.recipe(model="resnet20", feedback="direct", rule="joint")
    assert (s.share, job.build(s, "joint", 0, (1, 8, 8), 10)[0].feedback.settings.share) == (4, 4)
    assert job.build(s, "weight-mirror", 0, (1, 8, 8), 10)[0].feedback.settings.share == 1
    s = job.recipe(model="paper_cnn", rank=3)
    ranked = {
        m: job.build(s, m, 0, (1, 8, 8), 10)[0].feedback.settings.rank for m in ("joint", "dfa", "weight-mirror", "node-perturbation")
    }
    assert ranked == {"joint": 3, "dfa": 3, "weight-mirror": None, "node-perturbation": None}
    s = job.recipe(model="resnet20")  # digits
    assert (s.augment, s.validation) == (False, 0)


def test_crops_are_those_of_slices() -> None:
    crops = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    x = torch.randint(1, 256, (len(crops), 3, 6, 10), dtype=torch.uint8)
    padded = torch.zeros(len(x), 3, 14, 18, dtype=torch.uint8)
    padded[:, :, 4:10, 4:14] = x
    out = crop_and_flip(x, crops)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for n, (i, j, mirrored) in enumerate(crops.tolist()):
        expected = padded[n, :, i : i + 6, j : j + 10]
        assert torch.equal(out[n], expected.flip(2) if mirrored else expected)
    assert torch.equal(crop_and_flip(x, torch.tensor([4, 4, 0]).expand(len(x), 3)), x)


def test_crops_are_drawn_uniformly() -> None:
    n = 162_000
    crops = draw_crops(n, torch.Generator().manual_seed(3))
    counts = (crops[:, 0] * 18 + crops[:, 1] * 2 + crops[:, 2]).bincount()
    assert len(counts) == 162
    # chi squared has mean 161 and variance 322 over the 162 kinds of crops
    assert abs(((counts - 1000.0) ** 2 / 1000).sum() - 161) < 5 * math.sqrt(322)
    assert torch.equal(crops, draw_crops(n, torch.Generator().manual_seed(3)))


def test_schedule() -> None:
    assert {job.lr_factor("constant", t, 50) for t in range(50)} == {1.0}
    f = [job.lr_factor("cosine", t, 100) for t in range(100)]
    assert f[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert f[5:] == pytest.approx([(1 + math.cos(math.pi * t / 95)) / 2 for t in range(95)])
    assert 0 < f[-1] < 3e-4
    assert [job.lr_factor("cosine", t, 2) for t in (0, 1)] == [1.0, 1.0]
    assert job.lr_factor("cosine", 0, 1) == 1.0


def test_a_job_is_the_plain_loop(cifar: str, tmp_path: Path) -> None:
    """With torch's own schedule and smoothing, and the slices that the crops stand for."""
    s = job.recipe(data="cifar10", data_dir=cifar, model="resnet20", rule="backprop", compare=(), label_smoothing=0.1, **SHORT)
    job.train(s, tmp_path / "x")
    data = job._Images(s)
    torch.set_num_threads(s.threads)
    torch.manual_seed(0)
    net = models.MODELS["resnet20"](data.shape, 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: job.lr_factor("cosine", t, 6) if t < 6 else 0.0)
    for epoch in range(2):
        for rows, crops in data.epoch(0, epoch, 32):
            images = nn.functional.pad(data.train[0][rows], (4, 4, 4, 4))
            cut = [x[:, i : i + 32, j : j + 32] for x, (i, j, _) in zip(images, crops.tolist(), strict=True)]
            x = torch.stack([c.flip(2) if m else c for c, m in zip(cut, crops[:, 2].tolist(), strict=True)])
            x = ((x / 255 - data.mean) / data.std).contiguous(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(net(x), data.train[1][rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in torch.load(tmp_path / "x" / "backprop-0.pt").items())


def test_validation_images_are_carved_and_the_test_set_is_read_once(cifar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = job.recipe(data="cifar10", data_dir=cifar, model="paper_cnn", compare=("backprop",), seeds=(0, 1), **SHORT)
    data = job._Images(s)
    loaded = job.load("cifar10", cifar)
    assert [len(y) for _, y in (data.train, data.held, data.test)] == [80, 20, 30]
    both = torch.cat((data.train[0], data.held[0])).flatten(1)
    assert torch.equal(both.unique(dim=0), loaded.train_x.flatten(1).unique(dim=0))
    assert not torch.equal(data.held[0], loaded.train_x[-20:])
    assert torch.allclose(data.batch(data.train, slice(None))[0].mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.equal(data.held[0], job._Images(s).held[0])

    read = []
    batch = job._Images.batch

    def counted(self: job._Images, split: tuple, rows: slice | torch.Tensor, crops: torch.Tensor | None = None) -> tuple:
        x, y = batch(self, split, rows, crops)
        if split is self.test:
            read.append(len(y))
        return x, y

    monkeypatch.setattr(job._Images, "batch", counted)
    records = job.train(s, tmp_path / "x")
    assert read == [TEST] * 4  # two methods, two seeds
    assert [r["test_accuracy"] is None for r in records] == [True, False] * 4
    assert all(0 <= r["val_accuracy"] <= 100 and r["val_loss"] > 0 for r in records)
    job.train(s, tmp_path / "x", checkpoint=job.load_checkpoint(tmp_path / "x")[1])
    assert len(read) == 4


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("paper_cnn", {"compare": ("backprop", "weight-mirror")}),  # dropout; a rival with another feedback
        ("paper_cnn", {"compare": (), "dtype": "bfloat16", "label_smoothing": 0.1}),
        ("wrn16_4", {"compare": ()}),
        ("wrn16_4", {"compare": (), "feedback": "direct", "rule": "joint", "points": "block", "rule_args": {"lr": 0.1}}),
    ],
)
def test_resume_in_mid_epoch_is_bit_for_bit(cifar: str, tmp_path: Path, model: str, options: dict) -> None:
    s = job.recipe(data="cifar10", data_dir=cifar, model=model, **SHORT, **options)
    job.train(s, tmp_path / "whole")
    torch.manual_seed(5)  # resumed in another process
    interrupt(s, tmp_path / "parts", 1, 3, 4, 6 * len(s.methods) - 1)
    assert same_results(tmp_path / "whole", tmp_path / "parts")


def test_compiled_steps_are_the_eager_ones(cifar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    given = {"data": "cifar10", "data_dir": cifar, "model": "paper_cnn", "compare": (), **SHORT, "epochs": 1}
    eager, compiled = (job.train(job.recipe(**given, compile=c), tmp_path / str(c)) for c in (False, True))
    for a, b in zip(eager, compiled, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_points_for_residual_blocks() -> None:
    for model, stem, stages, depth in (("resnet20", "relu", 3, 3), ("resnet18", "relu", 4, 2), ("wrn16_4", "conv", 3, 2)):
        s = job.recipe(data="cifar10", model=model, feedback="direct", rule="joint", points="block", warmup=0)
        net, criterion, _ = job.build(s, "joint", 0, (3, 32, 32), 10)
        criterion(net(torch.randn(2, 3, 32, 32)), torch.arange(2)).backward()
        assert list(net.feedback.points) == [stem, *(f"layer{i + 1}.{j}" for i in range(stages) for j in range(depth))]
        assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "paper_cnn", "points": "block"}, "points must be 'layer' with paper_cnn, which has no residual blocks, got 'block'"),
        ({"model": "resnet20", "points": "block"}, "points must be 'layer' and share 1 with layerwise feedback, got 'block' and 1"),
        ({"model": "resnet20", "share": 4}, "points must be 'layer' and share 1 with layerwise feedback, got 'layer' and 4"),
        ({"model": "paper_cnn", "share": 0}, r"share must be an integer in \[1, .*\], got 0"),
        ({"model": "resnet20", "rank": 4}, "rank must be None with layerwise feedback, got 4"),
        ({"model": "paper_cnn", "rank": 0}, r"rank must be an integer in \[1, .*\], got 0"),
        ({"model": "cnn", "feedback": "direct", "rule": "joint", "rank": 11}, "rank must be at most 10, the classes of cifar10, got 11"),
        ({"model": "resnet20", "rule": "joint", "compile": True}, "compile: joint cannot be compiled in layerwise feedback"),
        ({"model": "cnn", "width": 0.5}, "width must be 1 with cnn, got 0.5"),
        ({"model": "paper_cnn", "width": 0}, "width must be a finite number > 0, got 0"),
        ({"model": "resnet20", "compare": ("kolen-pollack",)}, "kolen-pollack needs .*: optimizer adam or sgd, schedule constant"),
        ({"validation": 100}, "validation must be less than 100, the training images of cifar10, got 100"),
        ({"validation": -1}, r"validation must be an integer in \[0, .*\], got -1"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be .*, got 1.0"),
        ({"weight_decay": -1.0}, r"weight_decay must be .*, got -1.0"),
        ({"dtype": "float16"}, "dtype must be one of 'float32', 'bfloat16', got 'float16'"),
    ],
)
def test_bad_settings(cifar: str, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job.train(job.recipe(**{"data": "cifar10", "data_dir": cifar, "validation": 20, **options}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_command_line(cifar: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        f"train --data cifar10 --data-dir {cifar} --model paper_cnn --epochs 2 --validation 20 --no-augment --threads 1 --out {tmp_path}/x"
    )
    assert cli.main(words.split()) == 0
    s = job.load_checkpoint(tmp_path / "x")[0]
    assert s == job.recipe(data="cifar10", data_dir=cifar, model="paper_cnn", epochs=2, validation=20, augment=False, threads=1)
    out, err = capsys.readouterr()
    lines = [line.split() for line in err.splitlines() if line.split()[:1] and line.split()[0] in s.methods]
    assert [line[:3] for line in lines] == [[m, "0", str(e)] for m in s.methods for e in (1, 2)]
    for line, record in zip(lines, metrics(tmp_path / "x"), strict=True):
        assert line[5] == f"{record['val_accuracy']:.2f}"
        assert line[6] == ("-" if record["epoch"] == 1 else f"{record['test_accuracy']:.2f}")
    assert "test %" in out
