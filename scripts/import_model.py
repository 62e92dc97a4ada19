"""Import weights of DiT, SiT, LightningDiT or diffusers: `midway import-model` from a checkout."""

from start import start

if __name__ == "__main__":
    start("import-model")
