"""What a latent model is trained for: the velocity at one time, or average velocities of jumps (samplers/jumps.py)."""

from dataclasses import dataclass
from typing import Literal, get_args

from midway.gen.core.ranges import EVENTS, SHARE, check_ranges

Objective = Literal["flow", "shortcut", "alphaflow", "meanflow", "imf"]
JUMPS: tuple[str, ...] = get_args(Objective)[1:]
"""Objectives of models that jump."""
DERIVATIVE = 0.005
"""Of alpha-Flow: below this alpha the target is MeanFlow's, its limit."""
OF = {
    "finest": ("shortcut",),
    "alpha_steps": ("alphaflow",),
    "alpha_end": ("alphaflow",),
    "ends": JUMPS,
    "guidance": JUMPS,
}
"""Objectives that have these settings."""
SCHEDULES = ("linear", "cosine")
"""On which jumps are trained: their velocities stay of one size in t."""


@dataclass(frozen=True)
class JumpConfig:
    """How a model that jumps is trained; the defaults of None depend on the objective (jumps.py)."""

    flow_share: float | None = None
    """Share of a batch that is trained at r = t, by flow matching, to the nearest 64th; default 0.75 of shortcut and meanflow,
    0.5 of the others, 0 where jumps end at the data."""
    weight_power: float | None = None
    """A sample's loss L is weighted by (L + offset)^-power, the weight held fixed; default 0 of shortcut, 1 of the others.
    Above 0 the optimum is not the mean velocity where velocities are skewed, least so for latents of many values."""
    weight_offset: float = 1e-3
    """The offset of that weight."""
    finest: int = 7
    """shortcut: the shortest jumps are 2^-finest of the whole way, half of a jump that is trained."""
    alpha_steps: int = 0
    """alphaflow: optimizer steps over which alpha falls from 1, along a sigmoid; 0: all of the training."""
    alpha_end: float = 0.0
    """alphaflow: the least alpha. From 0.005 on no derivative of the network is ever taken."""
    ends: Literal["any", "data"] = "any"
    """data: every jump ends at the data, which makes a consistency model; it is sampled by `consistency`."""
    guidance: float = 1.0
    """Classifier-free guidance in training: the greatest scale; the model takes the scale as an input, and a guided sample costs
    one evaluation a step. 1: none."""
    teacher_guidance: float = 1.0
    """Guidance scale of the velocities of --teacher."""

    def __post_init__(self) -> None:
        check_ranges(self, flow_share=SHARE, weight_power=(0, 4), weight_offset=(1e-12, 1e6), finest=(1, 20))
        check_ranges(self, alpha_steps=EVENTS, alpha_end=SHARE)
        check_ranges(self, guidance=(1, 1000), teacher_guidance=(0, 1000))

    def share(self, objective: Objective) -> float:
        """Of a batch, what is trained at r = t."""
        if self.flow_share is not None:
            return self.flow_share
        if self.ends == "data":
            return 0.0
        return 0.75 if objective in ("shortcut", "meanflow") else 0.5

    def power(self, objective: Objective) -> float:
        """Of the adaptive weight."""
        default = 0.0 if objective == "shortcut" else 1.0
        return default if self.weight_power is None else self.weight_power


def check_jumps(objective: Objective, jump: JumpConfig, schedule: str, target: str) -> None:
    """ValueError for a process, a target or a configuration on which this objective is not defined."""
    if target != "velocity":
        raise ValueError(f"objective {objective} predicts velocities, and the target is {target}: use target velocity")
    if schedule not in SCHEDULES:
        raise ValueError(
            f"objective {objective} on schedule {schedule}, whose velocities in t differ much: use linear or cosine"
        )
    if jump.ends == "data" and objective in ("shortcut",):
        raise ValueError(
            "shortcut halves its jumps, so they cannot all end at the data: use alphaflow, meanflow or imf"
        )


def without_effect(objective: Objective, jump: JumpConfig) -> list[str]:
    """Settings other than their defaults that this objective has not."""
    plain = JumpConfig()
    return [name for name, of in OF.items() if objective not in of and getattr(jump, name) != getattr(plain, name)]


def check_jump_guidance(jump: JumpConfig, scale: float, elsewhere: bool) -> None:
    """ValueError for a guidance scale that a model of jumps was not trained with; `elsewhere`: by a model, or in an interval."""
    if elsewhere:
        raise ValueError("a model of jumps is guided by its own input alone, and everywhere")
    if jump.guidance == 1:
        raise ValueError(
            "average velocities of two conditions belong to two trajectories, and cannot be mixed: train the model with guidance "
            "(--model.jump.guidance 4), or distil a guided flow model (--teacher RUN --model.jump.teacher-guidance 2)"
        )
    if not 1 <= scale <= jump.guidance:
        raise ValueError(f"the model was trained with guidance scales from 1 to {jump.guidance:g}")


def own_solver(objective: Objective, jump: JumpConfig) -> tuple[str, str]:
    """Solver and grid that a model is sampled by where nothing else is given."""
    if objective == "flow":
        return "dpmpp2m", "karras"
    return ("consistency" if jump.ends == "data" else "jump"), "uniform"
