"""Pixel losses against their formulas; LPIPS against the package lpips, and that nothing can put it into training mode."""

import hashlib
import http.client
import io
import math
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from damages import DAMAGES, damage, read
from endless import ENDLESS, guarded
from safetensors.torch import save_file
from tensors import grad, normal
from torch import Tensor, nn

from midway.tokenizers import perceptual
from midway.tokenizers.losses import Pixel, pixel_loss
from midway.tokenizers.perceptual import Net, Perceptual
from midway.tokenizers.weights import receive

pytestmark = pytest.mark.usefixtures("one_thread")

NETS: tuple[Net, ...] = ("vgg", "alex")
FORMULAS: dict[Pixel, Callable[[float], float]] = {
    "l1": abs,
    "l2": lambda d: d * d,
    "charbonnier": lambda d: math.hypot(d, 0.25),
}


def images(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).clamp(-1, 1)


# ---- pixels ----


@pytest.mark.parametrize("kind", FORMULAS)
def test_pixel_losses_are_means_over_all_elements(kind: Pixel) -> None:
    a, b = images(3, 2, 4, 5), images(3, 2, 4, 5, seed=1)
    expected = [FORMULAS[kind](x - y) for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
    loss = pixel_loss(a, b, kind, eps=0.25)
    assert loss.item() == pytest.approx(math.fsum(expected) / len(expected), rel=1e-6)
    half = pixel_loss(a.bfloat16(), b.bfloat16(), kind)
    assert torch.equal(half, pixel_loss(a.bfloat16().float(), b.bfloat16().float(), kind))
    assert half.dtype == torch.float32


def test_charbonnier_is_smooth_where_nothing_is_wrong() -> None:
    a = torch.tensor([0.0, 1e-3, -4.0], requires_grad=True)
    pixel_loss(a, torch.zeros(3), "charbonnier").backward()
    torch.testing.assert_close(3 * grad(a), torch.tensor([0, 0.5**0.5, -1]), rtol=1e-5, atol=0)


def test_what_would_broadcast_or_mean_nothing_raises() -> None:
    a = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="choose one of: l1, l2, charbonnier"):
        pixel_loss(a, a, "huber")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\)"):
        pixel_loss(a[:, :1], a, "l1")
    with pytest.raises(ValueError, match="eps is 0"):
        pixel_loss(a, a, "charbonnier", eps=0)


# ---- LPIPS ----


def random_features(net: Net) -> nn.Sequential:
    """The convolutions of torchvision's classifier, with activations of about the size of pixels at every depth."""
    from torchvision import models

    with torch.device("meta"):
        features = (models.vgg16 if net == "vgg" else models.alexnet)(weights=None).features
    assert isinstance(features, nn.Sequential)
    features.to_empty(device="cpu").eval()
    state = {name: normal(*p.shape, seed=len(name)) for name, p in features.state_dict().items()}
    scaled = {n: v * (2 / v[0].numel()) ** 0.5 if v.ndim > 1 else 0.1 * v for n, v in state.items()}
    features.load_state_dict(scaled)
    return features


@pytest.fixture(scope="module")
def backbones() -> dict[Net, nn.Sequential]:
    return {net: random_features(net) for net in NETS}


@pytest.fixture(scope="module")
def files(backbones: dict[Net, nn.Sequential], tmp_path_factory: pytest.TempPathFactory) -> dict[Net, Path]:
    """The backbones' weights as safetensors, with torchvision's names, and with a classifier that nobody asks for."""
    folder = tmp_path_factory.mktemp("backbones")
    for net, features in backbones.items():
        state = {f"features.{name}": value for name, value in features.state_dict().items()}
        save_file({**state, "classifier.0.bias": torch.zeros(3)}, folder / f"{net}.safetensors")
    return {net: folder / f"{net}.safetensors" for net in NETS}


@pytest.fixture(scope="module")
def alex(files: dict[Net, Path]) -> Perceptual:
    return Perceptual("alex", files["alex"])


