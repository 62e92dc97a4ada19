"""Fetch weights of feature networks: `midway download-weights` from a checkout."""

from start import start

if __name__ == "__main__":
    start("download-weights")
