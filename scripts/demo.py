"""The whole path on real images: `midway demo` from a checkout."""

from start import start

if __name__ == "__main__":
    start("demo")
