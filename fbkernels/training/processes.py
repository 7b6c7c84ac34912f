"""Several processes that train one network on torch.distributed, each with its part of every batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several(group: Any = None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


class Processes:
    """The processes of a group. What the host has to know it asks over gloo, so that no GPU waits for it."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        ranks = dist.get_process_group_ranks(self.group)
        self.host = self.group if device.type == "cpu" else dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self.agreed = False

    def agree(self, own: Mapping[str, Any]) -> None:
        """Raise a ValueError on every process where one has another value."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, dict(own), group=self.host)
        for name in dict.fromkeys(name for other in every for name in other):
            values = [other.get(name) for other in every]
            if any(value != values[0] for value in values):
                raise ValueError(f"{name} must be the same in all processes, got, by rank: {', '.join(map(repr, values))}")
        self.agreed = True

    def part(self, rows: int) -> Part:
        """This process' part of a batch, of which it has so many rows; every process calls it."""
        counts = torch.empty(self.size, 1, dtype=torch.int64)
        dist.all_gather(list(counts), torch.tensor([rows]), group=self.host)
        return Part(self, tuple(counts.flatten().tolist()))

    def most(self, n: int) -> int:
        counts = torch.empty(self.size, 1, dtype=torch.int64)
        dist.all_gather(list(counts), torch.tensor([n]), group=self.host)
        return int(counts.max())

    def sum(self, t: Tensor) -> Tensor:
        t = t.contiguous().clone()
        dist.all_reduce(t, group=self.group)
        return t


@dataclass(frozen=True)
class Part:
    """One process' rows of a batch; the batch is those of rank 0, then those of rank 1 ..."""

    processes: Processes
    rows: tuple[int, ...]  # of each process

    @property
    def before(self) -> int:
        return sum(self.rows[: self.processes.rank])

    @property
    def total(self) -> int:
        return sum(self.rows)

    def gather(self, *given: Tensor) -> list[Tensor]:
        """[rows, ...] of this process -> [total, ...], in one message."""
        packed = torch.cat([t.flatten(1) if t.ndim > 1 else t[:, None] for t in given], 1)
        longest = max(self.rows)
        sent = torch.nn.functional.pad(packed, (0, 0, 0, longest - len(packed))).contiguous()
        every = sent.new_empty(len(self.rows), *sent.shape)
        dist.all_gather(list(every), sent, group=self.processes.group)
        whole = torch.cat([t[:n] for t, n in zip(every, self.rows, strict=True)]) if min(self.rows) < longest else every.flatten(0, 1)
        columns = whole.split([t[:1].numel() for t in given], 1)
        return [c.reshape(self.total, *t.shape[1:]) for c, t in zip(columns, given, strict=True)]
