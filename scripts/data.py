"""Check and build sets of images: `midway data` from a checkout."""

from start import start

if __name__ == "__main__":
    start("data")
