from collections.abc import Sequence
from typing import Any

from torch import Tensor

def noise(
    out: Tensor,
    step: Tensor,
    seed: int,
    point: int,
    std: float,
    kind: str,
    offset: int = 0,
    threads: int = 1,
    simd: str = "",
) -> None: ...
def pointwise(
    z: Tensor,
    q: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    h: Tensor,
    p: Tensor | None,
    kept: Tensor | None,
    winner: Tensor | None,
    activation: str,
    pool: str,
    pool_first: bool,
    sizes: Sequence[int],
    step: Tensor,
    seed: int,
    point: int,
    std: float,
    kind: str,
    rows: int,
    antithetic: bool = False,
    offset: int = 0,
    threads: int = 1,
    simd: str = "",
) -> None: ...
def unpool(delta: Tensor, winner: Tensor, out: Tensor, sizes: Sequence[int], threads: int = 1, simd: str = "") -> None: ...
def feedback_update(
    B: Tensor,
    out: Tensor | None,
    M: Tensor | None,
    G: Tensor | None,
    R: Tensor | None,
    Q: Tensor | None,
    w: Tensor | None,
    prediction: Tensor | None,
    step: Tensor | None,
    predicted_step: Tensor | None,
    seed: int,
    point: int,
    std: float,
    kind: str,
    offset: int = 0,
    threads: int = 1,
    simd: str = "",
) -> None: ...
def feedback(e: Tensor, B: Tensor, kept: Tensor | None, delta: Tensor, activation: str, threads: int = 1, simd: str = "") -> None: ...
def conv_gradient(
    delta: Tensor,
    winner: Tensor,
    x: Tensor,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    geometry: Sequence[int],
    sizes: Sequence[int],
    threads: int = 1,
    simd: str = "",
) -> None: ...
def fused_mlp(
    *,
    sizes: Sequence[int],
    activations: Sequence[str],
    loss: str,
    layerwise: bool,
    rule: str,
    rule_rate: float,
    forgetting: float,
    downdate: bool,
    optimizer: str,
    lr: float,
    noise_std: float,
    noise: str,
    seed: int,
    warmup: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_state: Sequence[Tensor],
    bias_state: Sequence[Tensor],
    B: Sequence[Tensor],
    statistics: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    losses: Tensor,
    counters: Tensor,
    threads: int = 1,
    simd: str = "",
) -> None: ...
def shuffle(out: Tensor, seed: int, epoch: int) -> None: ...
def ridge_gain(
    R: Tensor,
    w: Tensor,
    V: Tensor,
    V_out: Tensor,
    Q: Tensor,
    M: Tensor,
    G: Tensor,
    scratch: Tensor,
    gamma: float,
    forgetting: float,
    simd: str = "",
) -> None: ...
def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def simd_paths() -> list[str]: ...
def build_info() -> dict[str, Any]: ...
