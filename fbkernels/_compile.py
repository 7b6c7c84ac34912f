"""What torch.compile is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C import _dynamo

F = TypeVar("F", bound=Callable[..., object])


def constant(f: F) -> F:
    """``torch.compiler.assume_constant_result``, which imports all of Dynamo: 2 of the 4 seconds that ``import fbkernels`` took."""
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return f


def whole(f: F) -> F:
    """Dynamo traces it within what is around it, or leaves it: its frames, which torch.compile tries one by one where a model's own code
    breaks the graph, would each see a part of the step."""
    return skipped(f, "SKIP")


def skipped(f: F, within: str = "DEFAULT") -> F:
    """No trace of Dynamo's begins with it."""
    frames: Any = _dynamo.eval_frame
    action = frames._FrameAction
    frames.set_code_exec_strategy(f.__code__, frames._FrameExecStrategy(action.SKIP, getattr(action, within)))
    return f
