"""The ridge regression after 100,000 batches of real error signals: digits always, MNIST where FBK_DATA_DIR has it."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import fbkernels as fb
from fbkernels import ops
from fbkernels.lab.data import load

STEPS, BATCH, STD, GAMMA = 100_000, 32, 0.05, 0.1
REAL = os.environ.get("FBK_DATA_DIR")
DATA = ["digits", pytest.param("mnist", marks=pytest.mark.skipif(not REAL, reason="FBK_DATA_DIR names no folder with the published data"))]


def images(name: str) -> tuple[Tensor, Tensor]:
    data = load(name, REAL if name == "mnist" else None)
    return data.to_float(data.train_x).flatten(1), data.train_y


def trained(x: Tensor, y: Tensor, loss: str) -> fb.FusedMLP:
    """A network half way through its training, whose errors are then those of real images."""
    net = fb.FusedMLP((x.shape[1], 50, 20, 10), activations="sigmoid", loss=loss, rule=fb.WeightTransport(), lr=1e-2)
    net.fit(x, y, steps=1000, batch_size=BATCH)
    return net


@pytest.mark.parametrize("name", DATA)
def test_B_is_the_offline_solution(name: str) -> None:
    x, y = images(name)
    before = trained(x, y, "mse")
    options = {"activations": "sigmoid", "feedback": "direct", "rule": fb.Ridge(GAMMA), "noise_std": STD}
    net = fb.FusedMLP(before.sizes, warmup=STEPS, **options)  # B alone learns
    for mine, its in zip((*net.weights, *net.biases), (*before.weights, *before.biases), strict=True):
        mine.copy_(its)
    net.fit(x, y, steps=STEPS, batch_size=BATCH)

    # B = S V^-1 with V = gamma I + sum e e^T, S = sum lam e^T, lam = dL xi / sigma^2, everything in float64
    W, b = [w.double() for w in net.weights], [v.double() for v in net.biases]
    V, S, many = GAMMA * torch.eye(10, dtype=torch.float64), [torch.zeros(n, 10, dtype=torch.float64) for n in (50, 20)], 500
    target = torch.nn.functional.one_hot(y, 10).double()
    for first in range(0, STEPS, many):
        rows = net._rows(first, many, BATCH, len(x)).flatten()
        steps = [torch.tensor(t) for t in range(first, first + many)]
        xi = [torch.cat([ops.noise(t, 0, point, BATCH, n, STD, "gaussian") for t in steps]).double() for point, n in ((0, 50), (1, 20))]
        h = (x[rows].double() @ W[0].T + b[0]).sigmoid()
        p = h + xi[0]
        h, p = (t @ W[1].T + b[1] for t in (h, p))
        h, p = h.sigmoid(), p.sigmoid() + xi[1]
        out, moved = (t @ W[2].T + b[2] for t in (h, p))
        e = out - target[rows]
        dL = ((moved - out) * (moved + out - 2 * target[rows])).sum(1, keepdim=True) / 2
        V += e.T @ e
        for s, noise in zip(S, xi, strict=True):
            s += (dL / STD**2 * noise).T @ e
    for B, s in zip(net.B, S, strict=True):
        expected = torch.linalg.solve(V, s.T).T
        error = float((B.double() - expected).norm() / expected.norm())
        print(f"{name}: relative error {error:.1e}")
        assert error < 1e-3


@pytest.mark.parametrize("name", DATA)
def test_forgetting_stays_finite_and_keeps_its_floor(name: str) -> None:
    x, y = images(name)
    rule = fb.Ridge(GAMMA, forgetting=0.99)
    net = fb.FusedMLP((x.shape[1], 50, 20, 10), loss="cross_entropy", rule=rule, noise_std=STD, lr=1e-3)
    losses = net.fit(x, y, steps=STEPS, batch_size=BATCH)
    assert losses.isfinite().all()
    assert losses[-1000:].mean() < losses[:1000].mean()  # it learns
    assert all(t.isfinite().all() for t in (*net.weights, *net.biases, *net.B))
    assert net.skipped == 0
    for V in net._V:
        smallest = float(torch.linalg.eigvalsh(V)[0])
        print(f"{name}: norm of P {1 / smallest:.3f}, 1 / gamma {1 / GAMMA:.3f}")
        assert 1 / smallest <= (1 + 1e-9) / GAMMA  # cross-entropy errors sum to zero: without the floor 0.99^-3,200,000
