"""Starts `python -m tools.benchmark`, and `python tools/benchmark` likewise."""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])  # not the folder of this file

from tools.benchmark.harness import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
