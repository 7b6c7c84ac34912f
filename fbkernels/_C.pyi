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
def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def simd_paths() -> list[str]: ...
def build_info() -> dict[str, Any]: ...
