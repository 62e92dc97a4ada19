"""Test feature networks on known damage: `midway check-metric` from a checkout."""

from start import start

if __name__ == "__main__":
    start("check-metric")
