"""Published protocols: what they fix, flags that contradict them, and the line that names which one a figure follows."""

from dataclasses import replace

import pytest

from midway.gen.core.errors import UsageError
from midway.gen.features.inception import INCEPTION as WEIGHTS
from midway.gen.features.inception import protocol_name
from midway.gen.features.open import NAMED
from midway.gen.features.protocols import (
    OFFICIAL,
    PROTOCOLS,
    Setting,
    departures,
    protocol_line,
    protocol_named,
    settled,
)

NOTHING = Setting(None, None, "ref.npz", None, None)
FID = Setting(protocol_name(f"{OFFICIAL}0123"), 50_000, "ref@0123456789ab", "random")


def test_the_table_names_networks_that_there_are() -> None:
    assert {network.features for protocol in PROTOCOLS.values() for network in protocol.networks} <= set(NAMED)
    assert WEIGHTS.digits == OFFICIAL
    assert all(protocol.n == 50_000 and protocol.name == name for name, protocol in PROTOCOLS.items())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_flags_that_are_not_given_are_the_protocols(name: str) -> None:
    found = settled(name, NOTHING)
    features = "inception-pytorch" if name == "pytorch-fid" else "inception"
    assert found == Setting(features, 50_000, "ref.npz", None if name == "pytorch-fid" else "random", 1)
    assert settled(name, found) == found


def test_edm2_has_two_networks() -> None:
    assert settled("edm2", replace(NOTHING, features="dinov2-vitl14")).features == "dinov2-vitl14"
    with pytest.raises(UsageError, match="--features dinov2-vitl14 with --protocol edm"):
        settled("edm", replace(NOTHING, features="dinov2-vitl14"))


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"features": "effnet-lite0"}, "--features effnet-lite0"),
        ({"features": "inception-pytorch"}, "--features inception-pytorch"),
        ({"n": 10_000}, "--n 10000"),
        ({"blocks": 4}, "--blocks 4"),
        ({"labels": "balanced"}, "--labels balanced"),
    ],
)
def test_a_flag_that_contradicts_is_a_usage_error(change: dict[str, object], flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag} with --protocol adm") as caught:
        settled("adm", replace(NOTHING, **change))  # pyright: ignore[reportArgumentType]
    assert "drop --protocol" in caught.value.fix


def test_pytorch_fid_leaves_classes_to_the_sampler() -> None:
    for rule in ("balanced", "proportional", "random"):
        assert settled("pytorch-fid", replace(NOTHING, labels=rule)).labels == rule


def test_a_protocol_needs_its_reference_and_a_known_name() -> None:
    with pytest.raises(UsageError, match="--protocol adm without --reference") as caught:
        settled("adm", replace(NOTHING, reference=None))
    assert "VIRTUAL" in caught.value.fix
    with pytest.raises(UsageError, match="--protocol amd") as caught:
        protocol_named("amd")
    assert "did you mean 'adm'" in caught.value.fix


# ---- which one a figure follows ----


def test_a_figure_that_follows_names_all_protocols_with_its_settings() -> None:
    assert protocol_line(FID).startswith(
        "Published protocol: adm, edm and edm2."
    ) and "ref@0123456789ab" in protocol_line(FID)
    dinov2 = replace(FID, features="dinov2-vitl14@0123456789ab+bicubic-224")
    assert protocol_line(dinov2).startswith("Published protocol: edm2.")
    pytorch = replace(FID, features=f"inception-pytorch-v3-2015-12-05@{OFFICIAL}0123+torch-bilinear-299")
    assert protocol_line(replace(pytorch, labels="balanced")).startswith("Published protocol: pytorch-fid.")
    assert protocol_line(replace(FID, labels=None)) == protocol_line(
        FID
    )  # images from elsewhere, and models without classes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n": 10_000}, "n is 10,000, not 50,000"),
        ({"reference": None}, "the training side of a split"),
        ({"labels": "balanced"}, "classes are drawn balanced, not at random"),
        ({"features": protocol_name("0123456789ab")}, "its features are inception-v3-2015-12-05@0123456789ab"),
        ({"features": "effnet-lite0@579344248a93+bicubic-32, 64 axes"}, "its features are effnet-lite0"),
    ],
)
def test_a_figure_that_follows_none_names_in_what_it_departs(change: dict[str, object], why: str) -> None:
    line = protocol_line(replace(FID, **change))  # pyright: ignore[reportArgumentType]
    assert line.startswith("Published protocol: none.") and why in line


def test_departures_are_counted() -> None:
    far = Setting("pixels", 359, None, "proportional")
    assert len(departures(PROTOCOLS["adm"], far)) == 4 and departures(PROTOCOLS["adm"], FID) == ()
    assert "Nearest is pytorch-fid" in protocol_line(far)  # it does not fix how classes are drawn
