"""Our DiT beside diffusers' DiTTransformer2DModel of the same size and weights: a training step, and sampling.

Both networks compute the same function of the same weights (the outputs and the gradients are compared before anything is timed),
in one process, in turns, on one thread. Times are process time, so that a machine that does other work slows both sides and not
one: `ours` and `peer` are medians over the turns, the ratio is the median of the ratios of neighbouring turns, with quartiles.

training    forward, mean squared error, backward, fused AdamW, for given states, times and labels
sampling    ddim in STEPS steps: our sample() beside the shortest loop over the peer's network (two numbers a step, no scheduler)

The peer has more parameters: each of its blocks embeds time and class by weights of its own, which are equal in published
models, and computes them in every block and step. Its dropout of labels, drawn in each block again, is off, in its favour.

    python benchmarks/dit_speed.py
    python benchmarks/dit_speed.py --only digits --seconds 5 --out digits.json
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.diffusion.inputs import noise_angle
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit import DiT
from midway.gen.networks.dit_config import DiTConfig
from midway.samplers.grids import uniform
from midway.samplers.sample import sample
from midway.samplers.solvers import SOLVERS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Measured, Result, conclude, device_seconds, printed, process_seconds

Step = Callable[[], Tensor]
"""Does the work once and returns what came out."""
STEPS = 4
CLASSES = 10
PEER = "diffusers"
TARGETS = {"training": 1.0, "sampling": 1.1}
RESULT = Path(__file__).parent / "results" / "dit_speed.json"


@dataclass(frozen=True)
class Size:
    """A network on latents (channels, side, side), and the batch of its rows."""

    name: str
    width: int
    depth: int
    heads: int
    patch: int
    channels: int
    side: int
    batch: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.side, self.side


SIZES = (
    Size("digits, 16 tokens", 128, 4, 4, 1, 4, 4, 32),
    Size("S/2, 64 tokens", 384, 12, 6, 2, 4, 16, 8),
    Size("S/2, 256 tokens", 384, 12, 6, 2, 4, 32, 8),
)


@dataclass(frozen=True)
class Way:
    """How both networks compute."""

    precision: str = "float32"
    compiled: bool = False

    @property
    def name(self) -> str:
        return ", ".join([self.precision, *(["compiled"] if self.compiled else [])])


WAYS = (Way(), Way("bf16"), Way(compiled=True))


# ---- both networks ----


def our_model(size: Size) -> LatentModel:
    """With the peer's blocks; weights that are 0 at the start are drawn, or nothing would reach the output."""
    dit = DiTConfig(size.width, size.depth, size.heads, size.patch, qk_norm=False)
    model = LatentModel(LatentModelConfig(schedule="cosine", target="v", dit=dit), size.shape, CLASSES)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def peer_network(ours: DiT, size: Size) -> nn.Module:
    """diffusers' network with our weights, positions and time frequencies."""
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=size.channels,
        num_layers=size.depth,
        sample_size=size.side,
        patch_size=size.patch,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    with torch.no_grad():
        net.pos_embed.pos_embed.copy_(ours.positions[None])  # pyright: ignore
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # pyright: ignore
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # pyright: ignore
    net.load_state_dict(peer_weights(ours, size), strict=False)
    return net


def peer_weights(ours: DiT, size: Size) -> dict[str, Tensor]:
    """Our weights by the peer's names."""
    cells = (size.channels, size.patch, size.patch)
    last_first = torch.arange(size.channels * size.patch**2).view(cells).permute(1, 2, 0).flatten()
    found = {
        "pos_embed.proj.weight": ours.embed.weight.unflatten(1, cells),
        "pos_embed.proj.bias": ours.embed.bias,
        **layers(("proj_out_1", ours.modulation)),
        "proj_out_2.weight": ours.head.weight[last_first],
        "proj_out_2.bias": ours.head.bias[last_first],
    }
    for i, block in enumerate(ours.blocks):
        found |= {f"transformer_blocks.{i}.{name}": value for name, value in block_weights(ours, block).items()}
    return found


