"""What ``convert`` was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from fbkernels.rules.base import Rule


@dataclass(frozen=True)
class Settings:
    """The arguments of ``convert``, checked."""

    layerwise: bool
    rule: Rule
    noise_std: float
    noise: str
    seed: int
    every: int
    fraction: float
    antithetic: bool
    warmup: int
    auto: bool  # warm-up ends by itself
    backend: str
    share: int  # places along each dimension of a map that have one noise and one row of B
    rank: int | None  # columns of B, where they are fewer than outputs
    include: tuple[str, ...] | None = None  # name patterns of the layers that get points
    exclude: tuple[str, ...] | None = None
    found: bool = True  # layers get points; else those that the model has, or that convert was given by name

    @property
    def structure(self) -> str:
        return "layerwise" if self.layerwise else "direct"

    @property
    def numbered(self) -> bool:
        """Whether samples have to be known in each activity: layerwise without a second stream, rows will do."""
        return not self.layerwise or self.rule.measures

    @property
    def method(self) -> str:
        """Feedback structure and rule: a checkpoint of another one is refused."""
        basis = "" if self.rank is None else f", rank {self.rank} of seed {self.seed}"  # without which B has no meaning
        return f"{self.structure} {type(self.rule).__name__}{basis}"

    @property
    def described(self) -> dict[str, object]:
        """What processes have to have in common."""
        names = ("noise_std", "noise", "seed", "share", "rank", "every", "fraction", "antithetic", "warmup", "auto", "backend")
        return {"feedback": self.structure, "rule": repr(self.rule)} | {n: getattr(self, n) for n in names}

    def __str__(self) -> str:
        share = "" if self.share == 1 else f", share={self.share}"
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"{self.structure}, rule={self.rule}, noise_std={self.noise_std}, noise={self.noise!r}{share}{rank}"
