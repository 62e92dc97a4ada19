"""Measure solvers per step budget: `midway evaluate` from a checkout."""

from start import start

if __name__ == "__main__":
    start("evaluate")
