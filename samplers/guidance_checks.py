"""Whether there is anything to guide; ValueError with the reason if not.

Classifier-free guidance compares a network with a label and without: it needs two classes at least, and training in which labels
were dropped. Autoguidance compares two networks: of the same states, noise levels and classes.
"""

import math
from dataclasses import dataclass

from midway.samplers.schedule import Schedule


def check_scale(scale: float) -> None:
    """ValueError for a scale that is not finite."""
    if not math.isfinite(scale):
        raise ValueError(f"a guidance scale is a finite number, got {scale}: 1 is none, 2 a usual one")


def check_interval(low: float, high: float) -> None:
    """ValueError unless some noise level rho is in (low, high]."""
    if not 0 <= low < high:
        raise ValueError(f"guidance needs 0 <= low < high noise levels rho, got ({low}, {high}]: high may be infinite")


@dataclass(frozen=True)
class TrainedOn:
    """What a network was trained on and for."""

    target: str
    schedule: Schedule
    shape: tuple[int, ...]
    """Of a state."""
    classes: int
    """0 without labels."""
    names: tuple[str, ...] = ()
    """Of the classes, if they are known."""
    empty: int = 0
    """Classes without an image."""
    dropout: float = 0.0
    """Share of samples trained without their label."""


def check_labels(scale: float, network: TrainedOn) -> None:
    """ValueError unless the network predicts differently with and without a label."""
    why = why_unguided(network.classes, network.empty, network.dropout)
    if why:
        raise ValueError(f"guidance {scale} {why}: use guidance 1, or guide with another model")


def why_unguided(classes: int, empty: int, dropout: float) -> str:
    """Why predictions of a network with and without a label are no guidance: what that needs; "" if they are."""
    if not classes:
        return "needs classes, and this model was trained without classes"
    if classes - empty < 2:
        return "needs classes, and this model was trained on one class, whose label tells nothing"
    if dropout == 0:
        return "needs label dropout, and this model (label_dropout 0) has no prediction without a label"
    if dropout == 1:
        return "needs labels, and this model (label_dropout 1) was trained without labels"
    return ""


def check_guide(network: TrainedOn, guide: TrainedOn) -> None:
    """ValueError unless both have the same target, states, noise levels and classes.

    One of them may have no classes: then the guide gets no label, and must have been trained without it.
    """
    for what, theirs, ours in (
        ("target", guide.target, network.target),
        ("schedule", guide.schedule, network.schedule),
        ("latents", guide.shape, network.shape),
        ("classes", guide.classes or network.classes, network.classes or guide.classes),
        ("class names", guide.names or network.names, network.names or guide.names),
    ):
        if theirs != ours:
            raise ValueError(f"the guiding model has {what} {theirs}, this one {ours}: guide with one trained alike")
    if guide.classes and not network.classes and guide.dropout == 0:
        raise ValueError(
            "the guiding model has no prediction without a label, and this model no classes: guide with another"
        )
