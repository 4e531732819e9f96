"""The experiments behind the documentation's results page, each run as `python -m`.

- `reproduce_cifar10`: one strategy of negatives, one seed; `baselines_cifar10`: what it is compared
  with. `cifar10` is what both share: images, training, measurements.
- `make_results`: tables and figure of those runs.
- `defaults_table`: whether training works with its defaults, whatever the network and the data.
- `ablate_score`, `compare_exports`: what the score is made of, and what an export costs.
- `shrink_detector`: the detector that comes with the package, from one of those runs.
- `make_figures`: the documentation's pictures of views and shifts.
"""
