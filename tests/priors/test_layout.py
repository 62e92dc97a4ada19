"""Codes of every discrete quantizer as tokens of digits, and back."""

import math
from dataclasses import replace

import pytest
import torch
from quantizer_cases import CASES, CONTINUOUS, DISCRETE, every_index
from tensors import pixels

from midway.gen.data.images import to_float
from midway.gen.priors.layout import CodeLayout, digit_vectors, layout_of
from midway.tokenizers.fsq import FSQ
from midway.tokenizers.tokenizer import ImageTokenizer

CODES_16 = {"type": "vq", "codebook_size": 16, "dim": 3}


def _tokenizer(quantizer: dict[str, object]) -> ImageTokenizer:
    """8x8 pixels, 4x4 positions."""
    torch.manual_seed(0)
    return ImageTokenizer(width=8, blocks=1, quantizer=quantizer).eval()


DIGITS = [name for name in DISCRETE if ("fsq" in name or "bits" in CASES[name] or "deep" in name)]
"""Those whose codes have digits; 12 codes of one codebook have none."""


@pytest.mark.parametrize(
    ("case", "split"), [*((name, "joint") for name in DISCRETE), *((name, "digits") for name in DIGITS)]
)
def test_indices_become_tokens_and_come_back(case: str, split: str) -> None:
    tokenizer = _tokenizer(CASES[case])
    layout = layout_of(tokenizer, split)
    indices = every_index(tokenizer.quantizer)
    tokens = layout.tokens(indices)
    assert torch.equal(layout.indices(tokens), indices)
    assert tokens.shape == (len(indices), layout.length, len(layout.sizes)) and layout.length == tokenizer.tokens
    assert int(tokens.min()) == 0 and tuple(tokens.flatten(0, 1).amax(0) + 1) == layout.sizes  # every digit occurs
    codes = math.prod(layout.sizes)
    assert codes == (tokenizer.quantizer.codebook_size or 0) ** tokenizer.quantizer.groups
    assert layout.bits == pytest.approx(layout.length * math.log2(codes))
    assert len(layout.radices) == tokenizer.quantizer.groups
    assert split == "digits" or len(layout.sizes) == tokenizer.quantizer.groups


@pytest.mark.parametrize(
    ("case", "split"), [*((name, "joint") for name in DISCRETE), *((name, "digits") for name in DIGITS)]
)
def test_every_digit_has_the_vectors_of_its_values(case: str, split: str) -> None:
    tokenizer = _tokenizer(CASES[case])
    found = digit_vectors(tokenizer, split)
    assert tuple(len(vectors) for vectors in found) == layout_of(tokenizer, split).sizes
    for vectors in found:
        assert vectors.dtype == torch.float32 and len(vectors.unique(dim=0)) == len(vectors)


def test_vectors_of_digits_of_fsq_differ_in_one_channel() -> None:
    tokenizer = _tokenizer(CASES["fsq"])
    for channel, vectors in enumerate(digit_vectors(tokenizer, "digits")):
        steps = vectors.diff(dim=0)
        assert bool((steps[:, channel] > 0).all()) and int((steps != 0).sum()) == len(steps)
    whole = digit_vectors(tokenizer, "joint")[0]
    assert torch.equal(whole, tokenizer.quantizer.indices_to_codes(torch.arange(160)[None])[0].T)


@pytest.mark.parametrize("case", ["fsq", "residual", "grouped", "two_level", "two_level, parts", "lfq"])
def test_indices_have_the_shape_that_the_tokenizer_reads_and_writes(case: str) -> None:
    tokenizer = _tokenizer(CASES[case])
    with torch.no_grad():
        indices = tokenizer.encode_indices(to_float(pixels(2)))
        layout = layout_of(tokenizer)
        assert indices.shape[1:] == layout.shape
        found = tokenizer.decode_indices(layout.indices(layout.tokens(indices)))
        assert torch.equal(found, tokenizer.decode_indices(indices))


def test_digits_of_fsq_are_its_channels() -> None:
    tokenizer = _tokenizer(CASES["fsq"])
    assert isinstance(tokenizer.quantizer, FSQ)
    indices, layout = every_index(tokenizer.quantizer), layout_of(tokenizer, "digits")
    assert layout.sizes == (8, 5, 4)
    assert torch.equal(layout.tokens(indices).mT.unflatten(2, (4, 4)), tokenizer.quantizer.indices_to_digits(indices))


