"""Peak memory and time of passes over a stored set: python tests/support/memory_of_passes.py FOLDER PASS COUNT COUNT ...

Prints, after each pass over so many images, the highest memory of this process so far in MB and the seconds of the pass.
"""

import shutil
import sys
import time
from pathlib import Path

import torch
from many_images import many
from peaks import peak_kib

from midway.gen.data.images import ImageData
from midway.gen.features import pixels
from midway.gen.features.pixels import Pixels
from midway.gen.features.reference import make_reference
from midway.gen.tokenizer.encoding import Encoding, encode, latent_statistics
from midway.gen.tokenizer.latents import open_latents
from midway.gen.tokenizer.objective import evaluate_tokenizer
from midway.gen.tokenizer.statistics import constant_channels
from midway.gen.training.batches import Context
from midway.tokenizers.tokenizer import ImageTokenizer

BATCH = 16


def tokenizer() -> ImageTokenizer:
    """256x256 pixels to 8x8 latents, with little work."""
    torch.manual_seed(0)
    quantizer = {"type": "kl", "dim": 4}
    return ImageTokenizer(in_channels=3, image_size=256, width=8, downsample=32, blocks=1, quantizer=quantizer).eval()


def encoding(data: ImageData, folder: Path) -> None:
    """Encoded, and a batch read again."""
    model = tokenizer()
    shutil.rmtree(folder, ignore_errors=True)
    encode(folder, model, data, Encoding(batch_size=BATCH))
    found = open_latents(folder, data, model)
    found.standardised(found.read(torch.arange(BATCH)), Context(0, 0, torch.arange(BATCH)), flip=False)


def statistics(data: ImageData, folder: Path) -> None:
    """Of latents and of reconstructions; and the images' own."""
    model = tokenizer()
    latent_statistics(model, data.images, BATCH)
    with torch.no_grad():
        evaluate_tokenizer(model, data.images, BATCH)
    constant_channels(data.images)


def reference(data: ImageData, folder: Path) -> None:
    """Features are means over areas, 8x8 of them."""
    pixels.SIDE = 8
    make_reference(Pixels(), Pixels.name, data)


PASSES = {"encoding": encoding, "statistics": statistics, "reference": reference}


def main() -> None:
    """Pass after pass in this process."""
    torch.set_num_threads(1)
    folder, name = Path(sys.argv[1]), sys.argv[2]
    for count in map(int, sys.argv[3:]):
        begun = time.perf_counter()
        PASSES[name](many(folder / "images", count), folder / "latents")
        print(f"{count} {peak_kib() * 1.024e-3:.1f} {time.perf_counter() - begun:.2f}", flush=True)


if __name__ == "__main__":
    main()
