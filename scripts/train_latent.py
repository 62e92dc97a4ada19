"""Train a latent model: `midway train latent` from a checkout."""

from start import start

if __name__ == "__main__":
    start("train", "latent")
