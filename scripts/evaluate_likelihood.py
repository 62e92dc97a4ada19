"""Compare models in bits per dimension: `midway evaluate-likelihood` from a checkout."""

from start import start

if __name__ == "__main__":
    start("evaluate-likelihood")
