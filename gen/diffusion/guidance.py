"""What guidance needs of a model: two predictions that differ in what they know.

Classifier-free guidance compares the network with a label and without: it needs two classes at least, both forms trained.
Autoguidance compares two networks: of other weights, but of the same states, noise levels and classes.
"""

from typing import Any, Protocol

from midway.samplers.schedule import Schedule


class Guidable(Protocol):
    """What is looked at of a latent model."""

    config: Any
    """`target` and `label_dropout`."""
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    classes: int
    empty: tuple[int, ...]
    class_names: tuple[str, ...]


def check_label_free(model: Guidable, scale: float) -> None:
    """ValueError unless the model has a prediction without label that differs from those with one."""
    told, dropped = model.classes - len(model.empty), model.config.label_dropout
    if not model.classes:
        raise ValueError(
            f"guidance {scale} needs classes, and this model was trained without classes: use guidance 1, or another "
            "model as guide"
        )
    if told < 2:
        raise ValueError(
            f"guidance {scale} needs classes, and this model was trained on one class, whose label tells nothing: use guidance 1"
        )
    if not 0 < dropped < 1:
        missing = "with the label of every sample, so it has no prediction without" if not dropped else "without labels"
        raise ValueError(
            f"guidance {scale} needs label dropout, and this model was trained {missing} (label_dropout {dropped:g}): use "
            "guidance 1, or train it with label_dropout 0.1"
        )


def check_guide(model: Guidable, guide: Guidable) -> None:
    """ValueError unless `guide` is another model of the same states, noise levels and classes."""
    if guide is model:
        raise ValueError("the guiding model is the model itself: guide with a smaller or less trained one")
    theirs, ours = ((m.config.target, m.schedule, m.latent_shape) for m in (guide, model))
    if theirs != ours:
        raise ValueError(
            "the guiding model has target {}, {}, latents {}; this one has {}, {}, {}: guide with one trained alike".format(
                *theirs, *ours
            )
        )
    if guide.classes and model.classes and guide.classes != model.classes:
        raise ValueError(
            f"the guiding model has {guide.classes} classes, this one {model.classes}: guide with one trained alike"
        )
    if guide.class_names and model.class_names and guide.class_names != model.class_names:
        raise ValueError("the guiding model has other names of classes than this one: guide with one trained alike")
    if guide.classes and not model.classes and not guide.config.label_dropout:
        raise ValueError(
            "this model has no classes, and the guiding model was trained with the label of every sample (label_dropout 0): "
            "guide with one trained without classes"
        )
