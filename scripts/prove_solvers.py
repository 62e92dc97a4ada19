"""Measure all solvers on an exact model: `midway prove` from a checkout."""

from start import start

if __name__ == "__main__":
    start("prove")
