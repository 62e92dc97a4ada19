"""Optimizers, gradient clipping, activation checkpointing and compilation.

AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), fused where torch can. Muon (Jordan et al. 2024) orthogonalises the momentum
of a matrix; only hidden matrices get it, with updates scaled to AdamW's root mean square ("match_rms_adamw": Liu et al. 2025,
arXiv 2502.16982), so that one learning rate serves both.
"""

from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from midway.gen.core.errors import UsageError
from midway.gen.training.config import TrainConfig
from midway.gen.training.interface import Adversarial, Rated

FUSED = ("cpu", "cuda", "xpu", "mps")
MUON_POWER = 0.5
"""Updates of one root mean square are, of Muon, whose singular values are equal, by the root of the width larger as matrices; of
AdamW, whose updates of one layer agree, by the width."""
STATES: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}
"""What an optimizer keeps of a parameter that has had a gradient: all but `step`, a number, in its shape and type."""


def make_optimizers(model: nn.Module, config: TrainConfig, device: torch.device) -> list[Optimizer]:
    """One or two optimizers in which every trainable parameter is exactly once. UsageError for muon without matrices."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [name for name in named if is_hidden_matrix(name, named[name])] if config.optimizer == "muon" else []
    if config.optimizer == "muon" and not hidden:
        raise UsageError(
            "--optimizer muon has nothing to do", "this model has no hidden matrices", "use --optimizer adamw"
        )
    adamw = torch.optim.AdamW(
        rate_groups(model, {name: p for name, p in named.items() if name not in hidden}, config.weight_decay),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=device.type in FUSED,
    )
    if not hidden:
        return [adamw]
    matrices = rate_groups(model, {name: named[name] for name in hidden}, config.weight_decay, MUON_POWER)
    muon = torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def state_bytes(model: nn.Module, config: TrainConfig) -> int:
    """Bytes that training keeps of a model in float32: weights, gradients, states of the optimizer, and averages."""
    averages, saved = bool(config.ema) + len(config.posthoc), model.state_dict().keys()
    total = sum(b.nbytes for b in model.buffers()) * (1 + averages)
    for name, p in model.named_parameters():
        muon = config.optimizer == "muon" and is_hidden_matrix(name, p)
        states = 1 + (1 if muon else 2) if p.requires_grad else 0  # the gradient, and one or two moments
        total += p.numel() * p.element_size() * (1 + states + averages * (name in saved))
    return total


def parameter_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """Trainable parameters: all of them, or those of an `Adversarial` model and then its discriminator's."""
    return _split(model, {name: p for name, p in model.named_parameters() if p.requires_grad})


def _split(model: nn.Module, named: dict[str, nn.Parameter]) -> list[list[nn.Parameter]]:
    if not isinstance(model, Adversarial) or not model.discriminator_prefix:
        return [list(named.values())]
    theirs = [p for name, p in named.items() if name.startswith(model.discriminator_prefix)]
    return [[p for name, p in named.items() if not name.startswith(model.discriminator_prefix)], theirs]


def rate_groups(
    model: nn.Module, named: dict[str, nn.Parameter], weight_decay: float, power: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer; `scale` is what `set_rate` multiplies the learning rate by.

    Of a `Rated` model it is the factor of the parameter to this power, and weights decay by the learning rate times
    `weight_decay` a step whatever it is.
    """
    if isinstance(model, Rated):
        scales = {name: model.rate_of(name) ** power for name in named}
        return [
            {
                "params": [p for name, p in named.items() if scales[name] == scale],
                "scale": scale,
                "weight_decay": weight_decay / scale,
            }
            for scale in dict.fromkeys(scales.values())
        ]
    own, *theirs = _split(model, named)
    return [
        {"params": own},
        *({"params": p, "scale": cast(Adversarial, model).discriminator_rate} for p in theirs if p),
    ]


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon optimises it: a matrix inside a block, but not its modulation or an adapter (embeddings and heads are
    outside)."""
    inside = parameter.dim() == 2 and ".blocks." in f".{name}"
    return inside and "modulation" not in name and ".lora_" not in name


def set_rate(optimizers: list[Optimizer], rate: float) -> None:
    """Give every parameter the learning rate of this step, times its group's `scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)


def is_on_host(tensor: Tensor) -> bool:
    """Whether the host need not wait for a device to read this."""
    return tensor.is_cpu


def clip(parameters: list[nn.Parameter], limit: float, accelerator: Accelerator) -> Tensor:
    """Limit the norm of these parameters' gradients; the norm before, 0-dim, 0 if there is no gradient yet."""
    if not any(isinstance(p, DTensor) for p in parameters):
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=accelerator.device)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not is_on_host(norm) or norm.item() > 0.999 * limit:  # a CPU need not multiply everything by 1
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm
    norm = accelerator.clip_grad_norm_(parameters, limit)  # pyright: ignore[reportArgumentType]
    return norm.full_tensor() if isinstance(norm, DTensor) else cast(Tensor, norm)


def step_if(step_ok: Tensor, optimizers: list[Optimizer]) -> None:
    """Step every optimizer if the 0-dim bool `step_ok` is true; fused ones decide on the device, without synchronisation."""
    for optimizer in optimizers:
        if optimizer.defaults.get("fused") and not is_on_host(step_ok):
            step_where(step_ok, optimizer)
        elif step_ok.item():
            optimizer.step()


def step_where(step_ok: Tensor, optimizer: Optimizer) -> None:
    """Step a fused optimizer if `step_ok` is true, without reading it on the host."""
    optimizer.found_inf = (~step_ok).float()  # the switch that gradient scalers use  # pyright: ignore
    optimizer.step()


def checkpoint_activations(model: nn.Module) -> None:
    """Have every network that can recompute its activations do so; UsageError when there is none."""
    able = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not able:
        raise UsageError(
            "--gradient-checkpointing has nothing to do", "this model has no blocks to compute again", "drop the flag"
        )
    for module in able:
        module.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]


def compile_networks(model: nn.Module) -> None:
    """torch.compile every network of `model` in place (names and state stay); UsageError when there is none."""
    networks = [module for module in model.modules() if getattr(module, "compilable", False)]
    if not networks:
        raise UsageError("--compile has nothing to do", "this model has no network of its own", "drop the flag")
    for network in networks:
        network.compile()
