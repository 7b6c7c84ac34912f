"""Training loops as people write them: each feature on a converted network does to W what it does to the plain one, and nothing to B."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ViT
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import fbkernels as fb
from fbkernels.lab import models

GENERATOR = torch.Generator().manual_seed(1)
IMAGES, LABELS = torch.randn(28, 3, 12, 12, generator=GENERATOR), torch.randint(5, (28,), generator=GENERATOR)


pytestmark = pytest.mark.usefixtures("one_thread")


class ResNet(nn.Module):
    """A stem, a plain and a downsampling block, the second checkpointed or not."""

    def __init__(self, checkpointed: bool = False, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3, padding=1, bias=False), norm(6), nn.ReLU(inplace=True)
        self.layer1, self.layer2 = models.BasicBlock(6, 6, 1), models.BasicBlock(6, 12, 2)
        for block, width in ((self.layer1, 6), (self.layer2, 12)):
            block.bn1, block.bn2 = norm(width), norm(width)
        self.drop, self.fc, self.checkpointed = nn.Dropout(0.2), nn.Linear(12, 5), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = checkpoint(self.layer1, x, use_reentrant=False) if self.checkpointed else self.layer1(x)
        x = checkpoint(self.layer2, x, use_reentrant=False) if self.checkpointed else self.layer2(x)
        return self.fc(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def build(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(**options).to(dtype)


METHODS: dict[str, dict[str, Any]] = {
    "backprop": {"feedback": "layerwise", "rule": fb.WeightTransport()},
    "direct": {"rule": fb.Joint(signal="output"), "noise_std": 0.1},
    "mirror": {"feedback": "layerwise", "rule": fb.WeightMirror(), "noise_std": 0.1},
}


def convert(method: str, model: nn.Module, **options: Any) -> nn.Module:
    how = METHODS[method]
    return fb.convert(model, **{**how, "rule": copy.deepcopy(how["rule"]), "seed": 3, **options})


def batches(dtype: torch.dtype, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """The last one is a partial one."""
    return list(zip(IMAGES.to(dtype).split(size), LABELS.split(size), strict=True))


def fit(
    net: nn.Module,
    *,
    criterion: Any = None,
    accumulate: int = 1,
    clip: float | None = None,
    decay: float = 0.0,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    average: Callable[[nn.Module], Any] | None = None,
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    format: torch.memory_format = torch.contiguous_format,
    compiler: str | None = None,
    epochs: int = 2,
    steps: tuple[int, int] = (0, 100),
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """A training job; returns its losses."""
    dtype = next(net.parameters()).dtype
    loss_of = nn.CrossEntropyLoss() if criterion is None else criterion
    if hasattr(net, "feedback"):
        loss_of = fb.PerturbedLoss(loss_of, net)
    bare = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": decay}, {"params": bare, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True) if optimizer is None else optimizer
    scheduler, losses = None if schedule is None else schedule(optimizer), []

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return loss_of(net(x), y)

    run = forward if compiler is None else torch.compile(forward, fullgraph=True, backend=compiler)
    for i, (x, y) in list(enumerate(batches(dtype) * epochs))[slice(*steps)]:
        torch.manual_seed(i)  # of dropout
        x, y = (x.to(memory_format=format), y) if mix is None else mix(x, y)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = run(x, y) / accumulate
        (loss if scaler is None else scaler.scale(loss)).backward()
        losses.append(loss.item())
        if (i + 1) % accumulate:
            continue
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        if average is not None:
            average(net)
    return losses


def state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def plain_part(net: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in state(net).items() if ".feedback." not in k}


def learned_part(net: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in state(net).items() if ".feedback." in k}


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for key, want in b.items():
        limit = tolerance * max(float(want.abs().max()), 1e-3) if want.is_floating_point() else 0
        torch.testing.assert_close(a[key], want, rtol=0, atol=limit, msg=lambda m, key=key: f"{key}: {m}")


def warm_up_and_cosine(optimizer: torch.optim.Optimizer) -> Any:
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
    ]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, [3])


def mixup(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Zhang et al. 2018: one target of both classes' shares."""
    share, order = 0.3, torch.arange(len(x)).flip(0)
    hot = F.one_hot(y, 5).to(x.dtype)
    return share * x + (1 - share) * x[order], share * hot + (1 - share) * hot[order]


