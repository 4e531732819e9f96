r"""Times the package against the best alternative at hand, both in one run.

    python -m tools.benchmark --benchmarks=views,train_step --json=benchmark.json

Ours and the alternative take turns, on the same images and the same number of threads. A record
holds the median of each, the ratio of the medians (above 1 when ours is better) and, as its spread,
the first and third quartile of the ratios of single rounds. Each benchmark is a module of its name;
the alternatives are in `partners`, written plainly and well, and left out with a word where their
library is not installed.
"""
