"""Configurations of coupling flows, and the layers built from them.

A scale (Dinh et al. 2016, RealNVP, arXiv 1605.08803, figure 4; Kingma & Dhariwal 2018, Glow, arXiv 1807.03039, figure 2b) is

    [ActNorm, checkerboard coupling] ..., squeeze, [ActNorm, 1x1 convolution, channel coupling] ..., factor out half, next scale

and before factoring out one more coupling moves the half that leaves given the half that stays (Glow's learned prior).
NICE (Dinh et al. 2014, arXiv 1410.8516) has no squeeze: checkerboard couplings, then a scale for every pixel.
"""

from dataclasses import dataclass, field
from typing import Literal

from midway.gen.baselines.couplings import ChannelCoupling, CheckerboardCoupling, CouplingNetworkConfig, Transform
from midway.gen.baselines.density import check_margin
from midway.gen.baselines.flow_layers import (
    ActNorm,
    Chain,
    DiagonalScale,
    FactorOut,
    Flow,
    InvertibleConv,
    Shape,
    Squeezed,
    squeezed_shape,
)
from midway.gen.core.ranges import BATCH, LAYERS, WIDTH, check_ranges


@dataclass(frozen=True)
class FlowConfig:
    """Layers, entry, dequantisation and prior of a coupling flow; see `nice`, `realnvp` and `glow`."""

    transform: Transform = "affine"
    """What a coupling does to one half: additive shifts it, affine scales it too."""
    scales: int = 1
    """How often images are squeezed; from the second time on, half of the channels are factored out first."""
    checkerboards: int = 0
    """Checkerboard couplings before each squeeze, and after the last one."""
    steps: int = 8
    """Channel couplings after each squeeze."""
    actnorm: bool = True
    """An ActNorm before each coupling."""
    mixing: Literal["conv1x1", "alternate"] = "conv1x1"
    """How channels change sides between couplings: by a learned matrix, or alternating."""
    diagonal_scale: bool = False
    """A scale for every pixel at the end, as in NICE."""
    network: CouplingNetworkConfig = field(default_factory=CouplingNetworkConfig)
    prior: Literal["normal", "logistic"] = "normal"
    """Density of the latents."""
    entry: Literal["logit", "symmetric", "unit"] = "logit"
    """Map from pixels to the input of the couplings."""
    logit_margin: float = 0.05
    """a of the logit entry."""
    dequantise: Literal["uniform", "variational"] = "uniform"
    """Noise that makes levels continuous: uniform in a bin, or learned (variational)."""
    dequantise_couplings: int = 4
    """variational: checkerboard couplings of q(u | k)."""
    draws: int = 1
    """Draws of u averaged inside the logarithm in log_likelihood; more give a tighter bound."""
    class_width: int = 32
    """Conditional models: width of the class embedding."""

    def __post_init__(self) -> None:
        counts = {"scales": 0, "checkerboards": 0, "steps": 0, "dequantise_couplings": 1, "draws": 1, "class_width": 1}
        for name, least in counts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give {least} or more")
        check_margin(self.logit_margin)
        if self.checkerboards + self.scales * self.steps < 2:
            raise ValueError(
                f"checkerboards={self.checkerboards}, scales={self.scales}, steps={self.steps}: one coupling or none "
                "leaves pixels unmoved; use at least two"
            )
        deep = (0, LAYERS[1])
        check_ranges(self, scales=deep, checkerboards=deep, steps=deep, dequantise_couplings=deep)
        check_ranges(self, draws=BATCH, class_width=WIDTH)


def nice(width: int = 256, couplings: int = 6, hidden: int = 1) -> FlowConfig:
    """Additive couplings with fully connected networks and one diagonal scale (NICE, section 5.1, with checkerboard halves)."""
    return FlowConfig(
        transform="additive",
        scales=0,
        checkerboards=couplings,
        actnorm=False,
        diagonal_scale=True,
        network=CouplingNetworkConfig("mlp", width, hidden),
    )


def realnvp(width: int = 64, scales: int = 1) -> FlowConfig:
    """Three checkerboard and three channel couplings a scale (RealNVP, section 3.6), with ActNorm for batch normalisation.

    For 32x32: scales=2.
    """
    network = CouplingNetworkConfig("conv", width, positions=True)
    return FlowConfig(scales=scales, checkerboards=3, steps=3, mixing="alternate", network=network)


def glow(width: int = 64, scales: int = 1, steps: int = 12) -> FlowConfig:
    """ActNorm, 1x1 convolution, channel coupling, `steps` times a scale (Glow, figure 2). For 32x32: scales=3, steps=32."""
    return FlowConfig(scales=scales, steps=steps, network=CouplingNetworkConfig("conv", width, positions=True))


# ---- the layers of a configuration ----


def build_flow(config: FlowConfig, shape: Shape, cond: Shape | None = None) -> Flow:
    """The flow of images (C, H, W). ValueError when sides are odd where they are to be squeezed."""
    last = [DiagonalScale(shape)] if config.diagonal_scale else []
    return Chain([_scale(config, shape, cond, 0), *last])


def _scale(config: FlowConfig, shape: Shape, cond: Shape | None, level: int) -> Chain:
    """Scale `level` and, inside it, those that follow."""
    flows: list[Flow] = []
    for i in range(config.checkerboards if shape[1] * shape[2] > 1 else 0):  # one pixel cannot be split
        flows += _normalise(config, shape)
        flows.append(CheckerboardCoupling(shape, i, config.transform, config.network, cond))
    if level < config.scales:
        flows.append(Squeezed(_steps(config, squeezed_shape(shape), cond, level), shape))
    return Chain(flows)


def _steps(config: FlowConfig, shape: Shape, cond: Shape | None, level: int) -> Flow:
    """The layers between squeezing and its inverse."""
    channels, height, width = shape
    flows: list[Flow] = []
    for i in range(config.steps):
        flows += _normalise(config, shape)
        if config.mixing == "conv1x1":
            flows.append(InvertibleConv(channels))
        parity = i if config.mixing == "alternate" else 0
        flows.append(ChannelCoupling(shape, parity, config.transform, config.network, cond))
    inner = _scale(config, (channels // 2, height, width), cond, level + 1)
    if len(inner.flows):
        flows.append(ChannelCoupling(shape, 0, config.transform, config.network, cond))
        flows.append(FactorOut(inner, channels))
    return Chain(flows)


def _normalise(config: FlowConfig, shape: Shape) -> list[Flow]:
    return [ActNorm(shape[0])] if config.actnorm else []
