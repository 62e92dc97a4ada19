"""Learn a solver for a model: `midway train solver` from a checkout."""

from start import start

if __name__ == "__main__":
    start("train", "solver")
