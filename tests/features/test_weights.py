"""Weights of published networks: where they are found, that wrong ones never stay, and that no file runs code."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from endless import ENDLESS, guarded
from pipelines import Pipeline, Script
from safetensors.torch import save_file
from traps import Trap

from midway.gen.core.errors import DataError, UsageError
from midway.gen.features import weights
from midway.gen.features.inception import INCEPTION
from midway.gen.features.vit import ENCODERS
from midway.gen.features.weights import Published, check_floats, find_weights, read_weights
from midway.tokenizers.weights import receive

CONTENT = b"published weights" * 1000
KNOWN = Published(
    "inception", "known.pth", "https://example.invalid/known.pth", hashlib.sha256(CONTENT).hexdigest()[:8]
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""

    def no_network(*_: Any, **__: Any) -> Any:
        raise URLError("no route to host")

    for name in ("inception", *ENCODERS):
        monkeypatch.delenv(replace(KNOWN, network=name).variable, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    return tmp_path / "home" / "hub" / "checkpoints"


def _written(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_named_file_comes_before_the_environment_before_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, other, given = (
        _written(path) for path in (cache / KNOWN.file, tmp_path / "environment", tmp_path / "given")
    )
    assert find_weights(KNOWN) == cached
    monkeypatch.setenv("MIDWAY_INCEPTION_WEIGHTS", str(other))
    assert find_weights(KNOWN) == other
    assert find_weights(KNOWN, given) == given


def test_a_named_file_that_is_not_there_is_an_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _written(cache / KNOWN.file)
    with pytest.raises(DataError, match=r"there is no file .*absent"):
        find_weights(KNOWN, tmp_path / "absent")
    monkeypatch.setenv("MIDWAY_INCEPTION_WEIGHTS", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"there is no file .*gone"):
        find_weights(KNOWN)


def test_a_cached_file_of_another_checksum_raises(cache: Path) -> None:
    path = _written(cache / KNOWN.file, CONTENT[:-1])
    with pytest.raises(DataError, match=f"does not start with {KNOWN.digits}") as error:
        find_weights(KNOWN)
    assert "--feature-weights" in error.value.fix
    assert path.exists()  # it may be someone else's


def _served(path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return replace(KNOWN, url=path.as_uri())


def test_a_download_is_verified_and_cached(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = _served(_written(tmp_path / "server"), monkeypatch)
    assert find_weights(published).read_bytes() == CONTENT
    (tmp_path / "server").unlink()
    assert find_weights(published) == cache / KNOWN.file


@pytest.mark.parametrize("sent", [CONTENT[:-1], CONTENT + b"x", b"", None])
def test_a_wrong_download_leaves_nothing(
    sent: bytes | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sent is not None:
        _written(tmp_path / "server", sent)
    with pytest.raises(DataError, match="not on this machine"):
        find_weights(_served(tmp_path / "server", monkeypatch))
    assert not list(cache.iterdir())


def test_a_download_that_is_interrupted_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropped:
        """A connection that sends a part and fails."""

        def __enter__(self) -> "Dropped":
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, _: int, sent: list[bytes] = [CONTENT[:50]]) -> bytes:  # noqa: B006
            if sent:
                return sent.pop()
            raise ConnectionResetError("reset by peer")

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Dropped())
    with pytest.raises(DataError, match="reset by peer"):
        find_weights(KNOWN)
    assert not list(cache.iterdir())


def test_a_download_that_never_ends_is_cut(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "receive", lambda url, path: receive(url, path, len(CONTENT) - 1))
    with pytest.raises(DataError, match=f"more than the limit of {len(CONTENT) - 1:,} bytes"):
        find_weights(_served(_written(tmp_path / "server"), monkeypatch))
    assert not list(cache.iterdir())


@pytest.mark.parametrize("kind", ENDLESS)
def test_weights_are_regular_files(kind: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = ENDLESS[kind]
    cache.mkdir(parents=True)
    make(cache / KNOWN.file)
    with pytest.raises(DataError, match=words):
        guarded(lambda: find_weights(KNOWN))
    for name in ("x.pth", "x.safetensors"):
        make(tmp_path / name)
        with pytest.raises(DataError, match="there is no file"):
            guarded(lambda name=name: find_weights(KNOWN, tmp_path / name))
        with pytest.raises(DataError, match=words):
            guarded(lambda name=name: read_weights(tmp_path / name))


def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)


@pytest.mark.parametrize("published", [INCEPTION, *(encoder.published for encoder in ENCODERS.values())])
def test_without_weights_there_are_three_remedies(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_hub(monkeypatch)
    with pytest.raises(DataError) as error:
        find_weights(published)
    script = f"midway download-weights {published.network}"
    assert all(
        remedy in error.value.fix for remedy in (script, "--feature-weights", published.variable, published.source)
    )


def test_the_hub_receives_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: f"/hub/{repository}/{file}")
    found = find_weights(ENCODERS["clip-vitl14"].published)
    assert found == Path("/hub/timm/vit_large_patch14_clip_224.openai/model.safetensors")


STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_format_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    read = read_weights(path)
    assert read.keys() == STATE.keys()
    assert all(torch.equal(read[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("length", [-1, 100, 0])
def test_truncated_files_raise(name: str, length: int, tmp_path: Path) -> None:
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(STATE, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=f"cannot use the weights .*{name}"):
        read_weights(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_not_run(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({**STATE, "trap": Trap(tmp_path / "mark")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DataError, match="cannot be read"):
        read_weights(path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({}, "not a dictionary"),
        ([torch.ones(1)], "not a dictionary"),
        ({"state": STATE}, "not a dictionary"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a holds values that are not finite"),
        ({"a": torch.tensor([float("inf")])}, "not finite"),
    ],
)
def test_other_contents_raise(state: Any, why: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=why):
        read_weights(tmp_path / "weights.pth")


def test_the_sweep_stops_before_sampling(
    pipeline: Pipeline, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model", pipeline.model, "--out", tmp_path / "report")
    done = script("evaluate", *flags, "--features", "inception")
    assert done.code == 3
    assert "the weights of inception are not on this machine" in done.err
    torch.save({"trap": Trap(tmp_path / "mark")}, tmp_path / "bad.pth")
    done = script("evaluate", *flags, "--features", "inception", "--feature-weights", tmp_path / "bad.pth")
    assert (done.code, "cannot use the weights" in done.err) == (3, True)
    done = script("evaluate", *flags, "--features", "incepton")
    assert (done.code, "did you mean 'inception'" in done.err) == (2, True)
    done = script("evaluate", *flags, "--features", pipeline.features, "--feature-weights", tmp_path / "bad.pth")
    assert (done.code, "a run has its own weights" in done.err) == (2, True)
    assert not (tmp_path / "report").exists()
    assert not (tmp_path / "mark").exists()


def test_weights_are_fetched_by_a_script(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDWAY_CLIP_VITB32_WEIGHTS", str(_written(tmp_path / "clip")))
    assert script("download_weights", "clip-vitb32").out == f"{tmp_path / 'clip'}\n"
    assert script("download_weights", "inception").code == 3
    done = script("download_weights", "clip-vitb23")
    assert (done.code, "did you mean 'clip-vitb32'" in done.err) == (2, True)


@pytest.mark.parametrize(("network", "package"), [("inception", "torch_fidelity"), ("clip-vitb32", "timm")])
def test_a_missing_package_names_the_extra(
    network: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from midway.gen.features.open import open_published

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    save_file(STATE, tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match=r"pip install 'midway\[features\]'"):
        open_published(network, tmp_path / "weights.safetensors")


@pytest.mark.parametrize("kind", [torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8])
def test_published_weights_are_floats_that_float32_holds(kind: torch.dtype, tmp_path: Path) -> None:
    """Half precision too, and beside counters of batches; no others, though torch would convert them."""
    state = {"a.weight": torch.ones(3), "b.weight": torch.ones(2, dtype=torch.bfloat16), "c.bias": torch.ones(1).half()}
    counted = {**state, "n.num_batches_tracked": torch.tensor(3)}
    for found in (state, counted):
        check_floats(tmp_path, found)
    with pytest.raises(DataError, match=r"a\.weight .* instead of float32"):
        check_floats(tmp_path, {**counted, "a.weight": torch.ones(3).to(kind)})
