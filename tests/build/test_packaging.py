"""What users get: the contents of sdist and wheel, and what the library needs to be imported."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = """
import sys
sys.modules.update(dict.fromkeys(("rich", "matplotlib", "sklearn", "triton"), None))  # an import of these fails
import torch, fbkernels as fb
assert "torch._dynamo" not in sys.modules  # 2 s at each start
net = fb.convert(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))
fb.PerturbedLoss(torch.nn.CrossEntropyLoss(), net)(net(torch.ones(5, 3)), torch.zeros(5, dtype=torch.int64)).backward()
print(fb.points(net)["0"].B.shape)
from fbkernels.__main__ import main
sys.exit(main())
"""


def sources(*patterns: str) -> set[str]:
    """What git has of these."""
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    return set(done.stdout.split())


def test_wheel() -> None:
    """By the record of the wheel that is installed."""
    record = importlib.metadata.files("fbkernels")
    assert record
    files = {str(f) for f in record if f.suffix != ".pyc"}
    if any(f.startswith("__editable__") for f in files):
        pytest.skip("installed with -e")
    metadata = f"fbkernels-{importlib.metadata.version('fbkernels')}.dist-info"
    assert {f.split("/")[0] for f in files} == {"..", "fbkernels", metadata}
    assert {Path(f).name for f in files if f.startswith("..")} == {"fbkernels"}  # the command
    (module,) = (f for f in files if f.endswith(".so"))
    assert re.fullmatch(r"fbkernels/_C\.cpython-\d+-\S+\.so", module)
    assert f"{metadata}/licenses/LICENSE" in files
    python = sources("fbkernels/*.py", "fbkernels/*.pyi", "fbkernels/py.typed", "kernels/*.py", "bench/*.py")
    expected = {re.sub("^(kernels|bench)/", r"fbkernels/\1/", f) for f in python}
    assert "fbkernels/py.typed" in expected
    assert {f for f in files if f.startswith("fbkernels/")} == expected | {module}


def test_sdist(tmp_path: Path) -> None:
    """Everything that a build and the tests need."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        files = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    needed = sources(
        "csrc", "fbkernels", "kernels", "tests", "docs", "bench/*.py", "setup.py", "pyproject.toml", "LICENSE", "*.md", "CITATION.cff"
    )
    needed -= sources("bench/*.md")
    assert len(needed) > 150
    assert needed <= files
    assert not [f for f in files if f.endswith((".so", ".pyc"))]


def test_requirements() -> None:
    needs = importlib.metadata.requires("fbkernels") or []
    assert {re.split("[<>=]", n)[0] for n in needs if "extra ==" not in n} == {"torch", "numpy"}
    assert set(importlib.metadata.metadata("fbkernels").get_all("Provides-Extra")) == {"triton", "train", "reproduce", "test", "docs"}


def test_the_library_needs_no_extra_and_the_command_line_says_which_it_needs() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", LIBRARY], capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([4, 2])", done.stderr
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("fbkernels: error: the command line needs matplotlib, rich, scikit-learn: pip install 'fbkernels[train]'")
