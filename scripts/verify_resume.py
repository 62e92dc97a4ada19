"""Check that resuming a run is exact: `midway verify-resume` from a checkout."""

from start import start

if __name__ == "__main__":
    start("verify-resume")