FEATURES: dict[str, dict[str, Any]] = {
    "partial last batch": {},
    "gradient accumulation": {"accumulate": 2},
    "gradient clipping": {"clip": 0.5},
    "weight decay of some": {"decay": 0.01},
    "learning rate schedule": {"schedule": warm_up_and_cosine},
    "one cycle": {"schedule": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=8)},
    "label smoothing": {"criterion": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "mixup": {"mix": mixup},
    "mixup and smoothing": {"mix": mixup, "criterion": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "sum of losses": {"criterion": nn.CrossEntropyLoss(reduction="sum"), "clip": 1.0},
    "all at once": {"mix": mixup, "accumulate": 2, "clip": 0.5, "decay": 0.01, "schedule": warm_up_and_cosine},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_job_with_backprops_B_is_the_plain_job(feature: str) -> None:
    plain, net = build(), convert("backprop", build())
    losses = fit(net, **FEATURES[feature])
    torch.testing.assert_close(losses, fit(plain, **FEATURES[feature]), rtol=1e-10, atol=0)
    close(plain_part(net), plain_part(plain), 1e-9)  # eight steps magnify the roundings


@pytest.mark.parametrize("method", ["direct", "mirror"])
def test_a_job_goes_on_in_the_middle_of_an_epoch_bit_for_bit(method: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    net, other = (convert(method, build(torch.float32)) for _ in range(2))
    nn.init.normal_(other.fc.weight)
    optimizers = [torch.optim.AdamW(n.parameters(), 1e-2) for n in (net, other)]
    fit(net, optimizer=optimizers[0], steps=(0, 5))
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    torch.save(optimizers[0].state_dict(), tmp_path / "optimizer.pt")
    losses = fit(net, optimizer=optimizers[0], steps=(5, 8))
    other.load_state_dict(safetensors.load_file(tmp_path / "net.safetensors"))
    optimizers[1].load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert fit(other, optimizer=optimizers[1], steps=(5, 8)) == losses
    ours, theirs = state(other), state(net)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_an_average_of_weights(method: str, buffers: bool) -> None:
    """torch's AveragedModel of the converted network, made before the first step, when there is no B, is that of the plain weights."""
    model = build()
    net, x = convert(method, model), IMAGES.double()
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers) for m in (net, model)]
    both = lambda _: [a.update_parameters(m) for a, m in zip(averages, (net, model), strict=True)]  # noqa: E731
    fit(net, average=both)
    before = learned_part(net)
    for evaluated in (False, True):
        ours, theirs = (plain_part(a.module) for a in averages)
        assert ours.keys() == theirs.keys()
        close(ours, theirs, 1e-12 if evaluated else 0.0)
        assert torch.equal(averages[0].eval()(x), averages[1].eval()(x))
        for a in averages:
            torch.manual_seed(0)
            update_bn([x[:14], x[14:]], a)
    assert all(torch.equal(v, before[k]) for k, v in learned_part(net).items())
    assert not torch.equal(averages[0].module.fc.weight, net.fc.weight)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_activations(method: str) -> None:
    """As with the plain network, statistics of a checkpointed norm take the batch twice."""
    for dtype, tolerance in ((torch.float64, 0.0), (torch.float32, 2e-3)):
        nets = [convert(method, build(dtype, checkpointed=c)) for c in (False, True)]
        losses = [fit(net) for net in nets]
        torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
        kept, again = ({k: v for k, v in state(net).items() if "running" not in k and "num_batches" not in k} for net in nets)
        close(again, kept, tolerance)
        plain = build(dtype, checkpointed=True)
        fit(plain)
        assert torch.equal(plain.layer1.bn1.num_batches_tracked, nets[1].layer1.bn1.num_batches_tracked)


def test_checkpointed_attention() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for method in METHODS:
        results = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            model = ViT(False)
            model.blocks = Checkpointed(*model.blocks) if checkpointed else model.blocks
            net = convert(method, model)
            criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
            for seed in range(2):
                torch.manual_seed(seed)
                criterion(net(images), labels).backward()
            results.append([p.grad for p in net.parameters()] + list(learned_part(net).values()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_that_would_lose_gradients_are_refused(method: str) -> None:
    class Reentrant(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.layer1, self.relu(self.bn(self.conv(x))), use_reentrant=True)
            return self.fc(self.layer2(x).mean((2, 3)))

    with pytest.raises(ValueError, match=r"needs use_reentrant=False"):
        convert(method, Reentrant())(IMAGES[:8])
    if method == "direct":
        net = convert(method, build(checkpointed=True))
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        step = torch.compile(lambda x, y: criterion(net(x), y), fullgraph=True, backend="eager")
        with pytest.raises(Exception, match=r"leave torch.utils.checkpoint out of a compiled step"):
            step(IMAGES[:8].double(), LABELS[:8])


@pytest.mark.parametrize("method", METHODS)
def test_parametrized_weights(method: str) -> None:
    """Weight and spectral norm; in warm-up they are constants as well."""

    def make() -> nn.Module:
        model = build()
        nn.utils.parametrizations.weight_norm(model.layer2.conv1)
        nn.utils.parametrizations.spectral_norm(model.layer1.conv1)
        return model

    plain, net, warming = make(), convert(method, make()), convert(method, make(), warmup=9)
    losses = fit(net), fit(plain)
    if method == "backprop":
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    before = {k: p.detach().clone() for k, p in warming.named_parameters()}
    fit(warming)
    assert all(torch.equal(p, before[k]) for k, p in warming.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_channels_last(method: str) -> None:
    nets = [convert(method, build()), convert(method, build().to(memory_format=torch.channels_last))]
    losses = [fit(nets[0]), fit(nets[1], format=torch.channels_last)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    close(state(nets[1]), state(nets[0]), 1e-7)
    assert nets[1].conv.weight.grad is None or nets[1].conv.weight.is_contiguous(memory_format=torch.channels_last)


class Halved(torch.amp.GradScaler):
    """With a step that overflows: it is skipped, and the scale halved."""

    def scale(self, outputs: Tensor) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().scale(outputs) * (float("inf") if self.calls == 3 else 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_loss_scaling(dtype: torch.dtype, method: str) -> None:
    """As far from float32 as the plain network is; B learns the same bits from a scaled loss."""

    def job(net: nn.Module, **options: Any) -> nn.Module:
        fit(net, steps=(0, 2), **options)
        return net

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def distance(make: Callable[[], nn.Module]) -> float:
        pairs = zip(job(make()).parameters(), job(make(), autocast=dtype, scaler=scaler()).parameters(), strict=True)
        return max(float((a - b).norm() / a.norm()) for a, b in pairs)

    make = lambda: convert(method, build(torch.float32))  # noqa: E731
    limit = distance(lambda: build(torch.float32))
    assert 0 < distance(make) < 2 * limit + 2.0**-8
    first = [make() for _ in range(2)]
    fit(first[0], steps=(0, 1), autocast=dtype), fit(first[1], steps=(0, 1), autocast=dtype, scaler=scaler())
    kept, scaled = map(learned_part, first)
    assert all(torch.equal(scaled[k], v) and v.isfinite().all() for k, v in kept.items())
    assert {v.dtype for k, v in kept.items() if k.endswith(".B")} <= {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_overflows_is_skipped(method: str) -> None:
    net, scaler = convert(method, build(torch.float32)), Halved("cpu", init_scale=2.0**8)
    fit(net, steps=(0, 2), scaler=scaler)
    before = plain_part(net)
    fit(net, steps=(2, 3), scaler=scaler)
    after = plain_part(net)
    assert all(torch.equal(after[k], before[k]) for k, p in net.named_parameters())
    assert scaler.get_scale() == 2.0**7
    assert all(v.isfinite().all() for v in learned_part(net).values())
    fit(net, steps=(3, 8), scaler=scaler)
    assert any(not torch.equal(p, before[k]) for k, p in net.named_parameters())
    assert int(net.feedback.step) == 8
    assert all(v.isfinite().all() for v in state(net).values())


def test_a_compiled_step_is_the_eager_one() -> None:
    torch._dynamo.reset()
    eager, net = (convert("direct", build()) for _ in range(2))
    for n in (eager, net):
        n.drop.p = 0.0
    losses = fit(eager, epochs=1, clip=0.5), fit(net, epochs=1, clip=0.5, compiler="aot_eager")
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    close(state(net), state(eager), 1e-8)


def test_a_second_loss_of_the_same_output_says_what_to_do() -> None:
    net = convert("direct", build())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    out = net(IMAGES[:8].double())
    criterion(out, LABELS[:8])
    with pytest.raises(ValueError, match=r"must be called once, .* mixup mixes the targets instead of the losses"):
        criterion(out, LABELS[:8].flip(0))


@pytest.mark.parametrize("options", [{}, {"fraction": 0.5}, {"antithetic": True}, {"fraction": 0.5, "antithetic": True}], ids=str)
def test_a_target_of_several_parts(options: dict[str, Any]) -> None:
    """Mixup as it is often written: two targets and their shares, here one for each sample."""
    x, y, share = IMAGES[:8].double(), LABELS[:8], torch.linspace(0.1, 0.9, 8).double()

    def mixed(out: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        a, b, share = target
        return share * F.cross_entropy(out, a, reduction="none") + (1 - share) * F.cross_entropy(out, b, reduction="none")

    hot = F.one_hot(y, 5).double()
    soft = share[:, None] * hot + (1 - share[:, None]) * hot.flip(0)
    results = []
    for criterion, target in ((mixed, (y, y.flip(0), share)), (nn.CrossEntropyLoss(reduction="none"), soft)):
        net = convert("direct", build(), **options)
        torch.manual_seed(0)
        fb.PerturbedLoss(criterion, net)(net(x), target).sum().backward()
        results.append({**{k: p.grad for k, p in net.named_parameters()}, **learned_part(net)})
    close(*results, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_sync_batch_norm_in_one_process_is_batch_norm(method: str) -> None:
    nets = [convert(method, build()), convert(method, nn.SyncBatchNorm.convert_sync_batchnorm(build()))]
    assert fit(nets[0]) == fit(nets[1])
    ours, theirs = map(state, nets)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], v) for k, v in theirs.items())


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda n: nn.GroupNorm(2, n),
    "instance": lambda n: nn.InstanceNorm2d(n, affine=True),
    "batch without statistics": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
    "cumulative batch": lambda n: nn.BatchNorm2d(n, momentum=None),
    "none": lambda n: nn.Identity(),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm: str) -> None:
    plain, net = build(norm=NORMS[norm]), convert("backprop", build(norm=NORMS[norm]))
    assert fit(net) == pytest.approx(fit(plain), rel=1e-10)
    close(plain_part(net), plain_part(plain), 1e-9)
    direct = convert("direct", build(norm=NORMS[norm]), noise_std=1e-9)
    direct(IMAGES[:8].double())
    moved = direct.feedback.current.changes[0].abs().max()
    assert 1e-13 < float(moved) < 1e-6


DROPS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout in place": lambda x: F.dropout(x * 1, 0.4, inplace=True),
    "dropout2d": lambda x: F.dropout2d(x, 0.4),
    "timm": lambda x: x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.6).div_(0.6),
    "torchvision": lambda x: x * torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(0.6).div_(0.6),
    "floor of rand": lambda x: x.div(0.6) * (0.6 + torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)).floor_(),
    "rand_like": lambda x: x * (torch.rand_like(x) < 0.6),
    "bernoulli": lambda x: torch.where(torch.bernoulli(torch.full_like(x, 0.6)).bool(), x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("options", [{}, {"fraction": 0.5, "antithetic": True}], ids=str)
@pytest.mark.parametrize("drop", DROPS)
def test_both_streams_have_the_masks_of_the_clean_one(drop: str, options: dict[str, Any]) -> None:
    class Dropped(models.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + DROPS[drop](self.bn1(self.conv1(x)))) if self.training else x

    model = build()
    model.layer1 = Dropped(6, 6, 1).double()
    net = convert("direct", copy.deepcopy(model), noise_std=1e-9, **options)
    torch.manual_seed(0)
    out = net(IMAGES[:8].double())
    torch.manual_seed(0)
    torch.testing.assert_close(out, model(IMAGES[:8].double()), rtol=1e-12, atol=1e-12)
    assert 1e-13 < float(net.feedback.current.changes[0].abs().max()) < 1e-6


@pytest.mark.parametrize("options", [{"antithetic": True}, {"fraction": 0.5}], ids=str)
def test_a_mask_that_is_made_for_each_sample_compiles(options: dict[str, Any]) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.a(x))
            return self.o(h.masked_fill(torch.arange(16) < torch.arange(len(h))[:, None], 0.0))

    x, y, found = torch.randn(6, 8), torch.randint(4, (6,)), []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = fb.convert(Masked(), rule=fb.LMS(1e-2), **options)
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        criterion(net(x), y).backward()
        run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        criterion(run(x), y).backward()
        found.append(fb.points(net)["a"].B)
    torch.testing.assert_close(*found)
