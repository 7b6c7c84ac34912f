"""``fbkernels`` and ``python -m fbkernels``."""

from __future__ import annotations

import importlib.util
import sys


def main() -> int:
    """The command line, or what to install for it."""
    needed = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"fbkernels: error: the command line needs {', '.join(missing)}: pip install 'fbkernels[train]', "
            "in the source folder pip install '.[train]'",
            file=sys.stderr,
        )
        return 2
    from fbkernels.lab import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
