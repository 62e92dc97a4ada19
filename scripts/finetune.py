"""Train a latent model further on other images: `midway finetune` from a checkout."""

from start import start

if __name__ == "__main__":
    start("finetune")
