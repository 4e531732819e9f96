r"""Compares the speed of the package with the best available alternatives.

    python -m tools.benchmark --benchmarks=views,train_step --json=benchmark.json

Our code and the alternative run alternately, with the same images and the same number of threads. A
record has the median of each, the ratio of the medians (above 1 if ours is better) and, as its
spread, the first and third quartile of the ratios of single rounds. Each benchmark is a module with
its name. The alternatives are in `partners`; a benchmark is skipped, with a message, if the library
of its alternative is not installed.
"""
