"""Mean and standard deviation of a tokenizer's raw latents over many images, batch by batch, without keeping them.

Of n numbers with mean m and sum of squared deviations s, and n', m', s' more (Chan et al. 1983, equations 2.1 a and b):

    N = n + n'      M = m + (m' - m) n' / N      S = s + s' + (m' - m)^2 n n' / N      std = sqrt(S / (N - 1))

in float64 per channel. Unlike sums of squares they lose nothing where the mean is far from 0.
"""

import torch
from torch import Tensor

from midway.gen.data.images import to_float
from midway.tokenizers.tokenizer import ImageTokenizer


@torch.no_grad()
def latent_statistics(
    tokenizer: ImageTokenizer, images: Tensor, batch_size: int = 512, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) -> mean and std (D,) float32 on the CPU, as `gen.latents.encode` gives them.

    With `flip` over the left-right mirrored images too. The tokenizer is in eval mode afterwards.
    """
    tokenizer.eval()
    dim = tokenizer.latent_shape[0]
    count, mean, deviations = 0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    for part in images.split(batch_size):
        for seen in (part, part.flip(-1)) if flip else (part,):
            raw = tokenizer.raw_latents(to_float(seen.to(tokenizer.device))).cpu().double().transpose(0, 1).flatten(1)
            new, share = raw.mean(1), raw.shape[1] / (count + raw.shape[1])
            deviations += (raw - new[:, None]).square().sum(1) + (new - mean).square() * count * share
            mean += (new - mean) * share
            count += raw.shape[1]
    return mean.float(), (deviations / (count - 1)).sqrt().float()
