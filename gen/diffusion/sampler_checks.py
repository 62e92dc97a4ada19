"""What a sampler cannot be asked of a model, before the first sample is drawn: UsageError with what is possible instead."""

import torch

from midway.gen.core.errors import UsageError, raising
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.model import EVERYWHERE, Guidance
from midway.samplers.guidance_checks import check_interval, check_scale
from midway.samplers.jumps import JUMPS


def check_guidance(guidance: Guidance, weak: TrainedModel | None, trained: TrainedModel | None) -> None:
    """UsageError where there is nothing to guide. trained: None for a model without a missing class or a guide."""
    if guidance.scale == 1:
        return
    if trained is None:
        raise UsageError(
            "guidance with --diffusers", "these models have no missing class", "drop --guidance and --guide"
        )
    what, fix = f"--guidance {guidance.scale}", "drop --guidance"
    if weak is not None:
        what = f"--guide {weak.run.path} cannot guide this model"
        fix = "give a smaller or less trained model of the same recipe and tokenizer"
    with raising(UsageError, what, fix):
        trained.model.check_guidance(guidance)
        if weak is not None:
            _check_origin(trained, weak)


def check_flags(scale: float, interval: tuple[float, float], by_model: bool, rho: tuple[float, float]) -> None:
    """UsageError for a scale or an interval that guides nothing, whatever the model; rho: the greatest and the least sampled."""
    low, high = interval
    if scale == 1 and (by_model or interval != EVERYWHERE):
        raise UsageError(
            "--guide or --guidance-interval without --guidance",
            "at scale 1 nothing is guided",
            "give --guidance, say 2",
        )
    with raising(UsageError, f"--guidance {scale}", "give --guidance, say 2"):
        check_scale(scale)
    with raising(UsageError, f"--guidance-interval {low} {high}", "give two noise levels sigma / alpha, say 0.3 5"):
        check_interval(low, high)
    if low >= rho[0] or high < rho[1]:
        raise UsageError(
            f"--guidance-interval {low} {high}",
            f"sampling passes noise levels sigma / alpha from {rho[0]:g} to {rho[1]:g}, none of them inside",
            "give an interval that holds some, say 0.3 5",
        )


def check_jump(trained: TrainedModel, solver: str, eta: float, analytic_first: bool, fitted: bool, nfe: int) -> None:
    """UsageError for a model of average velocities with a solver at one time, or the other way round, and for their flags."""
    config, place = trained.model.config, trained.run.place
    if not config.is_jump:
        raise UsageError(
            f"{solver} on {place}",
            "it jumps by average velocities, and this model predicts at one time (an old checkpoint has no second time)",
            f"use euler, or train one that jumps: midway train latent RECIPE --model.objective shortcut --init {place}",
        )
    if solver not in JUMPS:
        raise UsageError(
            f"{solver} on {place}",
            f"it needs the velocity at one time, and this model ({config.objective}) predicts average velocities of jumps",
            f"use one of {', '.join(JUMPS)}: any number of jumps, 1, 2, 4 or 8; in Python, model.field(labels).velocity",
        )
    if solver == "jump" and nfe > 1 and config.jump.ends == "data":
        raise UsageError(
            f"jump at NFE {nfe} on {place}",
            "this model was trained to jump to the data alone (--model.jump.ends data)",
            "use consistency, or --nfe 1",
        )
    for flag, given in (("--eta", eta), ("--analytic-first", analytic_first), ("--grids gits", fitted)):
        if given:
            raise UsageError(f"{flag} with {solver}", "it is for solvers at one time", f"drop {flag}")


def _check_origin(trained: TrainedModel, weak: TrainedModel) -> None:
    """ValueError for a guide of the same weights, or of other latents."""
    ours, theirs = trained.model.state_dict(), weak.model.state_dict()
    if all(name in theirs and torch.equal(value, theirs[name]) for name, value in ours.items()):
        raise ValueError("its weights are those of the model itself")
    if weak.decoder_hash != trained.decoder_hash:
        raise ValueError("its latents are of another tokenizer, or standardised by others' statistics")
