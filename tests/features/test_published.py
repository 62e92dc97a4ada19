"""References as others publish them: read, checked, written, never unpickled; the formulas of torch-fidelity and ADM."""

import io
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.files import file_hash
from midway.gen.data.images import ImageData
from midway.gen.data.pixels import Images
from midway.gen.features.extractor import Activations, Extractor
from midway.gen.features.published import check_saved, open_reference, save_reference
from midway.gen.features.published_files import Published, read_published
from midway.gen.features.reference import FeatureReference, make_reference
from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.kid import kid
from midway.gen.metrics.moments import FeatureStatistics

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*mostly bias")]
DIM = 6


class Means(Extractor):
    """A network whose features are fixed mixtures of the pixels' rows."""

    name, label, note, dim = "means@0", "Fréchet distance (means@0)", "", DIM

    def check(self, images: Images, what: str = "the images are") -> None:
        if images.dtype != torch.uint8:
            raise DataError("means need uint8 images", what, "convert them")

    def activations(self, images: Tensor) -> Activations:
        mix = torch.randn(images[0].numel(), DIM, generator=torch.Generator().manual_seed(5))
        return Activations(images.flatten(1).float() / 255 @ mix, None)


def pictures(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)


REAL, FAKE = pictures(200, 1), pictures(150, 2)


def moments(features: Tensor) -> dict[str, NDArray[np.float64]]:
    """As every evaluator computes them."""
    x = features.double().numpy()
    return {"mu": x.mean(axis=0), "sigma": np.cov(x, rowvar=False)}


@pytest.fixture
def real() -> dict[str, NDArray[np.float64]]:
    return moments(Means().features(REAL))


def expected_distance() -> float:
    x, y = (FeatureStatistics.of(Means().features(images)) for images in (FAKE, REAL))
    return frechet_distance(x, y)


# ---- the formats ----


