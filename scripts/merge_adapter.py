"""Add an adapter to the weights of its model: `midway merge-adapter` from a checkout."""

from start import start

if __name__ == "__main__":
    start("merge-adapter")