@pytest.mark.parametrize("net", NETS)
def test_distances_are_those_of_lpips(
    net: Net, files: dict[Net, Path], backbones: dict[Net, nn.Sequential], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lpips
    from torchvision import models

    name = {"vgg": "vgg16", "alex": "alexnet"}[net]
    monkeypatch.setattr(models, name, lambda pretrained: SimpleNamespace(features=backbones[net]))
    reference, ours = lpips.LPIPS(net=net, verbose=False), Perceptual(net, files[net])
    a, b = images(3, 3, 40, 33), images(3, 3, 40, 33, seed=1)
    leaves = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for _ in range(2)]
    expected, found = reference(*leaves[0]).flatten(), ours(*leaves[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found.shape == (3,)
    assert expected.min() > 0.01
    weights = torch.tensor([1.0, -2.0, 3.0])  # so that samples cannot be mixed up
    for loss in (expected, found):
        (weights * loss).sum().backward()
    for theirs, mine in zip(*leaves, strict=True):
        assert grad(theirs).abs().max() > 0
        torch.testing.assert_close(mine.grad, grad(theirs), rtol=1e-3, atol=1e-7)
    grey = reference(a[:, :1].repeat(1, 3, 1, 1), b[:, :1].repeat(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(ours(a[:, :1], b[:, :1]), grey, rtol=1e-5, atol=0)


@pytest.mark.parametrize("net", NETS)
def test_flat_images_are_at_distance_0_with_finite_gradients(net: Net, files: dict[Net, Path]) -> None:
    distance = Perceptual(net, files[net])
    a, b = images(1, 3, 32, 32), torch.zeros(2, 3, 32, 32, requires_grad=True)
    assert distance(a, a).tolist() == [0]
    assert distance(b, b).tolist() == [0, 0]
    distance(b, b.detach() + 1e-7).sum().backward()
    assert grad(b).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_the_dtype_of_the_images_do_not_matter(alex: Perceptual, dtype: torch.dtype) -> None:
    a, b = images(2, 3, 32, 32).to(dtype), images(2, 3, 32, 32, seed=1).to(dtype)
    expected = alex(a.float(), b.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = alex(a, b)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_parent_neither_trains_nor_stores_it(alex: Perceptual) -> None:
    """In taming-transformers and LlamaGen a parent's train() gives LPIPS its dropout back."""
    parent = nn.ModuleDict({"perceptual": alex, "other": nn.Dropout()})
    a, b = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=1)
    expected = alex(a, b)
    assert parent.train().training
    assert torch.equal(alex(a, b), expected)
    assert not any(module.training for module in alex.modules())
    assert not parent.state_dict()
    assert not [*parent.parameters(), *parent.buffers()]
    assert not any(t.requires_grad for tensors in alex._held.values() for t in tensors)


def test_a_parent_moves_it_but_does_not_round_it(files: dict[Net, Path]) -> None:
    alex = Perceptual("alex", files["alex"])
    parent = nn.Sequential(nn.Linear(1, 1), alex)
    a, b = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=1)
    expected = alex(a, b)
    assert torch.equal(parent.to(torch.bfloat16)[1](a, b), expected)
    double = parent.to(torch.float64)[1](a, b)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, rtol=1e-5, atol=0)
    assert torch.equal(parent.to(torch.float32)[1](a, b), expected)
    parent.to("meta")
    assert all(t.device.type == "meta" for tensors in alex._held.values() for t in tensors)


@pytest.mark.parametrize(("net", "least"), [("vgg", 16), ("alex", 31)])
def test_images_are_refused_exactly_where_nothing_of_them_is_left(net: Net, least: int, files: dict[Net, Path]) -> None:
    distance = Perceptual(net, files[net])
    whole, other = images(1, 3, least, least), images(1, 3, least, least, seed=1)
    assert distance(whole, other).item() > 0
    with pytest.raises(ValueError, match=f"{least} x {least - 1}; .* at least {least} x {least}"):
        distance(whole[..., 1:], other[..., 1:])
    with pytest.raises(ValueError, match=r"\(1, 2, \d+, \d+\)"):
        distance(whole[:, :2], other[:, :2])
    with pytest.raises(ValueError, match="one to one"):
        distance(whole.expand(2, -1, -1, -1), other)


def test_the_protocol_names_backbone_and_heads(files: dict[Net, Path], tmp_path: Path, alex: Perceptual) -> None:
    state = torch.random.get_rng_state()
    again = Perceptual("alex", files["alex"])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.protocol == alex.protocol
    digest = hashlib.sha256()
    for tensor in [*alex._held["backbone"], *alex._held["heads"]]:
        digest.update(f"{tuple(tensor.shape)}\n".encode() + bytes(tensor.flatten().view(torch.uint8).tolist()))
    assert alex.protocol == f"LPIPS-alex@{digest.hexdigest()[:12]}"
    assert [head.shape[1] for head in alex._held["heads"]] == [64, 192, 384, 256, 256]


# ---- files ----


def test_a_pth_file_is_read_only_if_its_hash_is_torchvisions(
    backbones: dict[Net, nn.Sequential], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alex: Perceptual
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({f"features.{name}": value for name, value in backbones["alex"].state_dict().items()}, path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    with pytest.raises(ValueError, match=f"begins with {digits}, not with 7be5be79"):
        Perceptual("alex", path)
    accept(monkeypatch, path)
    assert Perceptual("alex", path).protocol == alex.protocol
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # the file is in torch.hub's cache: nothing is downloaded
    monkeypatch.setattr(perceptual, "receive", lambda *_: pytest.fail("downloaded"))
    cached = tmp_path / "hub" / "checkpoints" / f"alexnet-{digits}.pth"
    cached.parent.mkdir(parents=True)
    path.rename(cached)
    assert Perceptual("alex").protocol == alex.protocol


def accept(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Make the hash of `path` the expected one."""
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    known = replace(perceptual._BACKBONES["alex"], file=f"alexnet-{digits}.pth")
    monkeypatch.setattr(perceptual, "_BACKBONES", {"alex": known})


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"features.0.weight": SimpleNamespace(a=1)}, path)
    accept(monkeypatch, path)
    with pytest.raises(Exception, match="weights_only"):
        Perceptual("alex", path)


@pytest.mark.parametrize("sent", ["no route to host", "another file", "without an end", "a broken line"])
def test_a_failed_download_says_what_to_do(sent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return bytes(size or 0)

    def answer(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        assert request.full_url == "https://download.pytorch.org/models/vgg16-397923af.pth" and timeout < 60
        if sent == "no route to host":
            raise urllib.error.URLError(sent)
        if sent == "a broken line":
            raise http.client.IncompleteRead(b"")
        return Endless() if sent == "without an end" else io.BytesIO(b"another")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", answer)
    monkeypatch.setattr(perceptual, "receive", lambda url, path: receive(url, path, 8 << 20))
    words = {"without an end": "more than the limit", "a broken line": "IncompleteRead"}.get(sent, sent)
    with pytest.raises(ValueError, match=f"why: .*{words}") as error:
        Perceptual()
    assert all(remedy in str(error.value) for remedy in ("network once", "--loss.perceptual-weights", "weight to 0"))
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_cached_file_is_a_regular_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    ENDLESS[kind][0](tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    with pytest.raises(ValueError, match="is not a regular file"):
        guarded(Perceptual)


def test_files_that_cannot_serve_are_named(files: dict[Net, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing .*vgg16-397923af"):
        Perceptual("vgg", files["alex"])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    for path in (broken, tmp_path / "absent.safetensors", tmp_path / "absent.pth"):
        with pytest.raises(ValueError, match=f"cannot use .*{path.name}"):
            Perceptual("vgg", path)
    with pytest.raises(ValueError, match="choose one of: vgg, alex"):
        Perceptual("squeeze")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in DAMAGES if name not in ("one too many", "one of bfloat16")])
def test_a_backbone_of_other_tensors_raises(name: str, files: dict[Net, Path], tmp_path: Path) -> None:
    """Surplus ones may be there: those of the classifier."""
    file = Path(shutil.copy(files["alex"], tmp_path / "alex.safetensors"))
    tensors, header = read(file)
    save_file({key: value for key, value in tensors.items() if "features" in key}, file, header or None)
    Perceptual("alex", file)
    damage(file, name)
    with pytest.raises(ValueError, match=r"alex\.safetensors"):
        Perceptual("alex", file)


def test_a_missing_package_is_named(files: dict[Net, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"pip install 'midway\[perceptual\]'"):
        Perceptual("alex", files["alex"])
