"""Entry point of `python -m tools.benchmark` and `python tools/benchmark`."""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])  # instead of the folder of this file

from tools.benchmark.harness import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
