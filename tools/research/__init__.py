"""The experiments on the documentation's results page, each to be run with `python -m`.

- `reproduce_cifar10`: train one strategy for negatives with one seed. `baselines_cifar10`: train or
  score a baseline. `cifar10`: code that both share for images, training and measurements.
- `make_results`: make the tables and the figure of those runs.
- `defaults_table`: check that training works with its defaults on different networks and data.
  `accuracy_per_minute`: compare small networks after equal CPU times.
- `ablate_score`, `compare_exports`: vary the score; measure what each kind of export costs.
- `shrink_detector`: make the detector that comes with the package from one of those runs.
- `score_growth`: time and memory of scoring on Apache Beam as the number of images grows.
  `merged_bank`: how far scores of a bank merged from shards are from those of the whole bank.
- `make_figures`: draw the documentation's pictures of views and shifts.
"""
