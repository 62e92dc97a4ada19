"""FSQ's options: symmetric codes, iFSQ, noise dropout, saturation; and its peer."""

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from tensors import grad, normal
from torch import Tensor

from midway.tokenizers.fsq import FSQ, FSQ_LEVELS, Form, saturation
from midway.tokenizers.quantizers import make_quantizer

VARIANTS: dict[str, tuple[Form, bool]] = {
    "tanh": ("tanh", False),
    "symmetric": ("tanh", True),
    "sigmoid": ("sigmoid", False),
    "ifsq": ("ifsq", False),
    "fsp": ("fsp", False),
}


def bounded(variant: str, z: Tensor, level: int) -> Tensor:
    """The latent of one channel, straight from each paper, in float64."""
    if variant == "tanh":
        half, offset = (level - 1) * 1.001 / 2, 0.5 * (level % 2 == 0)
        return (torch.tanh(z + math.atanh(offset / half)) * half - offset) / (level // 2)
    return {
        "symmetric": torch.tanh(z),
        "sigmoid": 2 / (1 + torch.exp(-z)) - 1,
        "ifsq": 2 / (1 + torch.exp(-1.6 * z)) - 1,
        "fsp": torch.erf(z / math.sqrt(2)),
    }[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_value_codes_and_gradient_are_those_of_the_closed_form(variant: str) -> None:
    levels = {"tanh": [8, 5, 6, 7], "ifsq": [5, 17, 3, 7]}.get(variant, [2, 5, 8, 17])
    z, weight = 1.5 * normal(2, 4, 200), normal(2, 4, 200, seed=1)
    ours, reference = z.clone().requires_grad_(), z.double().requires_grad_()
    quantizer = FSQ(levels, *VARIANTS[variant], noise_dropout=0.0)
    out = quantizer(ours)
    (out.codes * weight).sum().backward()
    expected = torch.stack([bounded(variant, reference[:, i], level) for i, level in enumerate(levels)], 1)
    (expected * weight).sum().backward()
    torch.testing.assert_close(quantizer.latents(z).double(), expected.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(grad(ours).double(), reference.grad, atol=1e-6, rtol=1e-5)
    halves = torch.tensor([level // 2 if variant == "tanh" else (level - 1) / 2 for level in levels]).view(4, 1)
    whole = torch.tensor(levels).view(4, 1).double()
    if variant == "fsp":  # L equal bins, and their centres
        digits = torch.floor((expected.detach() + 1) * whole / 2).minimum(whole - 1)
        codes = (2 * digits + 1) / whole - 1
    else:
        digits = torch.round((expected.detach() + 1) * halves)
        codes = digits / halves - 1
    assert torch.equal(quantizer.indices_to_digits(out.indices), digits.long())
    torch.testing.assert_close(out.codes.double(), codes, atol=1e-6, rtol=0)


@pytest.mark.parametrize("level", [2, 3, 4, 8, 17, 256])
def test_symmetric_codes_are_those_of_the_paper(level: int) -> None:
    """arXiv 2411.19842, sec. 3.2: 2 / (L - 1) floor((L - 1) (tanh z + 1) / 2 + 1/2) - 1."""
    quantizer = FSQ([level], symmetric=True)
    codes = quantizer.indices_to_codes(torch.arange(level)[None])
    assert torch.equal(codes, -codes.flip(-1))
    assert (codes.min(), codes.max()) == (-1, 1)
    z = normal(1, 1, 20_000)
    place = (level - 1) * (torch.tanh(z.double()) + 1) / 2 + 0.5
    clear = (place - place.round()).abs() > 1e-4  # of half-way points, where float32 may fall to either side
    expected = 2 / (level - 1) * torch.floor(place) - 1
    torch.testing.assert_close(quantizer(z).codes[clear].double(), expected[clear], atol=1e-6, rtol=0)
    assert torch.equal(quantizer(-z).codes[clear], -quantizer(z).codes[clear])
    assert clear.double().mean() > 0.9


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [3, 4, 5, 6, 7, 8, 17])
def test_zero_is_in_the_middle_bin(variant: str, level: int) -> None:
    """Of two middle bins that of the even digit, unless code 0 is one of the codes."""
    if variant == "ifsq" and level % 2 == 0:
        return
    quantizer = FSQ([level], *VARIANTS[variant], noise_dropout=0.0)
    z = torch.zeros(1, 1, 1)
    even = level // 2 - level // 2 % 2 if level % 2 == 0 and variant != "tanh" else level // 2
    assert quantizer(z).indices.item() == even
    assert abs(quantizer.latents(z).item()) < 1e-7


def test_options_are_plain_config_values() -> None:
    quantizer = make_quantizer({"type": "fsq", "levels": [2, 4], "symmetric": True, "noise_dropout": 0.5})
    assert repr(quantizer) == "FSQ(levels=[2, 4], form='tanh', symmetric=True, noise_dropout=0.5)"
    assert quantizer.noise_channels == 3
    assert FSQ([2, 4], "sigmoid").noise_channels == 0


def dropped_and_rounded(quantizer: FSQ, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in training with every sample dropped, then with none."""
    everywhere, nowhere = noise.clone(), noise.clone()
    everywhere[:, -1], nowhere[:, -1] = -9, 9
    return quantizer.train()(z, everywhere).codes, quantizer.train()(z, nowhere).codes


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropped_samples_are_the_latents_with_half_a_step_of_uniform_noise(variant: str) -> None:
    """Noise added to normalised codes would reach 1.75 steps at L = 8."""
    levels = [5, 17, 3] if variant == "ifsq" else [8, 5, 2] if variant in ("symmetric", "sigmoid", "fsp") else [8, 5, 4]
    quantizer = FSQ(levels, *VARIANTS[variant], noise_dropout=0.5)
    z, noise = 0.2 * normal(20, 3, 500), normal(20, 4, 500, seed=1)
    latents = quantizer.latents(z).double()
    dropped, rounded = dropped_and_rounded(quantizer, z, noise)
    assert torch.equal(rounded, quantizer.snap(quantizer.latents(z)))
    for i, level in enumerate(levels):
        step = 1 / (level // 2) if variant == "tanh" else 2 / level if variant == "fsp" else 2 / (level - 1)
        uniform = 0.5 * torch.erfc(-noise[:, i].double() / math.sqrt(2)) - 0.5
        in_steps = (dropped[:, i] - latents[:, i]) / step
        noisy = latents[:, i] + uniform * step
        inside = (noisy > -1) & (noisy < 1 - step * (level % 2 == 0 and variant == "tanh"))
        assert inside.double().mean() > 0.5
        torch.testing.assert_close(in_steps[inside], uniform[inside], atol=1e-4, rtol=0)
        assert 0.49 < in_steps.abs().max() <= 0.5 + 1e-5
        assert in_steps.mean().abs() < 0.02
        assert in_steps.var().item() == pytest.approx(1 / 12, rel=0.05)
        assert bool(((dropped[:, i] - rounded[:, i]).abs() < step * (1 + 1e-5)).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropped_codes_stay_in_the_range_of_the_codes_and_keep_their_gradient(variant: str) -> None:
    levels = [5, 17] if variant == "ifsq" else [8, 4]
    quantizer = FSQ(levels, *VARIANTS[variant], noise_dropout=1.0)
    z = (5 * normal(8, 2, 200)).requires_grad_()
    codes = quantizer(z, normal(8, 3, 200, seed=1)).codes
    codes.sum().backward()
    straight = z.detach().clone().requires_grad_()
    quantizer.latents(straight).sum().backward()
    assert torch.equal(grad(z), grad(straight))
    every = quantizer.indices_to_codes(torch.arange(math.prod(levels))[None])
    if variant == "fsp":  # noise of a whole bin reaches from the outermost centres to the ends
        every = torch.tensor([-1.0, 1]).expand(1, 2, 2)
    assert torch.equal(codes.amin((0, 2)), every.amin((0, 2)))
    assert torch.equal(codes.amax((0, 2)), every.amax((0, 2)))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_whole_samples_are_dropped_with_the_probability_requested(p: float) -> None:
    """Indices are those of the rounded value for all; codes decode from them but for the dropped samples."""
    quantizer = FSQ([8, 5], noise_dropout=p)
    z, noise = 0.2 * normal(4000, 2, 3), normal(4000, 3, 3, seed=1)
    out = quantizer(z, noise)
    assert torch.equal(out.indices, FSQ([8, 5])(z).indices)
    differs = (out.codes != quantizer.indices_to_codes(out.indices)).flatten(1)
    assert torch.equal(differs.any(1), differs.all(1))
    assert torch.equal(differs.any(1), noise[:, 2, 0] <= (NormalDist().inv_cdf(p) if p < 1 else math.inf))
    assert differs.any(1).double().mean().item() == pytest.approx(p, abs=0.02)


def test_noise_dropout_rounds_in_evaluation_and_needs_no_noise_there() -> None:
    z, plain = normal(4, 2, 5), FSQ([8, 5])
    quantizer = FSQ([8, 5], noise_dropout=1.0).eval()
    for out in (quantizer(z), quantizer(z, normal(4, 3, 5)), plain.train()(z, normal(4, 3, 5))):
        assert torch.equal(out.codes, plain(z).codes)
        assert torch.equal(out.codes, plain.indices_to_codes(out.indices))


def test_the_draw_is_a_function_of_the_noise_of_the_first_position() -> None:
    quantizer = FSQ([8, 5], noise_dropout=0.5)
    z, noise = normal(16, 2, 3, 3), normal(16, 3, 3, 3, seed=1)
    codes = quantizer(z, noise).codes
    elsewhere = noise.clone()
    elsewhere[:, -1, 1:] = 0
    elsewhere[:, -1, :, 1:] = 0
    assert torch.equal(codes, quantizer(z, elsewhere).codes)


def test_fsp_never_rounds_in_training_and_evaluates_on_equal_bins() -> None:
    """arXiv 2602.17133: bins of one width, their centres as codes, noise of one bin; a normal z fills all bins alike."""
    quantizer, z = FSQ([4, 5], "fsp"), normal(2000, 2, 5)
    assert (quantizer.noise_dropout, quantizer.noise_channels) == (1.0, 3)
    with pytest.raises(ValueError, match="none was given"):
        quantizer(z)
    out = quantizer(z, normal(2000, 3, 5, seed=1))
    off = (out.codes - quantizer.indices_to_codes(out.indices)).abs()
    assert bool((off > 0).any()) and bool((off <= torch.tensor([2 / 4, 2 / 5]).view(2, 1) * (1 + 1e-5)).all())
    evaluated = quantizer.eval()(z)
    assert torch.equal(evaluated.codes, quantizer.indices_to_codes(evaluated.indices))
    assert quantizer.indices_to_codes(torch.arange(4)[None])[0, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    shares = [quantizer.indices_to_digits(evaluated.indices)[:, i].unique(return_counts=True)[1] for i in (0, 1)]
    assert all((share / share.sum() * len(share) - 1).abs().max() < 0.1 for share in shares)


def test_unusable_noise_raises() -> None:
    quantizer, z = FSQ([8, 5], noise_dropout=0.5), normal(4, 2, 5)
    with pytest.raises(ValueError, match="none was given"):
        quantizer(z)
    for shape in ((4, 2, 5), (4, 3, 6), (3, 3, 5)):
        with pytest.raises(ValueError, match=r"takes noise \(4, 3, 5\), but it has shape"):
            quantizer(z, normal(*shape))
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="probability"):
            FSQ([8, 5], noise_dropout=p)


def test_recommended_levels_are_those_of_the_paper() -> None:
    """Table 1; app. A.4.1 for 4, 6, 9 and 11 bits, which misprints that of 12 bits as 7, 5, 5, 5."""
    table = {
        4: (5, 3), 6: (8, 8), 8: (8, 6, 5), 9: (8, 8, 8), 10: (8, 5, 5, 5), 11: (8, 8, 6, 5), 12: (7, 5, 5, 5, 5),
        14: (8, 8, 8, 6, 5), 16: (8, 8, 8, 5, 5, 5),
    }  # fmt: skip
    assert table == FSQ_LEVELS
    assert [math.prod(levels) for levels in table.values()] == [15, 64, 240, 512, 1000, 1920, 4375, 15360, 64000]


def test_saturation_counts_edge_bins_and_the_magnitude_of_z() -> None:
    quantizer = FSQ([5, 8])
    z = torch.tensor([[[-9.0, 0, 0, 9], [0, 0.1, 0, 9]]], requires_grad=True)
    report = saturation(quantizer, z)
    assert report["edge_mass"].item() == pytest.approx(3 / 8)
    assert report["mean_abs_z"].item() == pytest.approx(27.1 / 8)
    assert not any(value.requires_grad for value in report.values())
    spread = saturation(quantizer, normal(64, 2, 100))
    assert spread["mean_abs_z"].item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.02)
    assert spread["edge_mass"] < saturation(quantizer, 3 * normal(64, 2, 100))["edge_mass"] - 0.3
    bfloat = saturation(quantizer, normal(2, 2, 9).bfloat16())
    assert all(value.dtype == torch.float32 for value in bfloat.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_edge_bins_of_saturation_are_those_of_the_digits(variant: str) -> None:
    levels = [3, 5, 17, 255] if variant == "ifsq" else [3, 4, 8, 255]
    levels += [2] if variant in ("symmetric", "sigmoid", "fsp") else []
    quantizer, z = FSQ(levels, *VARIANTS[variant], noise_dropout=0.0), 2 * normal(4000, len(levels), 5)
    digits = quantizer.indices_to_digits(quantizer(z).indices)
    edge = (digits == 0) | (digits == torch.tensor(levels).view(1, -1, 1) - 1)
    assert saturation(quantizer, z)["edge_mass"].item() == pytest.approx(edge.double().mean().item(), abs=1e-5)


@pytest.mark.parametrize(("bits", "expected"), [(6, 0.0391), (8, 0.0626), (10, 0.0725)])
def test_distortion_of_a_gaussian_source_is_above_the_bound_and_as_computed(bits: int, expected: float) -> None:
    """Bound: D = K**(-2 / channels). FSQ: centroids of its cells, for z = 0.7 x, about the best scale of x ~ N(0, 1)."""
    levels = FSQ_LEVELS[bits]
    size, channels = math.prod(levels), len(levels)
    x = normal(1, channels, 2**17)
    indices, rows = FSQ(levels)(0.7 * x).indices[0], x[0].T.double()
    sums = torch.zeros(size, channels, dtype=torch.float64).index_add_(0, indices, rows)
    counts = indices.bincount(minlength=size).clamp(min=1).unsqueeze(1)
    measured = (rows - (sums / counts)[indices]).square().mean().item()
    exact = sum(cell_distortion(level) for level in levels) / channels
    assert measured == pytest.approx(exact, rel=0.02)
    assert measured == pytest.approx(expected, rel=0.02)
    assert 2.2 < measured / size ** (-2 / channels) < 2.6


def cell_distortion(level: int) -> float:
    """1 - sum_k (phi(a_k) - phi(b_k))^2 / P(a_k < x < b_k): the MSE of x ~ N(0, 1) given its bin of the tanh form."""
    half, offset, normals = (level - 1) * 1.001 / 2, 0.5 * (level % 2 == 0), NormalDist()
    shift = math.atanh(offset / half)
    inner = [(math.atanh((k + 0.5 - level // 2 + offset) / half) - shift) / 0.7 for k in range(level - 1)]
    cells = itertools.pairwise([-40.0, *inner, 40.0])
    return 1 - sum((normals.pdf(a) - normals.pdf(b)) ** 2 / (normals.cdf(b) - normals.cdf(a)) for a, b in cells)


@pytest.mark.parametrize(
    ("levels", "symmetric"), [((8, 5, 5, 5), False), ((7, 5, 5, 5, 5), False), ((2, 8, 3), True), ((8, 5, 4), True)]
)
def test_indices_codes_and_gradient_equal_those_of_the_peer(levels: tuple[int, ...], symmetric: bool) -> None:
    """vector-quantize-pytorch, where conventions agree."""
    peer = pytest.importorskip("vector_quantize_pytorch").FSQ(list(levels), preserve_symmetry=symmetric)
    quantizer = FSQ(levels, symmetric=symmetric)
    ours, theirs = (normal(4, len(levels), 32, 32).requires_grad_() for _ in range(2))
    weight = normal(4, len(levels), 32, 32, seed=1)
    out, (codes, indices) = quantizer(ours), peer(theirs)
    assert torch.equal(out.indices, indices.long())
    torch.testing.assert_close(out.codes, codes, atol=1e-6, rtol=0)
    every = torch.arange(quantizer.codebook_size or 0)[None]
    torch.testing.assert_close(quantizer.indices_to_codes(every).mT, peer.indices_to_codes(every), atol=1e-6, rtol=0)
    (out.codes * weight).sum().backward()
    (codes * weight).sum().backward()
    torch.testing.assert_close(grad(ours), theirs.grad, atol=1e-6, rtol=1e-5)


def test_we_differ_from_the_peer_on_purpose() -> None:
    """Ties; indices beyond 2**24; the unit of the noise, which is half a step here; codes where it is added."""
    peers = pytest.importorskip("vector_quantize_pytorch").FSQ
    middle = torch.zeros(1, 1, 1)
    assert FSQ([2], symmetric=True)(middle).indices.item() == 0
    assert peers([2], preserve_symmetry=True)(middle)[1].item() == 1

    huge = FSQ([2] * 27, symmetric=True)
    codes = huge(normal(1, 27, 500)).codes
    expected = [sum(1 << i for i, bit in enumerate(row) if bit > 0) for row in codes[0].T.tolist()]
    theirs = peers([2] * 27, preserve_symmetry=True, return_indices=False).codes_to_indices(codes.mT)
    assert huge.codes_to_indices(codes)[0].tolist() == expected
    assert theirs[0].tolist() != expected

    torch.manual_seed(0)
    z, step = 0.1 * normal(50, 1, 100), 2 / 7
    codes = peers([8], preserve_symmetry=True, noise_dropout=1.0, channel_first=True)(z)[0]
    ours = FSQ([8], symmetric=True, noise_dropout=1.0)(z, normal(50, 2, 100, seed=1)).codes
    assert (codes - torch.tanh(z)).abs().max() > 1.5 * step
    assert (ours - torch.tanh(z)).abs().max() < 0.5001 * step
