"""midway sample --prompt: images and codes completed by priors, every way to name what is kept, and errors with a remedy."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import Pipeline, Script
from prior_runs import open_prior, prior_run
from safetensors.torch import save_file
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError
from midway.gen.data.images import to_float
from midway.gen.data.splits import load_splits
from midway.gen.priors.decoding import Decoding, Prompt
from midway.gen.priors.sampling import CodeSampling, decode_codes, encode_codes, sample_codes
from midway.gen.tokenizer.stored import tokenizer_hash

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("causal", "masked", "continuous")


@pytest.fixture(scope="module")
def runs(pipeline: Pipeline) -> dict[str, Path]:
    made = {kind: prior_run(pipeline.root / f"prompt-{kind}", pipeline.tokenizer, kind=kind) for kind in KINDS}
    return made | {"latent": pipeline.model}


@pytest.fixture(scope="module")
def prompts(pipeline: Pipeline, runs: dict[str, Path]) -> Path:
    """A folder of three images, their codes in every form, and codes that cannot be completed."""
    trained, folder = open_prior(runs["masked"]), pipeline.root / "prompts"
    images = load_splits(trained.data).held_out.images[:3]
    (folder / "images").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / "images" / f"{i}.png")
    codes, own = trained.tokenizer.encode_indices(to_float(images)), tokenizer_hash(trained.tokenizer)
    part = codes.clone().flatten(1)
    part[:, 1:3] = -1
    unequal = part.clone()
    unequal[0, 0] = -1

    def write(name: str, codes: Tensor, **named: str) -> None:
        save_file({"codes": codes.contiguous()}, folder / f"{name}.safetensors", named)

    write("codes", codes, tokenizer=own)
    write("part", part.view(codes.shape))
    write("unequal", unequal.view(codes.shape))
    write("other", codes, tokenizer="0123456789abcdef")
    write("great", codes + 10**6)
    write("long", codes.repeat(1, 2, 1))
    write("real", codes.float())
    np.savez(folder / "codes.npz", codes=codes.numpy(), tokenizer=own)
    np.savez(folder / "images.npz", images.permute(0, 2, 3, 1).numpy())
    (folder / "broken.npz").write_bytes(b"PK")
    mask = np.full((8, 8), 255, np.uint8)
    mask[4:, 4:] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def _drawn(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def _expected(run: Path, folder: Path, known: Tensor, count: int = 3) -> np.ndarray:
    trained = open_prior(run)
    images = torch.stack(
        [torch.from_numpy(np.asarray(Image.open(folder / f"images/{i}.png")).copy())[None] for i in range(3)]
    )
    how = Decoding("causal" if trained.prior.config.kind == "causal" else "halton")
    sampling = CodeSampling(how, prompt=Prompt(encode_codes(trained, images), known))
    return decode_codes(trained, sample_codes(trained, torch.arange(count), sampling).tokens)[:, 0].numpy()


FIRST = torch.tensor([True, False, False, False])
HALF = torch.tensor([True, True, False, False])


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_completed(runs: dict[str, Path], prompts: Path, succeed: Script, tmp_path: Path, kind: str) -> None:
    """By default half of their tokens, as many images as there are; --n goes through them in turn."""
    begin = f"sample --model {runs[kind]} --prompt {prompts}/images"
    done = succeed(f"{begin} --out {tmp_path}/half")
    assert "--prompt: 3 images, of which 2 of 4 tokens are kept" in done.out
    assert (
        "3 images, 2 evaluations (4 token-" if kind == "causal" else "3 images, 2 evaluations (10 token-"
    ) in done.out
    assert np.array_equal(_drawn(tmp_path / "half"), _expected(runs[kind], prompts, HALF))
    done = succeed(f"{begin} --prompt-tokens 1 --n 7 --batch-size 2 --out {tmp_path}/one.npz")
    assert "7 images, 3 evaluations" in done.out
    with np.load(tmp_path / "one.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["arr_0"][..., 0], _expected(runs[kind], prompts, FIRST, 7))
    succeed(f"{begin} --prompt-region top --out {tmp_path}/top")
    assert np.array_equal(_drawn(tmp_path / "top"), _drawn(tmp_path / "half"))


@pytest.mark.parametrize("kind", ["masked", "continuous"])
def test_regions_and_masks_are_kept(
    runs: dict[str, Path], prompts: Path, succeed: Script, script: Script, tmp_path: Path, kind: str
) -> None:
    begin = f"sample --model {runs[kind]} --prompt {prompts}/images --nfe 1"
    succeed(f"{begin} --prompt-region left --out {tmp_path}/left")
    left = _drawn(tmp_path / "left")
    succeed(f"{begin} --prompt-region {prompts}/mask.png --out {tmp_path}/mask")
    known = torch.tensor([True, True, True, False])
    assert np.array_equal(_drawn(tmp_path / "mask"), _expected(runs[kind], prompts, known))
    assert not np.array_equal(left, _drawn(tmp_path / "mask"))
    other = script(*f"{begin} --prompt-region right --out {tmp_path}/left".split())
    assert other.code == 2 and "holds samples of other settings" in other.err and "prompt was" in other.err


def test_codes_are_completed(
    runs: dict[str, Path], pipeline: Pipeline, prompts: Path, succeed: Script, tmp_path: Path
) -> None:
    """Of a file with the hash of their tokenizer or without, in part, and of a folder of midway encode, with its classes."""
    for name in ("codes.safetensors", "codes.npz", "images.npz"):
        succeed(f"sample --model {runs['masked']} --prompt {prompts}/{name} --out {tmp_path}/{name}.d")
        assert np.array_equal(_drawn(tmp_path / f"{name}.d"), _expected(runs["masked"], prompts, HALF))
    done = succeed(f"sample --model {runs['masked']} --prompt {prompts}/part.safetensors --out {tmp_path}/part")
    assert "3 images, of which 2 of 4 tokens are kept" in done.out
    known = torch.tensor([True, False, False, True])
    assert np.array_equal(_drawn(tmp_path / "part"), _expected(runs["masked"], prompts, known))
    succeed(f"encode --tokenizer {pipeline.tokenizer} --kind codes --out {tmp_path}/encoded")
    succeed(f"sample --model {runs['causal']} --prompt {tmp_path}/encoded --n 4 --out {tmp_path}/x.npz")
    labels = load_splits(open_prior(runs["causal"]).data).train.labels[:4]
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays["arr_1"].tolist() == labels.tolist()


def test_the_code_of_the_page_runs_as_printed(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits-masked").symlink_to(runs["masked"])
    page = (Path(__file__).parents[2] / "docs/priors.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["images"].shape == (64, 1, 8, 8) and names["prompt"].known.tolist() == HALF.tolist()
    assert torch.equal(names["found"].tokens[:8, :2], names["tokens"][:, :2])


@pytest.mark.parametrize(
    ("which", "flags", "error", "words"),
    [
        ("latent", "--prompt {0}/images", UsageError, "only priors complete tokens, and this is a latent model"),
        ("masked", "--prompt-tokens 2", UsageError, "--prompt-tokens without --prompt"),
        ("masked", "--prompt {0}/images --prompt-tokens 2 --prompt-region top", UsageError, "both name what is kept"),
        ("masked", "--prompt {0}/images --prompt-tokens 0", UsageError, "--prompt-tokens 0"),
        ("causal", "--prompt {0}/images --prompt-tokens 4", UsageError, "give 1 to 3"),
        (
            "causal",
            "--prompt {0}/images --prompt-tokens 99",
            UsageError,
            "its images have 4 tokens, of which at least one",
        ),
        (
            "causal",
            "--prompt {0}/images --prompt-region left",
            UsageError,
            "draws row by row, and what is kept is not the",
        ),
        ("masked", "--prompt {0}/images --prompt-region middle", UsageError, "use one of top, bottom"),
        ("masked", "--prompt {0}/images --prompt-region center", UsageError, "it keeps 0 of 4 tokens"),
        ("masked", "--prompt {0}/images --nfe 3", UsageError, "2 beside the 2 of the prompt"),
        ("causal", "--prompt {0}/images --nfe 4", UsageError, "2 beside the 2 of the prompt"),
        ("masked", "--prompt {0}/nothing", DataError, "nothing"),
        ("masked", "--prompt {0}/broken.npz", DataError, "give whole numbers"),
        (
            "masked",
            "--prompt {0}/other.safetensors",
            DataError,
            "they are of tokenizer 0123456789ab, and this prior's is",
        ),
        ("masked", "--prompt {0}/great.safetensors", DataError, "there are "),
        ("masked", "--prompt {0}/long.safetensors", DataError, "indices have shape (3, 4, 2)"),
        ("masked", "--prompt {0}/real.safetensors", DataError, "codes are torch.float32"),
        ("masked", "--prompt {0}/unequal.safetensors", DataError, "-1 at other places"),
        ("masked", "--prompt {0}/part.safetensors --prompt-tokens 2", UsageError, "1 of the 2 tokens to keep are -1"),
        ("continuous", "--prompt {0}/codes.safetensors", DataError, "the tokens of this prior are continuous"),
    ],
)
def test_what_cannot_be_completed(
    runs: dict[str, Path],
    prompts: Path,
    script: Script,
    tmp_path: Path,
    which: str,
    flags: str,
    error: type,
    words: str,
) -> None:
    """Three lines and an exit code; nothing is written."""
    done = script(*f"sample --model {runs[which]} {flags.format(prompts)} --out {tmp_path}/x.png".split())
    assert done.code == error.exit_code and words in done.err and done.err.count("\n") == 3, done.err
    assert "Traceback" not in done.err and not (tmp_path / "x.png").exists()