def block_weights(ours: DiT, block: Any) -> dict[str, Tensor]:
    """Those of one block, in which the peer embeds time and class again."""
    qkv = block.attention.qkv
    found = layers(
        ("norm1.emb.timestep_embedder.linear_1", ours.time[0]),
        ("norm1.emb.timestep_embedder.linear_2", ours.time[2]),
        ("norm1.linear", block.modulation),
        ("attn1.to_out.0", block.attention.out),
        ("ff.net.0.proj", block.mlp[0]),
        ("ff.net.2", block.mlp[2]),
    )
    for letter, weight, bias in zip("qkv", qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
        found |= {f"attn1.to_{letter}.weight": weight, f"attn1.to_{letter}.bias": bias}
    return found | {"norm1.emb.class_embedder.embedding_table.weight": ours.label.weight}


def layers(*named: tuple[str, Any]) -> dict[str, Tensor]:
    """Weight and bias of linear layers."""
    return {f"{name}.{part}": getattr(layer, part) for name, layer in named for part in ("weight", "bias")}


# ---- what is timed ----


@dataclass(frozen=True, eq=False)
class Networks:
    """Both of one size on one device, with states, times of network and labels (B, ...)."""

    size: Size
    model: LatentModel
    peer: nn.Module
    x: Tensor
    target: Tensor
    angle: Tensor
    labels: Tensor

    def ours(self, x: Tensor, angle: Tensor) -> Tensor:
        return self.model.network(x, angle, self.labels).value

    def theirs(self, x: Tensor, angle: Tensor) -> Tensor:
        return self.peer(x, 1000 * angle, self.labels, return_dict=False)[0]


def networks_of(size: Size, device: torch.device, compiled: bool = False) -> Networks:
    """With the same random weights, compiled or not."""
    torch.manual_seed(0)
    model = our_model(size)
    assert isinstance(model.network, DiT)
    peer = peer_network(model.network, size)
    x, target = torch.randn(2, size.batch, *size.shape)
    angle, labels = 0.05 + 0.9 * torch.rand(size.batch), torch.randint(0, CLASSES, (size.batch,))
    if compiled:
        model.network.compile()
        peer.compile()
    nn.Module.to(peer, device)
    inputs = (each.to(device) for each in (x, target, angle, labels))
    return Networks(size, model.to(device), peer, *inputs)


def training_step(predict: Callable[[Tensor, Tensor], Tensor], both: Networks, net: nn.Module, bf16: bool) -> Step:
    """One optimizer step; returns what the network predicted before it."""
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        with torch.autocast(both.x.device.type, torch.bfloat16, enabled=bf16):
            found = predict(both.x, both.angle)
        F.mse_loss(found.float(), both.target).backward()
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    return step


def sampling_steps(both: Networks, bf16: bool) -> tuple[Step, Step]:
    """Trajectories of ddim; both return where they end."""
    model = both.model.eval()
    table = SOLVERS["ddim"].build(model.schedule, uniform(model.schedule, STEPS))
    peer = peer_loop(both, table.grid)

    def under(work: Step) -> Step:
        def step() -> Tensor:
            with torch.no_grad(), torch.autocast(both.x.device.type, torch.bfloat16, enabled=bf16):
                return work()

        return step

    return under(lambda: sample(model.field(both.labels), table, both.x)), under(peer)


def peer_loop(both: Networks, grid: Sequence[float]) -> Step:
    """The same on the peer: x <- a x + b v, with times and numbers that are ready."""
    t = torch.tensor(grid, dtype=torch.float64)
    alpha, sigma = both.model.schedule.alpha(t), both.model.schedule.sigma(t)
    a = (alpha[1:] * alpha[:-1] + sigma[1:] * sigma[:-1]).tolist()
    b = (sigma[1:] * alpha[:-1] - alpha[1:] * sigma[:-1]).tolist()
    angles = noise_angle(alpha, sigma).float().to(both.x.device)[:-1, None].expand(-1, len(both.x))
    both.peer.eval()

    def loop() -> Tensor:
        x = both.x
        for keep, add, angle in zip(a, b, angles, strict=True):
            x = keep * x + add * both.theirs(x, angle)
        return x

    return loop


def steps_of(kind: str, both: Networks, bf16: bool) -> tuple[Step, Step]:
    """Ours and the peer's."""
    if kind == "sampling":
        return sampling_steps(both, bf16)
    ours = training_step(both.ours, both, both.model.network, bf16)
    return ours, training_step(both.theirs, both, both.peer, bf16)


# ---- measuring ----


@dataclass(frozen=True)
class Row(Measured):
    """A line, with what both networks hold."""

    size: str = ""
    batch: int = 0
    tokens: int = 0
    parameters: int = 0
    peer_parameters: int = 0


def take_turns(
    ours: Step, peer: Step, seconds: float, least: int, clock: Callable[[Step], float]
) -> list[tuple[float, float]]:
    """Seconds of both sides in turns until they sum up to `seconds`, the first of each untimed; `least` pairs or more."""
    for step in (ours, peer):
        step()
    pairs = list[tuple[float, float]]()
    while len(pairs) < least or (sum(map(sum, pairs)) < seconds and len(pairs) < 300):
        pairs.append((clock(ours), clock(peer)))
    return pairs


def measured(kind: str, way: Way, size: Size, device: torch.device, seconds: float, least: int) -> Row:
    """A row. ValueError unless both sides do the same."""
    both = networks_of(size, device, way.compiled)
    ours, peer = steps_of(kind, both, way.precision == "bf16")
    found = difference(ours(), peer())
    if not found < (1e-3 if way.precision == "float32" else 0.1):
        raise ValueError(f"{kind}, {size.name}: the sides differ by {found:g}, relative")
    clock = device_seconds if device.type == "cuda" else process_seconds
    pairs = take_turns(ours, peer, seconds, least, clock)
    return row_of(kind, way, both, pairs, found)


def difference(ours: Tensor, peer: Tensor) -> float:
    """|ours - peer| / |peer|."""
    return ((ours.double() - peer.double()).norm() / peer.double().norm()).item()


def row_of(kind: str, way: Way, both: Networks, pairs: list[tuple[float, float]], found: float) -> Row:
    """Medians in ms, and the median of the ratios of turns, with quartiles."""
    ours, peer = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    low, ratio, high = statistics.quantiles([b / a for a, b in pairs], n=4, method="inclusive")
    least, size = TARGETS[kind], both.size
    counts = (sum(p.numel() for p in net.parameters()) for net in (both.model.network, both.peer))
    return Row(
        f"{kind}, {size.name}, batch {size.batch}, {way.name}",
        "ms",
        round(ours, 3),
        PEER,
        round(peer, 3),
        round(ratio, 3),
        f"peer / ours >= {least:g}",
        ratio >= least,
        None,
        None,
        {"output, relative": found},
        (round(low, 3), round(high, 3)),
        len(pairs),
        size.name,
        size.batch,
        (size.side // size.patch) ** 2,
        *counts,
    )


def makers(device: torch.device, seconds: float, least: int, only: str) -> list[Callable[[], Iterator[Result]]]:
    """All rows; without a GPU the largest size in float32 alone, and one compiled."""

    def make(kind: str, way: Way, size: Size) -> Iterator[Result]:
        yield measured(kind, way, size, device, seconds, least)
        torch.compiler.reset()

    return [
        partial(make, kind, way, size)
        for way in WAYS
        for size in SIZES[: len(SIZES) if device.type == "cuda" or way == Way() else 1 if way.compiled else 2]
        for kind in TARGETS
        if only in f"{kind}, {size.name}, {way.name}"
    ]


def main() -> int:
    """Print the table, write the JSON; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--seconds", type=float, default=15.0, help="measured time of a row, at least")
    parser.add_argument("--turns", type=int, default=7, help="pairs of a row, at least")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    made = makers(device, arguments.seconds, arguments.turns, arguments.only)
    if not made:
        parser.error(f"no row's name contains '{arguments.only}'")
    begun = os.getloadavg()
    rows = printed(made, 64)
    return conclude(rows, arguments.out, device.type, threads=1, load=begun)


if __name__ == "__main__":
    sys.exit(main())
