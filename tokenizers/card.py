"""The card of a tokenizer of which nothing else is known, and Python that loads one."""

from midway.tokenizers.hub import card_of

USAGE = """\
import torch
from midway import ImageTokenizer
tokenizer = ImageTokenizer.from_pretrained(".")
latents = tokenizer.encode_latents(torch.zeros(1, {}))  # float32 images in [-1, 1] -> zero mean, unit variance
images = tokenizer.decode_latents(latents)"""


def usage(image_shape: tuple[int, ...]) -> str:
    """Python that loads the tokenizer in the current folder, encodes and decodes images of this shape."""
    return USAGE.format(", ".join(map(str, image_shape)))


def plain_card(image_shape: tuple[int, int, int], latent_shape: tuple[int, int, int], kind: str, license: str) -> str:
    """Shapes and quantizer. ValueError for a licence that is no identifier."""
    (channels, height, width), latents = image_shape, "x".join(map(str, latent_shape))
    facts = {"quantizer": kind, "images": f"{channels} channels, {height}x{width}", "latents": latents}
    return card_of(f"Image tokenizer: {kind}", license, ("image-tokenizer", kind), facts, usage(image_shape))
