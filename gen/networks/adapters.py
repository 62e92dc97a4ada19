"""Low-rank adapters: the weights of a network stay, and a product of two thin matrices is learned beside each of some.

    y = W x + b + alpha / r (B A x - B_0 A_0 x),        A (r, in), B (out, r)

LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3) starts with B = 0 and has no A_0, B_0. LoRA-GA (Wang et al. 2024, arXiv
2407.05000, Algorithm 1) starts along the gradient G = U S V^T of the loss by W, so that the first step of A and B is the best one
of its rank,

    A_0 = c V_1..r^T,   B_0 = c U_r+1..2r,   c = out^(1/4) / sqrt(gamma),   gamma = 16

and subtracts that product from W; here it is subtracted from the output, so that W stays. In both the first output is the
network's own, bit for bit. LoRA+ (Hayou et al. 2024, arXiv 2402.12354) is LoRA whose B learns faster than its A by a factor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.core.ranges import POSITIVE, WIDTH, check_ranges

GAMMA = 16.0
TARGETS = ("attention.qkv", "attention.out", "mlp.0", "mlp.2", "mlp.up", "mlp.down", "to_q", "to_k", "to_v", "to_out.0")
"""Ends of the names of the layers that get adapters: attention and MLP of transformers, attention of the U-Net."""


@dataclass(frozen=True)
class AdapterConfig:
    """Size and start of adapters."""

    rank: int = 8
    """Columns of B and rows of A."""
    alpha: float = 8.0
    """Factor of the product, divided by the rank."""
    start: Literal["zero", "gradient"] = "zero"
    """zero: B is 0 and A random (LoRA). gradient: singular vectors of the gradient of the first batch (LoRA-GA)."""
    b_rate: float = 1.0
    """Learning rate of B as a multiple of that of A (LoRA+)."""
    targets: tuple[str, ...] = TARGETS
    """Ends of the names of the layers that get adapters."""

    def __post_init__(self) -> None:
        check_ranges(self, rank=WIDTH, alpha=POSITIVE, b_rate=(1e-3, 1e6))


class Factors(NamedTuple):
    """What is added to a weight (out, in): scale B A, of A (r, in) and B (out, r)."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def product(self) -> Tensor:
        """(out, in)."""
        return self.scale * (self.b @ self.a)


class LowRank(nn.Module):
    """A linear layer, whose own weights do not train, and its adapter. ValueError for a rank that it has not."""

    def __init__(self, base: nn.Linear, config: AdapterConfig, name: str) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), config.alpha / config.rank
        self.rank, self.from_gradient = config.rank, config.start == "gradient"
        most = min(base.in_features, base.out_features) // (2 if self.from_gradient else 1)
        if self.rank > most:
            needs = "2 r singular vectors" if self.from_gradient else "r of them"
            shape = f"{base.out_features} x {base.in_features}"
            raise ValueError(f"rank {self.rank} of {name}, which is {shape}: at most {most}, since it takes {needs}")
        self.lora_A = nn.Linear(base.in_features, self.rank, bias=False)
        self.lora_B = nn.Linear(self.rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if self.from_gradient:
            self.register_buffer("start_A", torch.zeros_like(self.lora_A.weight))
            self.register_buffer("start_B", torch.zeros_like(self.lora_B.weight))
            self.start_A: Tensor
            self.start_B: Tensor

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # for matrices alone torch chooses one kernel, whether or not they train
        added = self.lora_B(self.lora_A(rows))
        if self.from_gradient:
            added = added - F.linear(F.linear(rows, self.start_A), self.start_B)
        return self.base(x) + self.scale * added.view(*x.shape[:-1], -1)

    @property
    def weight(self) -> Tensor:
        """The weight of a linear layer that computes the same."""
        return self.base.weight + self.factors(self.state_dict()).product

    def factors(self, state: Mapping[str, Tensor]) -> Factors:
        """What its state stands for: factors of rank r, or of 2 r where a start is subtracted."""
        a, b = state["lora_A.weight"], state["lora_B.weight"]
        if self.from_gradient:
            a, b = torch.cat([a, state["start_A"]]), torch.cat([b, -state["start_B"]], dim=1)
        return Factors(a, b, self.scale)

    @torch.no_grad()
    def start(self, gradient: Tensor) -> None:
        """Begin along the gradient (out, in) of the loss."""
        left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
        size = len(gradient) ** 0.25 / math.sqrt(GAMMA)
        for a in (self.lora_A.weight, self.start_A):
            a.copy_(size * right[: self.rank])
        for b in (self.lora_B.weight, self.start_B):
            b.copy_(size * left[:, self.rank : 2 * self.rank])


class LabelRows(nn.Module):
    """The label table of other classes: rows of one that is there, which stay, and new ones, which train from "no class" on."""

    def __init__(self, base: nn.Embedding, rows: Sequence[int | None]) -> None:
        """rows: for each class the row of `base` that it has, None for a new one; the last row, "no class", is the base's."""
        super().__init__()
        none = base.num_embeddings - 1
        known = torch.tensor([none if row is None else row for row in (*rows, none)])
        self.embedding_dim = base.embedding_dim
        self.rows = nn.Parameter(base.weight.detach()[known].clone(), requires_grad=False)
        places = torch.tensor([place for place, row in enumerate(rows) if row is None], dtype=torch.int64)
        self.register_buffer("places", places, persistent=False)
        self.places: Tensor
        self.new = nn.Parameter(self.rows.detach()[places].clone(), requires_grad=len(places) > 0)

    @property
    def weight(self) -> Tensor:
        """(classes + 1, W)."""
        return self.table(self.new)

    def table(self, new: Tensor) -> Tensor:
        """The same with other new rows."""
        return self.rows.index_copy(0, self.places, new.to(self.rows))

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.weight)


def adapt(network: nn.Module, config: AdapterConfig) -> None:
    """Put adapters around the linear layers of a network whose names end with a target, in place.

    ValueError where there is none, or a rank is too large; no layer is changed then.
    """
    ends = tuple(f".{target}" for target in config.targets)
    named = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and f".{n}".endswith(ends)}
    if not named:
        every = sorted({n.rpartition(".blocks.")[2] for n, m in network.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"no layer has a name that ends with {', '.join(config.targets)}: there are {', '.join(every)}"
        )
    made = {name: LowRank(layer, config, name) for name, layer in named.items()}
    for name, layer in made.items():
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, layer.to(layer.base.weight.device))


def layers_of(network: nn.Module) -> dict[str, LowRank]:
    """The layers with adapters by their names."""
    return {name: cast(LowRank, module) for name, module in network.named_modules() if isinstance(module, LowRank)}
