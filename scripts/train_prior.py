"""Train a prior over codes: `midway train prior` from a checkout."""

from start import start

if __name__ == "__main__":
    start("train", "prior")
