"""Completion for shells: `midway completion` from a checkout."""

from start import start

if __name__ == "__main__":
    start("completion")
