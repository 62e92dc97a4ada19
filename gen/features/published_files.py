"""Files of references as others publish them: mean and covariance of the features of a set of images.

    .npz                      mu (D,), sigma (D, D)            pytorch-fid; EDM's fid-refs; `write_published`, with n and features
                              and mu_s, sigma_s, arr_0         ADM's VIRTUAL_*.npz; arr_0 are the images of precision and recall
                              arr_0 alone                      images as ADM's samples, uint8 (N, H, W, C): measured here
    .pt, .pth, .safetensors   mu, sigma                        the same as tensors
                              ..._features_sum, _cov_sum, _num_samples    the state of torchmetrics' FrechetInceptionDistance

Nothing is unpickled: EDM2's .pkl and torch-fidelity's caches, which hold numpy objects, raise an error with the command that
converts them. sigma has the divisor n - 1, as all of them. mu_s and sigma_s belong to sFID, which is not measured here.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from midway.gen.core.errors import DataError, one_line, raising
from midway.gen.core.files import DAMAGE, read_bytes, read_tensors, regular_file, write_atomically
from midway.gen.data.external import NPZ_DAMAGE, read_array

LIMIT = 4 << 30
"""Bytes of an array, or of a file of tensors; a covariance of 2048 features has 34 MB."""
TENSORS = (".pt", ".pth", ".safetensors")
SYMMETRIC = 1e-5
"""|sigma - sigma^T| of a covariance in float32, in units of its largest variance."""
POSITIVE = 1e-5
"""The most negative eigenvalue that rounding leaves to a singular covariance in float32, in units of the largest."""


@dataclass(frozen=True)
class Published:
    """What a file holds: mean float64 (D,) and covariance float64 (D, D), of `count` images by `features`, None if not stated."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    features: str | None = None


def array_names(path: Path) -> tuple[str, ...]:
    """The arrays of an .npz, () of another file; DataError for one that is not there, or no .npz nor a file of tensors."""
    if path.suffix.lower() in TENSORS:
        return ()
    with raising(DataError, f"{path} cannot be read", "name a file of mu and sigma (.npz)", OSError, why=one_line):
        start = _start(path)
    if path.suffix.lower() == ".pkl" or start[:1] == b"\x80":
        raise pickled(path, "it is a pickle, and reading one runs the code in it")
    with (
        raising(
            DataError,
            f"{path} is no .npz",
            "name a file that np.savez(path, mu=mu, sigma=sigma) wrote",
            *NPZ_DAMAGE,
            why=one_line,
        ),
        zipfile.ZipFile(regular_file(path)) as archive,
    ):
        return tuple(name.removesuffix(".npy") for name in archive.namelist())


def _start(path: Path) -> bytes:
    with regular_file(path).open("rb") as file:
        return file.read(4)


def pickled(path: Path, why: str) -> DataError:
    """The error that names the command which converts a pickle; it is the user who decides to run its code."""
    read = "torch.load(f, weights_only=False)" if path.suffix.lower() in TENSORS else "pickle.load(open(f, 'rb'))"
    command = (
        f'python -c "import pickle, sys, torch, numpy as np; f, out, key = sys.argv[1:]; r = {read}; r = r.get(key, r); '
        f"np.savez(out, mu=r['mu'], sigma=r['sigma'])\" {path} {path.stem}.npz fid"
    )
    return DataError(
        f"{path} is not read", why, f"if you trust it, convert it: {command} (of EDM2's files the key fid or fd_dinov2)"
    )


def read_published(path: Path) -> Published:
    """Mean and covariance of a file. DataError for one that cannot be read, or holds no mean and covariance."""
    fix = "write it with np.savez(path, mu=mu, sigma=sigma): the mean (D,) and the covariance (D, D) of features (N, D)"
    arrays = _tensors(path) if path.suffix.lower() in TENSORS else _arrays(path, fix)
    with raising(DataError, f"{path} is no mean and covariance of features", fix):
        found = _from_sums(arrays) or _from_moments(arrays)
        return _checked(found)


