"""Images to fine-tune a model of digits on."""

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def other_digits(root: Path, count: int = 40) -> Path:
    """A folder of 8x8 images: threes and fives upside down, and `negative`, a class that the digits have not. Made once."""
    images, labels = load_digits(return_X_y=True)
    for name in ("3", "5", "negative"):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images[labels == (1 if name == "negative" else int(name))][:count].reshape(-1, 8, 8)):
            pixels = (image * 255 / 16).astype("uint8")
            Image.fromarray(255 - pixels if name == "negative" else pixels[::-1]).save(folder / f"{i:03d}.png")
    return root
