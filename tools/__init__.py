"""What people who work on the project run from a checkout; none of it is installed.

`benchmark` times the package against the best alternative at hand; `research` repeats the
experiments of the documentation's results page.
"""