def _arrays(path: Path, fix: str) -> dict[str, Any]:
    names = array_names(path)
    with (
        raising(DataError, f"{path} cannot be read", fix, *NPZ_DAMAGE, why=one_line),
        zipfile.ZipFile(regular_file(path)) as archive,
    ):
        return {name: read_array(archive, name, LIMIT) for name in ("mu", "sigma", "n", "features") if name in names}


def _tensors(path: Path) -> dict[str, Any]:
    """Tensors by name; DataError for a file of anything else, which would have to be unpickled."""
    if path.suffix.lower() == ".safetensors":
        with raising(DataError, f"{path} cannot be read", "write it again", *DAMAGE, why=one_line):
            return dict(read_tensors(path)[0])
    with raising(DataError, f"{path} cannot be read", "name a file of mu and sigma", OSError, why=one_line):
        data = read_bytes(path, LIMIT)
    try:
        read = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # runs no code
    except Exception as error:  # damage and code raise many kinds
        raise pickled(
            path, f"it holds more than tensors, and reading that may run code ({one_line(error)[:120]})"
        ) from None
    if not isinstance(read, Mapping):
        raise DataError(
            f"{path} is no mean and covariance of features", f"it is a {type(read).__name__}", "save mu and sigma"
        )
    return dict(read)


def _from_sums(arrays: Mapping[str, Any]) -> Published | None:
    """The states of torchmetrics: sums of the features and of their outer products, of `real` images."""
    ends = ("features_sum", "features_cov_sum", "features_num_samples")
    keys = [[key for key in arrays if key.endswith(f"real_{end}")] for end in ends]
    if not all(keys):
        return None
    total, outer, count = (torch.as_tensor(arrays[found[0]]).double() for found in keys)
    n = int(count)
    if n < 2:
        raise ValueError(f"it is of {n} images, and a covariance needs 2")
    mean = total / n
    return Published(mean, (outer - n * torch.outer(mean, mean)) / (n - 1), n)


def _from_moments(arrays: Mapping[str, Any]) -> Published:
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}: it has {', '.join(map(str, arrays)) or 'neither'}")
    mean, covariance = (torch.from_numpy(np.asarray(arrays[name], dtype=np.float64)) for name in ("mu", "sigma"))
    count = int(np.asarray(arrays["n"])) if "n" in arrays else None
    if count is not None and count < 2:
        raise ValueError(f"n is {count}, and a covariance needs 2 images")
    return Published(mean, covariance, count, str(arrays["features"]) if "features" in arrays else None)


def _checked(found: Published) -> Published:
    """With an exactly symmetric covariance. ValueError for shapes, values or a matrix that no features have."""
    mean, covariance = found.mean, found.covariance
    if mean.ndim != 1 or len(mean) < 2 or tuple(covariance.shape) != (len(mean), len(mean)):
        raise ValueError(
            f"mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, not (D,) and (D, D) with D >= 2"
        )
    if not bool(mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("its numbers are not all finite")
    scale = float(covariance.diagonal().abs().max())
    skew = float((covariance - covariance.T).abs().max())
    if skew > SYMMETRIC * scale:
        raise ValueError(
            f"sigma is not symmetric: it differs from its transpose by {skew:.2g}, with variances up to {scale:.2g}"
        )
    symmetric = (covariance + covariance.T) / 2
    eigenvalues = torch.linalg.eigvalsh(symmetric)
    if float(eigenvalues[0]) < -POSITIVE * float(eigenvalues[-1].clamp(min=0)) or float(eigenvalues[-1]) <= 0:
        raise ValueError(
            f"sigma is no covariance: its eigenvalues go from {eigenvalues[0]:.2g} to {eigenvalues[-1]:.2g}"
        )
    return Published(mean, symmetric, found.count, found.features)


# ---- writing ----


def write_published(path: Path, found: Published) -> None:
    """mu, sigma (float64), n and features as an .npz that the evaluators of pytorch-fid, EDM and ADM read too. DiskError."""
    arrays: dict[str, Any] = {"mu": found.mean.numpy(), "sigma": found.covariance.numpy()}
    known = {"n": found.count, "features": found.features}
    arrays |= {name: np.array(value) for name, value in known.items() if value is not None}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
