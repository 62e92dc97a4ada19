"""Train an image tokenizer: `midway train tokenizer` from a checkout."""

from start import start

if __name__ == "__main__":
    start("train", "tokenizer")
