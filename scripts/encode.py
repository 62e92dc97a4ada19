"""Store the latents of a tokenizer: `midway encode` from a checkout."""

from start import start

if __name__ == "__main__":
    start("encode")
