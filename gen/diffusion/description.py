"""What a latent model is built from, and saved as: its configuration, the description in a folder, and its weights.

Priors are saved in the same way (gen/priors/prior.py).
"""

import json
import os
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from safetensors.torch import save_file
from torch import Tensor, nn

from midway.gen.core.config import from_file, to_dict
from midway.gen.core.files import state_hash
from midway.gen.core.ranges import POSITIVE, SHARE, check_classes, check_ranges
from midway.gen.diffusion.inputs import Inputs
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.unet import UNetConfig
from midway.gen.objectives.jump_config import JumpConfig, Objective, check_jumps, own_solver
from midway.gen.objectives.times import MODE_SCALES, Density
from midway.gen.objectives.weights import Weighting
from midway.samplers.prediction import Target
from midway.samplers.schedule import SCHEDULES, Schedule
from midway.tokenizers.hub import Shared, card_in
from midway.tokenizers.weights import (
    CONFIG,
    CONFIG_LIMIT,
    FILE,
    building,
    load_weights,
    local_folder,
    of_run,
    read_folder,
    readable,
)

USAGE = """\
from midway import ImageTokenizer, LatentModel, draw, make_solver, save_grid
model = LatentModel.from_pretrained(".")
tokenizer = ImageTokenizer.from_pretrained("tokenizer")
images = draw(model, tokenizer, make_solver({solver}), seeds=range(16))
save_grid("samples.png", images, columns=4)"""
"""Python that loads the model in the current folder and its tokenizer, and draws a picture by a `solver`."""


