"""The flags for images whose activations do not fit into memory."""

from dataclasses import dataclass

from midway.gen.core.errors import UsageError, raising
from midway.tokenizers.tiling import tile_networks
from midway.tokenizers.tokenizer import ImageTokenizer


@dataclass(frozen=True, kw_only=True)
class TileFlags:
    """How a tokenizer's networks are applied."""

    tile: int | None = None
    """Encode and decode in tiles of this many pixels a side, for large images (default: the whole image at once)."""
    tile_margin: int = 32
    """With --tile: pixels ignored at the inner edges of tiles, which overlap by four times as many."""

    def apply_tiles(self, tokenizer: ImageTokenizer) -> None:
        """Tile the networks of `tokenizer` if --tile is given; UsageError if they cannot be tiled."""
        if self.tile is None:
            return
        flags = f"--tile {self.tile} --tile-margin {self.tile_margin}"
        with raising(UsageError, flags, "change or drop these flags"):
            tile_networks(tokenizer, self.tile, self.tile_margin)
