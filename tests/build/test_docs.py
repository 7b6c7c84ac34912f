"""The tutorial does what it says: its blocks run in order, and print what stands below them."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest

import fbkernels as fb

TUTORIAL = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"nan|\d+(?:\.\d+)?(?:e-\d+)?")
# percent or degrees: how far runs with another seed, and so other rounding, were from these at most, of four
TOLERANCE = 6.0


def agree(printed: str, shown: str) -> bool:
    """The same words, and numbers within the tolerance."""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", shown):
        return False
    pairs = zip(map(float, NUMBER.findall(printed)), map(float, NUMBER.findall(shown)), strict=True)
    return all(abs(a - b) <= TOLERANCE or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


def test_agreement() -> None:
    assert agree("Joint 95 %, 0: nan", "Joint 96 %, 0: nan")
    assert not agree("Joint 95 %", "Ridge 95 %")
    assert not agree("Joint 95 %", "Joint 85 %")
    assert not agree("Joint nan %", "Joint 85 %")


@pytest.mark.filterwarnings("ignore:.*non-finite loss")
@pytest.mark.usefixtures("one_thread")
def test_tutorial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fb.convert.__kwdefaults__, "warmup", "auto")  # its own default, see conftest
    names: dict[str, Any] = {}
    blocks = BLOCK.findall(TUTORIAL)
    assert len(blocks) == TUTORIAL.count("```python") > 8
    assert sum(bool(shown) for _, shown in blocks) == TUTORIAL.count("```text")
    for code, shown in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, names)
        assert not shown or agree(out.getvalue(), shown), f"{code}\nprinted\n{out.getvalue()}\nand not\n{shown}"
