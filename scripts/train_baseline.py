"""Train a baseline: `midway train baseline` from a checkout."""

from start import start

if __name__ == "__main__":
    start("train", "baseline")
