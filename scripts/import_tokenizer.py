"""Import an autoencoder of diffusers: `midway import-tokenizer` from a checkout."""

from start import start

if __name__ == "__main__":
    start("import-tokenizer")
