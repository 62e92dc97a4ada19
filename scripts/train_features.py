"""Train a feature network: `midway train features` from a checkout."""

from start import start

if __name__ == "__main__":
    start("train", "features")
