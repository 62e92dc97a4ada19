"""SimVQ: one learned linear map moves all codes (Zhu et al. 2024, arXiv 2411.02038).

    e_k = W c_k + b,   c_k ~ N(0, I / D), frozen         k, losses and gradients as of a codebook that learns by gradient

Every vector's gradient reaches W, hence every code, chosen or not: nothing dies, nothing restarts. Tokens are decoded by e_k.
(The published code decodes them by c_k: its round trip through indices is another image.)
"""

import torch
from torch import Tensor, nn

from midway.tokenizers.codebook import Codebook, Gradient
from midway.tokenizers.principal import put, shared


class SimVQ(Codebook):
    """`codebook_size` codes of `dim` channels: `weight` (D, D) and `bias` (D,) map the frozen buffer `base` (K, D).

    All three are functions of `seed`; weight and bias begin as in torch's linear layers, uniform in +-1 / sqrt(D). It starts
    without data and draws nothing. For `normalize`, `gradient`, `entropy_weight` and `entropy_temperature` see codebook.py.
    """

    learns_by_gradient = True
    base: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment: float = 0.25,
        seed: int = 0,
        normalize: bool = False,
        gradient: Gradient = "straight_through",
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__(codebook_size, dim, commitment, normalize, gradient, entropy_weight, entropy_temperature)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(codebook_size, dim, generator=generator, dtype=torch.float32) / dim**0.5
        self.register_buffer("base", base)
        self.weight, self.bias = (
            nn.Parameter(torch.empty(shape, dtype=torch.float32)) for shape in ((dim, dim), (dim,))
        )
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(dim**-0.5), dim**-0.5, generator=generator)

    @torch.no_grad()
    def cover(self, z: Tensor) -> None:
        """Give the codes mean and covariance of z (B, D, *S): b = mean, W = sqrt(D) covariance^(1/2)."""
        rows = z.movedim(1, -1).flatten(0, -2).double().cpu()
        values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0).view(self.dim, self.dim))
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        put(self, *shared(root * self.dim**0.5, rows.mean(0), to=z))

    def raw_codebook(self) -> Tensor:
        # float64, because in float32 the last bits depend on where in memory the weights lie: codes would not survive saving.
        return nn.functional.linear(self.base.double(), self.weight.double(), self.bias.double()).float()
