"""Flow layers: exact inverses, log-determinants against autodiff, what couplings keep, masks, squeezing, start from data."""

from collections.abc import Callable

import pytest
import torch
from flows import assert_bijection, assert_undone_in_float32, randomise
from flows import images as noise
from torch import Tensor

from midway.gen.baselines.couplings import (
    ChannelCoupling,
    CheckerboardCoupling,
    Coupling,
    CouplingNetworkConfig,
    checkerboard,
)
from midway.gen.baselines.flow_layers import (
    ActNorm,
    Chain,
    DiagonalScale,
    FactorOut,
    Flow,
    InvertibleConv,
    Squeezed,
    squeeze,
    unsqueeze,
)

SHAPE = (2, 4, 4)
COND = (3, 1, 1)
CONV = CouplingNetworkConfig("conv", width=8, positions=True)
MLP = CouplingNetworkConfig("mlp", width=8, hidden=2)


def images(count: int = 3, shape: tuple[int, int, int] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return noise(count, shape, dtype)


def _inner() -> list[Flow]:
    half = (4, 2, 2)
    return [ActNorm(8), ChannelCoupling((8, 2, 2), 0, "affine", CONV, COND), FactorOut(ActNorm(half[0]), 8)]


LAYERS: dict[str, Callable[[], Flow]] = {
    "actnorm": lambda: ActNorm(2),
    "conv1x1": lambda: InvertibleConv(2),
    "conv1x1 of 4": lambda: Squeezed(InvertibleConv(8), SHAPE),
    "diagonal": lambda: DiagonalScale(SHAPE),
    "checkerboard 0": lambda: CheckerboardCoupling(SHAPE, 0, "affine", CONV, COND),
    "checkerboard 1": lambda: CheckerboardCoupling(SHAPE, 1, "affine", MLP, COND),
    "checkerboard additive": lambda: CheckerboardCoupling(SHAPE, 0, "additive", MLP, COND),
    "channel 0": lambda: ChannelCoupling(SHAPE, 0, "affine", MLP, COND),
    "channel 1": lambda: ChannelCoupling(SHAPE, 1, "affine", CONV, COND),
    "channel additive": lambda: ChannelCoupling(SHAPE, 1, "additive", CONV, COND),
    "factor out": lambda: FactorOut(DiagonalScale((1, 4, 4)), 2),
    "squeezed": lambda: Squeezed(Chain(_inner()), SHAPE),
}


def _layer(name: str) -> Flow:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    randomise(layer)
    return layer.double().eval().requires_grad_(False)


def _cond(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return images(count, COND, dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_a_bijection_with_the_jacobians_determinant(name: str) -> None:
    layer, x = _layer(name), images()
    assert_bijection(layer, layer.inverse, x, _cond(3))
    torch.testing.assert_close(layer(layer.inverse(x, _cond(3)), _cond(3))[0], x, rtol=0, atol=1e-9)
    layer.float()
    assert_undone_in_float32(layer, layer.inverse, x, _cond(3))


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith(("checker", "channel", "diagonal"))])
def test_a_new_layer_is_the_identity(name: str) -> None:
    y, log_det = LAYERS[name]()(images(dtype=torch.float32), _cond(3, torch.float32))
    torch.testing.assert_close(y, images(dtype=torch.float32))
    assert not log_det.any()


# ---- couplings ----


@pytest.mark.parametrize("kind", [CheckerboardCoupling, ChannelCoupling])
@pytest.mark.parametrize("network", [CONV, MLP], ids=["conv", "mlp"])
def test_two_couplings_change_both_halves_and_each_fixes_one(kind: type, network: CouplingNetworkConfig) -> None:
    x = images()
    moved = []
    for parity in (0, 1):
        layer = kind(SHAPE, parity, "affine", network)
        randomise(layer)
        moved.append(layer.double()(x)[0] != x)
    assert (moved[0] ^ moved[1]).all(), "what one keeps the other moves"
    assert moved[0].sum() == moved[1].sum()
    assert (moved[0] == moved[0][:1]).all(), "the same places in every image"
    if kind is ChannelCoupling:
        assert moved[0][0, 1].all(), "parity 0 keeps the first half"


@pytest.mark.parametrize("name", ["checkerboard 0", "channel 1"])
def test_the_network_depends_on_the_fixed_half_alone(name: str) -> None:
    """The moved places' Jacobian is diagonal among themselves, and all fixed ones act on some."""
    layer, x = _layer(name), images(1)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None], _cond(1))[0][0], x[0]).reshape(32, 32)  # pyright: ignore
    moved = (layer(x, _cond(1))[0] != x).flatten()
    among = jacobian[moved][:, moved]
    assert torch.equal(among, among.diagonal().diag())
    assert torch.equal(jacobian[~moved], torch.eye(32, dtype=torch.float64)[~moved])
    assert jacobian[moved][:, ~moved].abs().sum(0).min() > 1e-6


def test_checkerboards_alternate() -> None:
    mask = checkerboard(5, 4, 0)[0]
    assert (mask[1:] != mask[:-1]).all()
    assert (mask[:, 1:] != mask[:, :-1]).all()
    assert mask[0, 0] == 1
    assert torch.equal(checkerboard(5, 4, 1)[0], 1 - mask)
    assert torch.equal(checkerboard(5, 4, 2)[0], mask)


