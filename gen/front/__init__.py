"""Midway: image tokenizers, latent generative models and ODE solvers, compared by Fréchet distance per step budget.

The names of `NAMES` are imported when they are used, so that `import midway` and `midway --help` do not wait for torch.
"""

from importlib import import_module, metadata
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent
if _FOLDER.parts[-2:] == ("gen", "front"):  # a checkout, where gen, samplers and tokenizers are at the top
    __path__.append(str(_FOLDER.parents[1]))

NAMES = {
    "ImageTokenizer": "midway.tokenizers.tokenizer",
    "LatentModel": "midway.gen.diffusion.model",
    "Prior": "midway.gen.priors.registry",
    "load_model": "midway.gen.diffusion.load",
    "load_prior": "midway.gen.priors.load",
    "load_images": "midway.gen.data.images",
    "to_float": "midway.gen.data.images",
    "to_uint8": "midway.gen.data.images",
    "save_grid": "midway.gen.data.pictures",
    "draw": "midway.gen.diffusion.sampling",
    "initial": "midway.gen.diffusion.sampling",
    "Guidance": "midway.gen.diffusion.model",
    "sample": "midway.samplers.sample",
    "make_solver": "midway.samplers.solvers",
    "load_solver": "midway.samplers.loading",
    "SOLVERS": "midway.samplers.solvers",
    "Table": "midway.samplers.table",
    "Prediction": "midway.samplers.prediction",
    "Linear": "midway.samplers.schedule",
    "Cosine": "midway.samplers.schedule",
    "VP": "midway.samplers.schedule",
    "EDM": "midway.samplers.schedule",
    "karras": "midway.samplers.grids",
    "logsnr": "midway.samplers.grids",
    "uniform": "midway.samplers.grids",
    "FeatureStatistics": "midway.gen.metrics.moments",
    "frechet_distance": "midway.gen.metrics.frechet",
}
"""What `from midway import ...` offers, and the module that has it."""


def __getattr__(name: str) -> Any:
    """`__version__`, or a name of `NAMES`; AttributeError for any other."""
    if name == "__version__":
        return metadata.version("midway")
    if name not in NAMES:
        raise AttributeError(f"module 'midway' has no attribute '{name}'")
    return getattr(import_module(NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *NAMES])
