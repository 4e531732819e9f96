"""Programs for developers, to run from a checkout; they are not installed with the package.

`benchmark` compares the speed of the package with the best available alternatives. `research`
repeats the experiments on the results page of the documentation.
"""