@dataclass(frozen=True)
class LatentModelConfig:
    """Process, target and network of a latent model."""

    schedule: Literal["linear", "cosine", "vp", "edm"] = "linear"
    """Process from data to noise: linear is the rectified flow, vp and cosine keep the variance, edm adds noise."""
    target: Target = "velocity"
    """What the network predicts."""
    time: Density = "logit_normal"
    """How noise levels are drawn in training; of models that jump both ends of a jump, of shortcut those of its flow share."""
    time_mean: float = 0.0
    """Mean of log rho for logit_normal."""
    time_std: float = 1.0
    """Standard deviation of log rho for logit_normal."""
    time_mode: float = 1.29
    """Scale of mode: above 0 the middle noise levels are drawn more often, below 0 the ends."""
    time_shift: Literal["auto"] | float = 1.0
    """Factor of the noise levels that `time` draws. auto: the root of a latent's number of values by 4096."""
    weight: Weighting = "own"
    """Weight of the squared errors by the noise level: own, that of the target; velocity, as if the target were the velocity;
    min_snr, as if it were x0, times the signal-to-noise ratio or gamma, whichever is less; learned, one over their mean at the
    noise level."""
    min_snr_gamma: float = 5.0
    """gamma of min_snr."""
    scales: int = 1
    """Resolutions of latents whose squared errors are added, each half of the one before; 1: the latents alone."""
    direction: float = 0.0
    """Weight of the error in direction, which is added: 1 - the cosine between the velocities of prediction and truth, over
    channels."""
    conditional: bool = True
    """Whether the class is an input of the model; an unconditional model learns the mixture of all."""
    label_dropout: float = 0.1
    """Share of samples trained without their class, for classifier-free guidance."""
    dequantise: bool = False
    """Pixel models: spread each level over its bin, so that the density is one of pixels and has bits per dimension."""
    dit: DiTConfig = field(default_factory=DiTConfig)
    objective: Objective = "flow"
    """flow: the target at one time, of flow matching or diffusion. Models that jump from one time to another in one evaluation:
    shortcut, alphaflow, meanflow, imf."""
    jump: JumpConfig = field(default_factory=JumpConfig)
    """Of models that jump."""
    network: Literal["dit", "unet"] = "dit"
    """A transformer, or diffusers' U-Net."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    inputs: Inputs = "own"
    """What the network gets and predicts. own: the angle of the noise level, and states and targets scaled to unit variance. Of
    imported networks, with states and targets as they are: ddpm, a timestep; sit, 1 - t."""

    def __post_init__(self) -> None:
        check_ranges(self, time_mean=(-100, 100), time_std=POSITIVE, label_dropout=SHARE)
        check_ranges(self, time_mode=MODE_SCALES, min_snr_gamma=POSITIVE, scales=(1, 10), direction=(0, 1e6))
        if self.time_shift != "auto":
            check_ranges(self, time_shift=(1e-3, 1e3))
        for name, value, plain in (("dit", self.dit, DiTConfig()), ("unet", self.unet, UNetConfig())):
            if name != self.network and value != plain:
                raise ValueError(f"settings of {name} have no effect with network {self.network}: drop them")
        check_inputs(self.inputs, self.schedule, self.is_jump)
        for name, of, chosen in (("time_mode", "mode", self.time), ("min_snr_gamma", "min_snr", self.weight)):
            value, plain = getattr(self, name), type(self).__dataclass_fields__[name].default
            if chosen != of and value != plain:
                raise ValueError(f"{name} {value} has no effect with {chosen}: it is of {of}; drop one of the two")
        if self.is_jump:
            check_jumps(self.objective, self.jump, self.schedule, self.target)
            if self.scales != 1 or self.direction:
                raise ValueError(
                    f"scales and direction are of flow models, and objective {self.objective} has an error of its own: drop "
                    "--model.scales and --model.direction"
                )
            if self.weight != "own":
                raise ValueError(
                    f"weight {self.weight} is of flow models, and objective {self.objective} has weights of its own "
                    "(--model.jump.weight-power): drop one of the two"
                )

    @property
    def size(self) -> DiTConfig | UNetConfig:
        """Of the network."""
        return self.dit if self.network == "dit" else self.unet

    @property
    def is_jump(self) -> bool:
        """Whether the model predicts average velocities of jumps."""
        return self.objective != "flow"

    @property
    def usage(self) -> str:
        """Python that draws a picture in the folder of such a model."""
        solver, grid = own_solver(self.objective, self.jump)
        few = f'"{solver}", model.schedule, nfe=2, grid="{grid}"'
        return USAGE.format(solver=few if self.is_jump else '"dpmpp2m", model.schedule, nfe=10')

    @property
    def further(self) -> tuple[str, ...]:
        """What the network gets beside time and class: the length of a jump, and the guidance scale of one trained with it."""
        if not self.is_jump:
            return ()
        return ("span", "guidance") if self.jump.guidance > 1 else ("span",)

    def make_schedule(self) -> Schedule:
        """The schedule this names."""
        return SCHEDULES[self.schedule]()


def check_inputs(inputs: Inputs, schedule: str, is_jump: bool) -> None:
    """ValueError for networks of others on another process than theirs, and for ones that jump."""
    theirs = {"ddpm": "vp", "sit": "linear"}.get(inputs, schedule)
    if schedule != theirs:
        raise ValueError(f"inputs {inputs} are of networks on schedule {theirs}, not {schedule}: change one of the two")
    if is_jump and inputs != "own":
        raise ValueError(f"inputs {inputs} are of networks at one time, which do not jump: use objective flow")


@dataclass(frozen=True)
class Description:
    """From which a latent model is built: model.json of a checkpoint, config.json of a folder to share."""

    config: LatentModelConfig
    latent_shape: tuple[int, int, int]
    classes: int
    empty: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    """Neither is in older runs."""

    def __post_init__(self) -> None:
        check_classes(self.classes, self.empty, self.class_names)


class DescribedModel(Shared, nn.Module):
    """Base of a network that a description and its weights make again: what is saved, loaded and hashed of it.

    `save_pretrained` and `push_to_hub` take its ImageTokenizer as `tokenizer`, for the folder of this name beside it.
    """

    described: ClassVar[type[Any]]
    """Its description, a dataclass. The fields are attributes of the model and, in this order, arguments of its constructor."""
    noun: ClassVar[str]
    """What it is, for errors."""

    @cached_property
    def text(self) -> str:
        """The description from which it is built, as JSON; of a model that was read, the text of its file."""
        values = {f.name: (getattr(self, f.name), f.default is MISSING) for f in fields(self.described)}
        known = {name: value for name, (value, needed) in values.items() if needed or value}
        plain = {name: to_dict(value) if is_dataclass(value) else value for name, value in known.items()}
        return json.dumps(plain, indent=2) + "\n"

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the description and the weights as they are now, which learned solvers name."""
        return state_hash(self.text, self.state_dict())

    @classmethod
    def make(cls, found: Any) -> Self:
        """The model of a description, with new weights."""
        return cls(*(getattr(found, f.name) for f in fields(cls.described)))

    @classmethod
    def built(cls, text: str, state: dict[str, Tensor], file: Path, fix: str) -> Self:
        """The model of a description, read from `file`, and its weights. DataError, OSError, ValueError where they do not fit."""
        found = from_file(cls.described, json.loads(text), file, fix)
        with building(file, state):
            model = cls.make(found)
            load_weights(model, state)
        model.__dict__["text"] = text
        return model

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any) -> Self:
        """What `save_pretrained` wrote into a folder, a run left, or the Hub has (`hub`: revision, ...): on the CPU, evaluating.

        OSError, SafetensorError, DataError or ValueError: files that are missing, damaged, or do not go together.
        """
        folder = of_run(local_folder(os.fspath(source), subfolder, **hub), "model")
        text = readable(folder / CONFIG, CONFIG_LIMIT).read_text(encoding="utf-8")
        model = cls.built(text, read_folder(folder), folder / CONFIG, "get the whole folder again")
        model.card = card_in(folder)
        return model.eval()

    def write(self, folder: Path, **options: Any) -> None:
        tokenizer = options.pop("tokenizer", None)
        if options:
            raise ValueError(f"a {self.noun} is saved with its tokenizer alone, without {', '.join(options)}")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / "tokenizer")
        (folder / CONFIG).write_text(self.text, encoding="utf-8")
        save_file(
            {name: value.contiguous() for name, value in self.state_dict().items()}, folder / FILE, {"format": "pt"}
        )
