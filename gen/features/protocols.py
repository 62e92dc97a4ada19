"""How published figures were measured, as data: a figure compares with theirs only if all of it is the same.

    adm           Dhariwal & Nichol, arXiv:2105.05233; openai/guided-diffusion, evaluations/evaluator.py
    edm           Karras et al., arXiv:2206.00364; NVlabs/edm, fid.py and generate.py
    edm2          Karras et al., arXiv:2312.02696; NVlabs/edm2, calculate_metrics.py: FID, and FD-DINOv2
    pytorch-fid   Heusel et al., arXiv:1706.08500, as mseitzer/pytorch-fid computes it

All take 50,000 images of 8 bits a channel, as PNG or NPZ, against mean and covariance of a whole training set, in a file that its
authors publish. Numbers of evaluations and seeds belong to samplers, not to these. Classes are drawn uniformly at random by the
first three's samplers, which `random` is where the training images are equally many; EDM reports the least of three such figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from midway.gen.core.errors import UsageError, nearest

ProtocolName = Literal["adm", "edm", "edm2", "pytorch-fid"]
OFFICIAL = "6726825d"
"""What the sha256 of Inception's published weights starts with."""


@dataclass(frozen=True)
class Network:
    """A feature network: its value of --features, and what the name of its features begins and ends with."""

    features: str
    begins: str
    ends: str

    def fits(self, name: str) -> bool:
        """Whether features of this name are the network's, with the published weights where they have a checksum."""
        return name.startswith(self.begins) and name.endswith(self.ends)


INCEPTION = Network("inception", f"inception-v3-2015-12-05@{OFFICIAL}", "+tf1-bilinear-299")
PYTORCH = Network("inception-pytorch", f"inception-pytorch-v3-2015-12-05@{OFFICIAL}", "+torch-bilinear-299")
DINOV2 = Network("dinov2-vitl14", "dinov2-vitl14@", "+bicubic-224")


@dataclass(frozen=True)
class Protocol:
    """What an evaluator fixes; the first of `networks` is the default."""

    name: str
    networks: tuple[Network, ...]
    references: str
    """The files of its authors, for messages."""
    n: int = 50_000
    labels: Literal["random"] | None = "random"
    """How its samplers draw classes; None: in any way."""


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("adm", (INCEPTION,), "VIRTUAL_imagenet256_labeled.npz of guided-diffusion"),
        Protocol("edm", (INCEPTION,), "cifar10-32x32.npz and others of EDM's fid-refs"),
        Protocol("edm2", (INCEPTION, DINOV2), "img512.pkl and others of EDM2's dataset-refs, converted to .npz"),
        Protocol("pytorch-fid", (PYTORCH,), "an .npz of its --save-stats", labels=None),
    )
}


@dataclass(frozen=True)
class Setting:
    """What a figure was measured with; of flags, what was given, and None where nothing was."""

    features: str | None
    """The name of the features, or the value of --features."""
    n: int | None
    reference: str | None
    """The file of a published reference; None for images."""
    labels: str | None
    """How seeds draw classes; None for a model without classes, and for images from elsewhere."""
    blocks: int | None = 1


def protocol_named(name: str) -> Protocol:
    """One of `PROTOCOLS`; UsageError."""
    if name not in PROTOCOLS:
        raise UsageError(f"--protocol {name}", "it is no published protocol", nearest(name, PROTOCOLS))
    return PROTOCOLS[name]


def settled(name: str, given: Setting) -> Setting:
    """The settings of a protocol in place of flags that were not given. UsageError for a flag that contradicts it."""
    protocol = protocol_named(name)
    choices = [network.features for network in protocol.networks]
    if given.features is not None and given.features not in choices:
        raise _contradiction(
            protocol, f"--features {given.features}", f"its features are those of {' or '.join(choices)}"
        )
    if given.n not in (None, protocol.n):
        raise _contradiction(protocol, f"--n {given.n}", f"it takes {protocol.n:,} images")
    if given.blocks not in (None, 1):
        why = f"it takes {protocol.n:,} images once"
        raise _contradiction(protocol, f"--blocks {given.blocks}", f"{why}; for another figure change --seed")
    if protocol.labels is not None and given.labels not in (None, protocol.labels):
        raise _contradiction(protocol, f"--labels {given.labels}", f"its samplers draw classes at {protocol.labels}")
    if given.reference is None:
        raise UsageError(
            f"--protocol {name} without --reference",
            "its figures are against mean and covariance that its authors publish",
            f"pass --reference FILE: {protocol.references}; or make one with --save-reference",
        )
    return Setting(given.features or choices[0], protocol.n, given.reference, given.labels or protocol.labels, 1)


def _contradiction(protocol: Protocol, flag: str, why: str) -> UsageError:
    return UsageError(f"{flag} with --protocol {protocol.name}", why, f"drop {flag.split()[0]}, or drop --protocol")


def departures(protocol: Protocol, setting: Setting) -> tuple[str, ...]:
    """In what a figure departs from a protocol, in words; () if in nothing that is known here."""
    found = []
    if setting.features is None or not any(network.fits(setting.features) for network in protocol.networks):
        found.append(f"its features are {setting.features}")
    if setting.n != protocol.n:
        found.append(f"n is {setting.n:,}, not {protocol.n:,}" if setting.n is not None else f"n is not {protocol.n:,}")
    if setting.reference is None:
        found.append("the reference is the training side of a split, not a published file")
    if protocol.labels is not None and setting.labels not in (None, protocol.labels):
        found.append(f"classes are drawn {setting.labels}, not at {protocol.labels}")
    return tuple(found)


def protocol_line(setting: Setting) -> str:
    """The line of a report: which published protocols a figure follows, or none and in what it departs from the nearest."""
    by_name = {name: departures(protocol, setting) for name, protocol in PROTOCOLS.items()}
    follows = [name for name, found in by_name.items() if not found]
    if follows:
        return (
            f"Published protocol: {_listed(follows)}. Compares with their figures if {setting.reference} is the reference of "
            "those, and the images were sampled as theirs."
        )
    name = min(by_name, key=lambda name: len(by_name[name]))
    return f"Published protocol: none. Nearest is {name}, but {'; '.join(by_name[name])}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
