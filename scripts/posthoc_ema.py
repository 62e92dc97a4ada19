"""Averages of other lengths, after training: `midway posthoc-ema` from a checkout."""

from start import start

if __name__ == "__main__":
    start("posthoc-ema")
