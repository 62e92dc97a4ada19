"""Under which title a page of flags has each flag, and in which order."""

from midway.gen.flags.fields import Flag

COMMON = (
    "model out tokenizer tokenizers source run data.data data solver solvers nfe grid grids n labels images diffusers guidance"
    " features train.steps train.batch_size train.lr train.max_seconds resume overwrite train.seed seed"
)
NAMED = {
    "Sampling": "guidance_interval guide analytic_first eta init strength invert parallel tolerance window rtol atol"
    " choice_seeds exact_nfe skip_unreachable",
    "Priors over codes": "priors prior_rules prior_nfe prior_decay temperature top_k top_p guidance_ramp choice_noise",
    "Measuring": "feature_weights metrics reference save_reference protocol root blocks repeats few_step few_step_nfe"
    " baselines",
    "External images": "images_resize images_channels export_npz save_images",
    "Tiles": "tile tile_margin",
    "Optimizer": "train.optimizer train.warmup train.decay train.plateau train.weight_decay train.betas train.clip"
    " train.accumulation train.ema train.posthoc train.posthoc_every train.patience",
    "Saving and stopping": "train.max_steps train.save_every train.save_seconds train.keep train.validate_every"
    " train.patience_validations license",
    "Logging": "train.log_every train.preview_every train.preview_seconds train.log_with train.measure_every",
    "Speed and precision": "train.precision train.gradient_checkpointing train.compile train.deterministic train.workers"
    " precision graph batch_size overlap",
}
"""Flags by their names in config.yaml; those that begin with a word of `GROUPS` need no entry."""
GROUPS = {
    "data.": "Data",
    "quantizer.": "Quantizer",
    "model.dit.": "Transformer",
    "model.": "Model",
    "loss.": "Losses",
    "reflow.": "Pairs of another model",
    "early.": "Online evaluation",
    "distill.": "AMED",
    "table.": "Learned table",
    "residual.": "Residual of a table",
    "noise.": "Solver with noise",
    "ode.": "Likelihood of latent models",
    "train.": "Optimizer",
}
ORDER = (
    "Common flags",
    "Sampling",
    "Priors over codes",
    "Measuring",
    "More flags",
    "Data",
    "External images",
    "Tiles",
    "Model",
    "Transformer",
)
ORDER += ("Quantizer", "Losses", "Optimizer", "Saving and stopping", "Logging", "Speed and precision")
"""Other titles follow in the order of their flags."""


def section_of(flag: Flag) -> tuple[tuple[int, int], str]:
    """Its place among the flags of a page, and the title above it."""
    if flag.positional:
        return (0, -1), "Arguments"
    common = COMMON.split()
    if flag.path in common:
        return (0, common.index(flag.path)), "Common flags"
    title = next((title for title, names in NAMED.items() if flag.path in names.split()), None)
    title = title or next((title for start, title in GROUPS.items() if flag.path.startswith(start)), "More flags")
    return (ORDER.index(title) if title in ORDER else len(ORDER), 0), title
