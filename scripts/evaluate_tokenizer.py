"""Compare tokenizers: `midway evaluate-tokenizer` from a checkout."""

from start import start

if __name__ == "__main__":
    start("evaluate-tokenizer")