def test_tokens_of_one_dimension_are_a_row() -> None:
    options = {"network": "vit", "depth": 1, "heads": 2, "latent_tokens": 5, "quantizer": CASES["fsq"]}
    tokenizer = ImageTokenizer(width=8, **options).eval()
    layout = layout_of(tokenizer)
    assert layout.grids == ((1, 5),) and layout.shape == (1, 5)
    indices = tokenizer.encode_indices(to_float(pixels(2)))
    assert torch.equal(layout.indices(layout.tokens(indices)), indices)
    assert layout.places.tolist() == [[1.0, column] for column in (1.0, 2.0, 3.0, 4.0, 5.0)]


def test_a_coarse_level_lies_in_the_middle_of_its_fine_positions() -> None:
    layout = layout_of(_tokenizer(CASES["two_level"]))
    top, bottom = layout.places.split([4, 16])
    fine = bottom.view(4, 4, 2)
    assert torch.equal(bottom[:5], torch.tensor([[1.0, 1], [1, 2], [1, 3], [1, 4], [2, 1]]))
    means = fine.unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2))
    assert torch.equal(top.view(2, 2, 2), means)


def test_one_softmax_has_at_most_16384_codes() -> None:
    for levels, sizes in (([8, 8, 8, 8, 4], (2**14,)), ([8, 8, 8, 8, 5], (8, 8, 8, 8, 5))):
        assert layout_of(_tokenizer({"type": "fsq", "levels": levels})).sizes == sizes
    assert layout_of(_tokenizer({"type": "bsq", "bits": 15})).sizes == (2,) * 15
    assert layout_of(_tokenizer(CODES_16), "digits").sizes == (2,) * 4


@pytest.mark.parametrize("case", CONTINUOUS)
def test_continuous_tokenizers_have_no_codes(case: str) -> None:
    with pytest.raises(ValueError, match="is continuous and has no codes: give one of fsq, vq"):
        layout_of(_tokenizer(CASES[case]))


def test_codes_that_have_no_digits_or_too_many_for_one_softmax() -> None:
    with pytest.raises(ValueError, match=r"12 codes of VQ have no digits: take --model\.split joint"):
        layout_of(_tokenizer(CASES["vq"]), "digits")
    with pytest.raises(ValueError, match=r"2097152 codes are too many for one softmax: take --model\.split digits"):
        layout_of(_tokenizer({"type": "bsq", "bits": 21, "entropy_group": 7}), "joint")


def test_codes_and_digits_that_do_not_exist() -> None:
    layout = CodeLayout(((2, 2),), ((3, 2),))
    good = torch.zeros(1, 2, 2, dtype=torch.int64)
    for wrong in (6, -1):
        with pytest.raises(ValueError, match=f"codes are {min(wrong, 0)} to {max(wrong, 0)}, there are 6"):
            layout.tokens(good.index_fill(2, torch.tensor([1]), wrong))
    for wrong in ([0, 2], [-1, 0], [3, 1]):
        with pytest.raises(ValueError, match="digits outside their sizes"):
            layout.indices(torch.tensor(wrong).expand(1, 4, 2))
    with pytest.raises(ValueError, match=r"indices have shape \(1, 4\); this prior takes \(B, 2, 2\)"):
        layout.tokens(good.flatten(1))
    with pytest.raises(ValueError, match=r"tokens have shape \(1, 4, 1\); this prior takes \(B, 4, 2\)"):
        layout.indices(torch.zeros(1, 4, 1, dtype=torch.int64))


def test_layouts_that_are_none() -> None:
    for grids, radices in (((), ((3,),)), (((2, 2),), ()), (((2, 2),), ((),)), (((0, 2),), ((3,),))):
        with pytest.raises(ValueError, match="give sizes of at least 1"):
            CodeLayout(grids, radices)
    with pytest.raises(ValueError, match="several levels are a sequence"):
        replace(CodeLayout(((1, 1), (2, 2)), ((3,),), flat=True), flat=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_stored_integers_of_any_type_and_no_images_at_all(dtype: torch.dtype) -> None:
    layout = CodeLayout(((2, 2),), ((3, 2), (3, 2)))
    assert layout.tokens(torch.full((1, 2, 2, 2), 5, dtype=dtype)).tolist() == [[[2, 1, 2, 1]] * 4]
    none = layout.tokens(torch.zeros(0, 2, 2, 2, dtype=dtype))
    assert none.shape == (0, 4, 4) and layout.indices(none).shape == (0, 2, 2, 2)
