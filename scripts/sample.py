"""Sample images of a model: `midway sample` from a checkout."""

from start import start

if __name__ == "__main__":
    start("sample")
