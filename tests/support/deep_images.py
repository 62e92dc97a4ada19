"""PNG, TIFF, PGM and PPM files of any depth, written byte by byte since Pillow writes few of them."""

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[Any]
"""Unsigned numbers (H, W, C)."""

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""x, y, step of x, step of y of the passes of an interlaced PNG."""


def every_level(bands: int, levels: int = 65536) -> Samples:
    """uint16 (256, levels / 256, bands): each of the levels in each band, in another order."""
    order = np.random.default_rng(0)
    bits = np.stack([order.permutation(levels) for _ in range(bands)], -1)
    return bits.reshape(levels // (levels // min(256, levels)), -1, bands).astype(np.uint16)


# ---- PNG ----


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(samples: Samples, bits: int = 16, interlaced: bool = False, chunks: bytes = b"") -> bytes:
    """Grey, grey with alpha, RGB or RGBA by the number of bands; `chunks` come before the pixels."""
    height, width, bands = samples.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    passes = [samples[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [samples]
    rows = b"".join(b"\0" + packed(row, bits) for part in passes if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    body = png_chunk(b"IHDR", header) + chunks + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def packed(row: Samples, bits: int, order: str = ">") -> bytes:
    """A row of samples of this many bits, the last byte filled up."""
    if bits >= 8:
        return row.astype(f"{order}u{bits // 8}").tobytes() if bits % 8 == 0 else twelve(row)
    each = (row.reshape(-1, 1) >> np.arange(bits)[::-1]) & 1
    return np.packbits(each.astype(np.uint8).ravel()).tobytes()


def twelve(row: Samples) -> bytes:
    """12-bit samples, two in three bytes."""
    each = (row.reshape(-1, 1) >> np.arange(12)[::-1]) & 1
    return np.packbits(each.astype(np.uint8).ravel()).tobytes()


# ---- PGM and PPM ----


def pnm(samples: Samples, white: int, plain: bool = False) -> bytes:
    """PGM or PPM by the number of bands."""
    height, width, bands = samples.shape
    kind = {1: 5, 3: 6}[bands] - 3 * plain
    header = f"P{kind}\n# made by hand\n{width} {height}\n{white}\n".encode()
    if plain:
        return header + b"\n".join(b" ".join(b"%d" % value for value in row.ravel()) for row in samples)
    return header + samples.astype(">u2" if white > 255 else np.uint8).tobytes()


# ---- TIFF ----


def tiff(
    samples: Samples,
    bits: int = 16,
    order: str = "<",
    deflated: bool = False,
    photometric: int | None = None,
    tags: dict[int, tuple[int, ...]] | None = None,
) -> bytes:
    """One strip, or one a plane with PlanarConfiguration (284) 2. `order`: < little, > big; `tags`: more of 16 bits."""
    height, width, bands = samples.shape
    if photometric is None:
        photometric = 1 if bands < 3 else 2
    planes = np.split(samples, bands, -1) if (tags or {}).get(284) == (2,) else [samples]
    strips = [b"".join(packed(row, bits, order) for row in plane) for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflated else strips
    short = {256: (width,), 257: (height,), 258: (bits,) * bands, 259: (8 if deflated else 1,), 262: (photometric,)}
    short |= {277: (bands,), 278: (height,), **(tags or {})}
    at = 8 + 2 + 12 * (len(short) + 2) + 4 + 2 * sum(len(values) for values in short.values()) + 8 * len(strips)
    places = np.cumsum([at, *map(len, strips)])[:-1].tolist()
    fields = {tag: ("H", 3, values) for tag, values in short.items()}
    fields |= {273: ("I", 4, tuple(places)), 279: ("I", 4, tuple(map(len, strips)))}
    entries, values = b"", b""
    for tag, (code, kind, numbers) in sorted(fields.items()):
        body = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers))
        if len(body) <= 4:
            entries += body.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", 8 + 2 + 12 * len(fields) + 4 + len(values))
            values += body
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(fields))
    return (head + entries + bytes(4) + values).ljust(at, b"\0") + b"".join(strips)