def test_an_npz_of_mean_and_covariance_is_a_reference(real: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "cifar10-train.npz"
    np.savez(path, **real)
    reference = open_reference(path, Means())
    assert reference.distance(FAKE) == pytest.approx(expected_distance(), rel=1e-12)
    assert reference.distance(FAKE[:4]) > 0
    assert reference.name == f"cifar10-train@{file_hash(path)[:12]}" and reference.fingerprint == file_hash(path)
    assert reference.id.endswith("n=?") and reference.sample is None and reference.features == "means@0"


def test_adms_file_has_images_for_the_metrics_of_single_images(real: dict[str, Any], tmp_path: Path) -> None:
    """Of which only some are in the file; moments stay those of all."""
    path, kept = tmp_path / "VIRTUAL_imagenet.npz", REAL[:50]
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(path, kept.permute(0, 2, 3, 1).numpy(), **real, **spatial)
    plain = open_reference(path, Means(), ())
    assert plain.sample is None and plain.distance(FAKE) == pytest.approx(expected_distance(), rel=1e-12)
    full = open_reference(path, Means(), ("kid",), size=(3, 4, 4))
    assert full.sample is not None and torch.equal(full.sample, Means().features(kept))
    assert full.distance(FAKE) == plain.distance(FAKE)
    assert kid(Means().features(FAKE), full.sample) == kid(Means().features(FAKE), Means().features(kept))
    with pytest.raises(DataError, match="are 4x4") as caught:
        open_reference(path, Means(), ("kid",), size=(3, 8, 8))
    assert "8x8" in caught.value.why


def test_a_file_of_images_alone_is_measured(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", REAL.permute(0, 2, 3, 1).numpy())
    reference = open_reference(tmp_path / "images.npz", Means())
    assert reference.distance(FAKE) == pytest.approx(expected_distance(), rel=1e-12)
    assert reference.id.endswith("n=200") and len(reference.sample) == 200  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_tensors_of_mean_and_covariance(ending: str, real: dict[str, Any], tmp_path: Path) -> None:
    tensors, path = {name: torch.from_numpy(value) for name, value in real.items()}, tmp_path / f"stat{ending}"
    save_file(tensors, path) if ending == ".safetensors" else torch.save(tensors, path)
    assert open_reference(path, Means()).distance(FAKE) == pytest.approx(expected_distance(), rel=1e-12)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_the_state_of_torchmetrics_is_a_reference(ending: str, tmp_path: Path) -> None:
    try:  # a torchvision of another torch raises RuntimeError
        from torchmetrics.image.fid import FrechetInceptionDistance
    except Exception as error:
        pytest.skip(f"torchmetrics cannot be used ({error})")

    class Network(torch.nn.Module):
        num_features = DIM

        def forward(self, images: Tensor) -> Tensor:
            return Means().features(images)

    metric = FrechetInceptionDistance(feature=Network(), normalize=False)
    metric.persistent(True)
    metric.update(REAL, real=True)
    metric.update(FAKE, real=False)
    state, path = metric.state_dict(prefix="fid."), tmp_path / f"state{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    reference = open_reference(path, Means())
    assert reference.id.endswith("n=200")
    assert reference.distance(FAKE) == pytest.approx(float(metric.compute()), rel=1e-5)
    assert reference.distance(FAKE) == pytest.approx(expected_distance(), rel=1e-9)


def test_a_saved_reference_is_read_again_with_its_count_and_network(tmp_path: Path) -> None:
    images = ImageData(REAL, torch.zeros(200).long(), ("all",), "mine", "f" * 64)
    made, path = make_reference(Means(), "means@0", images), tmp_path / "saved.npz"
    save_reference(path, made)
    again = open_reference(path, Means())
    assert again.id.endswith("n=200") and again.distance(FAKE) == pytest.approx(made.distance(FAKE), rel=1e-12)
    with np.load(path, allow_pickle=False) as arrays:  # as pytorch-fid, EDM and ADM read it
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
        np.testing.assert_allclose(arrays["sigma"], moments(Means().features(REAL))["sigma"], rtol=1e-12, atol=1e-14)
    save_reference(tmp_path / "copy.npz", again)
    np.testing.assert_array_equal(read_published(tmp_path / "copy.npz").mean, made.statistics.mean)
    other = Means()
    other.name = "means@1"
    with pytest.raises(DataError, match="another feature network") as caught:
        open_reference(path, other)
    assert "means@0, not by means@1" in caught.value.why


def test_an_unknown_count_stays_unknown(real: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **real)
    save_reference(tmp_path / "b.npz", open_reference(tmp_path / "a.npz", Means()))
    assert read_published(tmp_path / "b.npz").count is None


# ---- the formulas of others, on the true architecture ----


class Some(Extractor):
    """The first features of a network: as many as few images can have a covariance of."""

    def __init__(self, network: Extractor, dim: int) -> None:
        super().__init__()
        self.network, self.dim = network, dim
        self.name = self.label = f"{network.name}+first-{dim}"
        self.note = ""

    def check(self, images: Images, what: str = "the images are") -> None:
        self.network.check(images, what)

    def activations(self, images: Tensor) -> Activations:
        return Activations(self.network.features(images)[:, : self.dim], None)


def adms_distance(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:
    """FIDStatistics.frechet_distance of ADM's evaluator: a matrix root of the product, its real part."""
    from scipy import linalg

    root = linalg.sqrtm(sigma1.dot(sigma2))
    assert np.isfinite(root).all()
    return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(np.real(root)))


def test_distances_are_torch_fidelitys_and_adms_on_random_inception_weights(tmp_path: Path) -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    from random_inception import random_state

    from midway.gen.features.inception import open_inception

    torch.save(random_state(), tmp_path / "random.pth")
    network = Some(open_inception(tmp_path / "random.pth", block=8), 8)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (32, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images[16:] = images[16:] // 2 + 40
    real, fake = network.features(images).double().split(16)
    np.savez(tmp_path / "theirs.npz", **moments(real))  # pyright: ignore[reportArgumentType]
    ours = open_reference(tmp_path / "theirs.npz", network).distance_of(fake)
    first, second = (theirs.fid_features_to_statistics(part) for part in (fake, real))
    fidelity = theirs.fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]
    assert ours > 0
    assert ours == pytest.approx(fidelity, rel=1e-6)
    assert ours == pytest.approx(adms_distance(*first.values(), *second.values()), rel=1e-6)


# ---- what is not read ----


class Harmful:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["edm2.pkl", "edm2.npz", "cache.pt", "cache.pth"])
def test_no_pickle_is_read(name: str, tmp_path: Path) -> None:
    path, mark = tmp_path / name, tmp_path / "harmed"
    harmful = {"mu": Harmful(mark), "sigma": Harmful(mark)}
    torch.save(harmful, path) if "pt" in path.suffix else path.write_bytes(pickle.dumps(harmful))
    with pytest.raises(DataError, match="is not read") as caught:
        open_reference(path, Means())
    assert not mark.exists() and len(str(caught.value).splitlines()) == 3


def test_objects_in_an_npz_are_not_read(tmp_path: Path) -> None:
    mark = tmp_path / "harmed"
    np.savez(tmp_path / "a.npz", mu=np.array([Harmful(mark)], dtype=object), sigma=np.eye(2))
    with pytest.raises(DataError, match="cannot be read") as caught:
        open_reference(tmp_path / "a.npz", Means())
    assert "not unpickled" in caught.value.why and not mark.exists()


@pytest.mark.parametrize("kind", ["edm2", "torch-fidelity"])
def test_the_command_of_the_error_converts_a_pickle(kind: str, real: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / ("ref.pkl" if kind == "edm2" else "stat-fid-2048.pt")
    if kind == "edm2":
        path.write_bytes(pickle.dumps({"fid": real, "fd_dinov2": {"mu": 0}, "num_images": 200}))
    else:
        torch.save(real, path)  # numpy's arrays, as torch-fidelity stores them
    with pytest.raises(DataError) as caught:
        open_reference(path, Means())
    command = re.search(r"(python -c .*) \(of", caught.value.fix)
    assert command is not None
    subprocess.run([sys.executable, *shlex.split(command[1])[1:]], cwd=tmp_path, check=True)
    found = open_reference(tmp_path / f"{path.stem}.npz", Means())
    assert found.distance(FAKE) == pytest.approx(expected_distance(), rel=1e-12)


def _without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda real: {key: value for key, value in real.items() if key != name}


def _with(**changes: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda real: {**real, **{key: change(real) for key, change in changes.items()}}


def _lopsided(real: dict[str, Any]) -> NDArray[np.float64]:
    sigma = real["sigma"].copy()
    sigma[0, 1] += 1e-3
    return sigma


def _least(real: dict[str, Any]) -> float:
    return float(np.linalg.eigvalsh(real["sigma"])[0])


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no sigma": (_without("sigma"), "no sigma"),
    "nothing": (lambda real: {"x": np.zeros(3)}, "no mu and no sigma"),
    "a row": (_with(mu=lambda real: real["mu"][None]), r"not \(D,\)"),
    "diagonal alone": (_with(sigma=lambda real: real["sigma"].diagonal()), r"not \(D,\)"),
    "one feature": (lambda real: {"mu": np.zeros(1), "sigma": np.eye(1)}, "D >= 2"),
    "nan": (_with(mu=lambda real: real["mu"] * np.nan), "not all finite"),
    "infinite": (_with(sigma=lambda real: real["sigma"] + np.inf), "not all finite"),
    "not symmetric": (_with(sigma=_lopsided), "not symmetric"),
    "not positive": (
        _with(sigma=lambda real: real["sigma"] - 2 * np.trace(real["sigma"]) * np.eye(DIM)),
        "no covariance",
    ),
    "indefinite": (_with(sigma=lambda real: real["sigma"] - 1.5 * _least(real) * np.eye(DIM)), "no covariance"),
    "zero": (_with(sigma=lambda real: 0 * real["sigma"]), "no covariance"),
    "one image": (_with(n=lambda real: np.int64(1)), "2 images"),
    "words": (_with(mu=lambda real: np.array(["a"] * DIM)), "could not convert"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_what_is_no_mean_and_covariance_is_a_data_error(how: str, real: dict[str, Any], tmp_path: Path) -> None:
    change, why = DAMAGED[how]
    np.savez(tmp_path / "bad.npz", **change(real))
    with pytest.raises(DataError, match=r"bad\.npz") as caught:
        open_reference(tmp_path / "bad.npz", Means())
    assert re.search(why, caught.value.why) and len(str(caught.value).splitlines()) == 3


def test_a_covariance_in_float32_is_read(real: dict[str, Any], tmp_path: Path) -> None:
    """Also a singular one, of fewer images than features, whose eigenvalues are rounded below 0."""
    few = moments(Means().features(REAL[:4]))
    np.savez(tmp_path / "few.npz", mu=few["mu"].astype(np.float32), sigma=few["sigma"].astype(np.float32))
    assert open_reference(tmp_path / "few.npz", Means()).distance(FAKE) > 0


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "cut", "claims", "other.pt"])
def test_files_of_another_kind_are_data_errors(kind: str, real: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / (kind if "." in kind else "a.npz")
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("mu sigma")
    elif kind == "cut":
        np.savez(path, **real)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "claims":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy", header.getvalue())
    elif kind == "other.pt":
        torch.save([torch.zeros(3)], path)
    with pytest.raises(DataError) as caught:
        open_reference(path, Means())
    assert str(path) in caught.value.what and len(str(caught.value).splitlines()) == 3


# ---- what a file cannot give ----


def test_metrics_of_single_images_need_images(real: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **real)
    for metric in ("kid", "sliced", "precision", "density"):
        with pytest.raises(UsageError, match=f"--metrics {metric} with --reference") as caught:
            open_reference(tmp_path / "a.npz", Means(), ("is", metric, "infinity"))
        assert "arr_0" in caught.value.fix
    assert open_reference(tmp_path / "a.npz", Means(), ("is", "infinity")).sample is None


def test_another_dimension_names_the_networks(real: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DataError, match="another feature network") as caught:
        open_reference(tmp_path / "a.npz", Means())
    assert "2048 features, means@0 has 6" in caught.value.why and "Inception" in caught.value.fix


def test_a_network_on_axes_has_no_published_reference(real: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **real)
    network = Means()
    object.__setattr__(network, "axes", 3)
    with pytest.raises(UsageError, match="--reference"):
        open_reference(tmp_path / "a.npz", network)


def test_a_reference_is_saved_as_npz(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--save-reference"):
        check_saved(tmp_path / "reference.pt", axes=False)
    with pytest.raises(UsageError, match="--save-reference"):
        check_saved(tmp_path / "reference.npz", axes=True)
    statistics = FeatureStatistics.of(Means().features(REAL))
    reference = FeatureReference(Means(), "means@0", statistics, "mine")
    with pytest.raises(UsageError, match=r"\.npz"):
        save_reference(tmp_path / "reference", reference)
    assert not list(tmp_path.iterdir())


def test_published_numbers_are_float64() -> None:
    assert Published(torch.zeros(2).double(), torch.eye(2).double()).count is None