@pytest.mark.parametrize("kind", [CheckerboardCoupling, ChannelCoupling])
def test_scales_are_bounded_whatever_the_image(kind: type) -> None:
    layer: Coupling = kind(SHAPE, 0, "affine", CONV)
    randomise(layer, std=1)
    s, _ = layer.double().scale_shift(1e6 * images(), None)
    assert layer.bound is not None
    assert s.abs().max() <= layer.bound.abs().max()
    assert s.abs().max() > 0.99 * layer.bound.abs().min()
    assert CheckerboardCoupling(SHAPE, 0, "additive", CONV).bound is None


@pytest.mark.parametrize("network", [CONV, MLP], ids=["conv", "mlp"])
def test_conditions_change_the_output_and_may_not_be_forgotten(network: CouplingNetworkConfig) -> None:
    layer, x = CheckerboardCoupling(SHAPE, 0, "affine", network, COND), images(2)
    randomise(layer)
    a, b = (layer.double()(x, c * torch.ones(2, *COND, dtype=torch.float64))[0] for c in (0.0, 1.0))
    assert (a - b).abs().max() > 1e-3
    with pytest.raises(ValueError, match="pass labels"):
        layer(x)


def test_positions_tell_places_apart() -> None:
    """On a constant image a convolution is constant in the whole interior, unless it has positions."""
    x = torch.zeros(1, 1, 12, 12)
    for positions in (False, True):
        config = CouplingNetworkConfig("conv", 8, positions=positions)
        layer = CheckerboardCoupling((1, 12, 12), 0, "additive", config)
        randomise(layer)
        centre = layer(x)[0][0, 0, 4:8, 4:8]
        values = centre[checkerboard(4, 4, 1)[0].bool()]
        assert (values.std() > 1e-3) == positions


# ---- squeezing and factoring out ----


def test_squeezing_is_undone_and_halves_are_checkerboards() -> None:
    x = images(2, (3, 6, 4))
    assert squeeze(x).shape == (2, 12, 3, 2)
    assert torch.equal(unsqueeze(squeeze(x)), x)
    mask = checkerboard(6, 4, 0).expand(3, 6, 4)[None]
    first, second = squeeze(mask).chunk(2, dim=1)
    assert first.all()
    assert not second.any()


def test_factoring_out_leaves_the_second_half() -> None:
    layer, x = _layer("factor out"), images()
    y, log_det = layer(x)
    assert torch.equal(y[:, 1], x[:, 1])
    assert (y[:, 0] != x[:, 0]).all()
    torch.testing.assert_close(log_det, layer.inner.log_scale.sum().expand(3))  # pyright: ignore


def test_shapes_that_cannot_be_halved_raise() -> None:
    with pytest.raises(ValueError, match="5x4 cannot be squeezed"):
        Squeezed(ActNorm(4), (1, 5, 4))
    with pytest.raises(ValueError, match="4x3 cannot be squeezed"):
        Squeezed(ActNorm(4), (1, 4, 3))
    with pytest.raises(ValueError, match="3 channels cannot be factored out"):
        FactorOut(ActNorm(1), 3)
    with pytest.raises(ValueError, match="3 channels cannot be split"):
        ChannelCoupling((3, 4, 4), 0, "affine", CONV)
    with pytest.raises(ValueError, match="width 0"):
        CouplingNetworkConfig(width=0)


# ---- start ----


def test_actnorm_starts_with_zero_mean_and_unit_variance_once() -> None:
    layer, x = ActNorm(2), 5 * images(50) + torch.tensor([3.0, -7.0], dtype=torch.float64).view(1, 2, 1, 1)
    y = layer.double().initialise(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(2, dtype=torch.float64))
    again = layer.initialise(x + 100)
    torch.testing.assert_close(again, layer(x + 100)[0])
    assert again.mean() > 10, "not initialised again"


def test_a_chain_initialises_each_layer_with_what_arrives_there() -> None:
    x = 5 * images(50) + 3
    torch.manual_seed(0)
    inner = Chain(
        [ActNorm(8), InvertibleConv(8), FactorOut(Chain([InvertibleConv(4), DiagonalScale((4, 2, 2)), ActNorm(4)]), 8)]
    )
    chain = Chain([ActNorm(2), Squeezed(inner, SHAPE)]).double()
    inner.flows[2].inner.flows[1].log_scale.data.fill_(1)  # pyright: ignore
    y = squeeze(chain.initialise(x))
    torch.testing.assert_close(y, squeeze(chain(x)[0]))
    fixed = y[:, :4]
    torch.testing.assert_close(fixed.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(fixed.var((0, 2, 3), correction=0), torch.ones(4, dtype=torch.float64))


def test_a_resumed_actnorm_does_not_start_again() -> None:
    layer = ActNorm(2)
    layer.initialise(images(50, dtype=torch.float32) * 3)
    other = ActNorm(2)
    other.load_state_dict(layer.state_dict())
    other.initialise(torch.full((4, 2, 4, 4), 100.0) + images(4, dtype=torch.float32))
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_actnorm_that_has_seen_no_data_is_an_error_outside_training() -> None:
    layer, x = ActNorm(2), images(dtype=torch.float32)
    layer(x)  # in training fit() has called start
    layer.eval()
    for use in (layer, layer.inverse):
        with pytest.raises(ValueError, match="call start"):
            use(x)


def test_a_channel_that_never_varies_stays_finite() -> None:
    y = ActNorm(2).initialise(torch.full((4, 2, 4, 4), 3.0))
    assert torch.equal(y, torch.zeros_like(y))


def test_the_convolution_starts_as_a_rotation() -> None:
    torch.manual_seed(3)
    layer, x = InvertibleConv(6), images(4, (6, 2, 2), torch.float32)
    y, log_det = layer(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    assert (y - x).abs().max() > 0.1
    torch.testing.assert_close(log_det, torch.zeros(4), rtol=0, atol=1e-5)
