"""What the processes of tests/training/test_processes.py run: small trainings, each on its part of the batch."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fbkernels as fb

BATCH, LAST, STEPS = 12, 9, 4


def cnn() -> nn.Module:
    front = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(*front, nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 5))


def normed() -> nn.Module:
    front = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*front, nn.Linear(96, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 5))
    return nn.SyncBatchNorm.convert_sync_batchnorm(net) if dist.is_initialized() else net


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 5))


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5))


@dataclass
class Training:
    rule: Callable[[], fb.Rule]
    feedback: str = "direct"
    model: Callable[[], nn.Module] = cnn
    dtype: torch.dtype = torch.float64
    convert: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    uneven: bool = False
    accumulate: int = 1
    broken: bool = False  # a sample whose loss is not finite


def joint(signal: str) -> Callable[[], fb.Rule]:
    return lambda: fb.Joint(signal=signal)


TRAININGS = {
    "direct ridge": Training(fb.Ridge),
    "direct ridge, float32": Training(lambda: fb.Ridge(forgetting=0.99), dtype=torch.float32),
    "direct ridge, uneven": Training(lambda: fb.Ridge(forgetting=0.99), uneven=True),
    "direct ridge, accumulated": Training(fb.Ridge, accumulate=2),
    "direct ridge, antithetic": Training(fb.Ridge, convert={"antithetic": True, "noise": "rademacher"}),
    "direct ridge, every second step after a warm-up": Training(fb.Ridge, convert={"every": 2, "warmup": 2}),
    "direct ridge, a warm-up of two steps that ends by itself": Training(fb.Ridge, model=small, convert={"warmup": "auto"}, uneven=True),
    "layerwise joint, a warm-up of two steps that ends by itself": Training(joint("loss"), "layerwise", small, convert={"warmup": "auto"}),
    "direct ridge, unused parameters": Training(fb.Ridge, ddp={"find_unused_parameters": True}),
    "direct ridge, static graph": Training(fb.Ridge, ddp={"static_graph": True}),
    "direct ridge, a broken sample": Training(fb.Ridge, broken=True),
    "direct ridge, batch norm": Training(fb.Ridge, model=normed, uneven=True),
    "direct ridge, shared noise": Training(fb.Ridge, dtype=torch.float32, convert={"share": 2}, uneven=True),
    "direct ridge, low rank": Training(fb.Ridge, convert={"rank": 2}, uneven=True),
    "direct LMS": Training(lambda: fb.LMS(0.1)),
    "direct normalized LMS": Training(lambda: fb.NormalizedLMS(0.5), uneven=True),
    "joint output": Training(joint("output")),
    "joint output, float32": Training(joint("output"), dtype=torch.float32, uneven=True),
    "joint output, low rank": Training(joint("output"), convert={"rank": 3}, uneven=True),
    "joint loss": Training(joint("loss"), uneven=True),
    "direct feedback alignment": Training(fb.Fixed, uneven=True),
    "node perturbation": Training(fb.NodePerturbation, uneven=True),
    "synthetic gradients": Training(lambda: fb.SyntheticGradient(0.1)),
    "synthetic gradients, batch norm": Training(lambda: fb.SyntheticGradient(0.1), model=normed),
    "layerwise ridge": Training(fb.Ridge, "layerwise"),
    "layerwise ridge, uneven": Training(lambda: fb.Ridge(forgetting=0.999), "layerwise", uneven=True),
    "layerwise ridge, accumulated": Training(fb.Ridge, "layerwise", mlp, accumulate=2),
    "layerwise ridge, float32": Training(fb.Ridge, "layerwise", mlp, torch.float32),
    "layerwise LMS": Training(lambda: fb.LMS(0.01), "layerwise", uneven=True),
    "layerwise normalized LMS": Training(lambda: fb.NormalizedLMS(0.5), "layerwise", uneven=True),
    "layerwise joint": Training(joint("loss"), "layerwise", uneven=True),
    "layerwise synthetic gradients": Training(lambda: fb.SyntheticGradient(0.01), "layerwise"),
    "weight mirror": Training(fb.WeightMirror, "layerwise", uneven=True),
    "weight mirror, batch norm": Training(fb.WeightMirror, "layerwise", normed),
    "weight mirror, unused parameters": Training(fb.WeightMirror, "layerwise", ddp={"find_unused_parameters": True}),
    "Kolen-Pollack": Training(lambda: fb.KolenPollack(0.0), "layerwise", uneven=True),
    "feedback alignment": Training(fb.Fixed, "layerwise"),
}


def parts(batch: int, world: int, uneven: bool) -> list[int]:
    if not uneven:
        return [batch // world] * world
    cuts = [round(batch * (i / world) ** 1.4) for i in range(world + 1)]
    return [b - a for a, b in itertools.pairwise(cuts)]


def build(training: Training, **changed: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"noise_std": 0.1, "seed": 3, "warmup": 0, **training.convert, **changed}
    return fb.convert(training.model().to(training.dtype), feedback=training.feedback, rule=training.rule(), **options)


def train(net: nn.Module, training: Training, steps: range, rank: int = 0, group: Any = None, ddp: bool = True) -> dict[str, Tensor]:
    """W, B and statistics after the steps: of one process, or of one among those of ``group``."""
    world = 1 if group is None else dist.get_world_size(group)
    run = DistributedDataParallel(net, process_group=group, **training.ddp) if group is not None and ddp else net
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), run)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for step in steps:
        for micro in range(training.accumulate):
            generator = torch.Generator().manual_seed(100 * step + micro)
            n = LAST if training.uneven and step == STEPS - 1 else BATCH
            x = torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64).to(training.dtype)
            y = torch.randint(5, (n,), generator=generator)
            if training.broken and step == 1:
                x[n - 2] = torch.inf
            sizes = parts(n, world, training.uneven)
            own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            last = micro == training.accumulate - 1
            with contextlib.nullcontext() if last or run is net else run.no_sync():
                loss = criterion(run(x[own]), y[own])
                if not (training.broken and step == 1):
                    (loss * (world * sizes[rank] / n)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k: t.clone() for k, t in net.state_dict().items()}


SHARDED = {"FSDP, direct": "direct ridge, batch norm", "FSDP, layerwise": "layerwise ridge"}


def of(world: int) -> list[str]:
    """All trainings for two processes, a few for four."""
    few = ["direct ridge, uneven", "joint output, float32", "layerwise ridge, uneven", "Kolen-Pollack", "direct ridge, batch norm"]
    return list(TRAININGS) if world == 2 else few


def sharded(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """The same with W sharded."""
    from torch.distributed.device_mesh import init_device_mesh  # two seconds, which four processes need not spend
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    training = dataclasses.replace(TRAININGS[name], uneven=False)
    net = build(training)
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    state = train(net, training, range(STEPS), rank, dist.group.WORLD, ddp=False)
    return {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in state.items()}


def resumed(rank: int, folder: Path) -> dict[str, Tensor]:
    """Two processes up to the second step, the first of which leaves a checkpoint; then all."""
    training = TRAININGS["direct ridge"]
    pair = dist.new_group([0, 1])
    if rank < 2:
        net = build(training)
        train(net, training, range(2), rank, pair)
        if rank == 0:
            torch.save(net.state_dict(), folder / "checkpoint.pt")
    dist.barrier()
    net = build(training)
    net.load_state_dict(torch.load(folder / "checkpoint.pt"))
    state = train(net, training, range(2, STEPS), rank, dist.group.WORLD)
    if rank == 0:  # what one process does alone
        x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
        fb.metrics.alignment(net, nn.CrossEntropyLoss(), x, y)
        assert fb.summary(net, x).peak and fb.points(net)["0"].B is not None
    return state


def refused(rank: int) -> dict[str, str]:
    """What the processes say where they have not the same settings."""
    training, said = TRAININGS["direct ridge"], {}
    model = build(training)
    train(model, training, range(1))
    learned = model.state_dict() if rank == 0 else {}
    for name, changed in {"seed": {"seed": 3 + rank}, "points": {"exclude": "0" if rank else None}, "checkpoint": {}}.items():
        net = build(training, **changed)
        if name == "checkpoint":
            net.load_state_dict(learned, strict=False)
        try:
            train(net, training, range(1), rank, dist.group.WORLD)
        except ValueError as error:
            said[name] = str(error)
    return said


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(minutes=3))
    results: dict[str, Any] = {}
    try:
        for name in of(world):
            results[name] = train(build(TRAININGS[name]), TRAININGS[name], range(STEPS), rank, dist.group.WORLD)
        for name, training in SHARDED.items() if world == 2 else ():
            results[name] = sharded(training, rank, world)
        results["resumed"] = resumed(rank, folder)
        results["refused"] = refused(rank)
    except Exception:
        results["error"] = traceback.format_exc()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def spawn(world: int, folder: Path) -> list[dict[str, Any]]:
    """The results of each process."""
    torch.multiprocessing.spawn(main, (world, folder), world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
