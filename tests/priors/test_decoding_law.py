"""The law of what is drawn, by enumeration of every draw: with exact conditionals it is the law that they are of."""

import math

import pytest
import torch
from enumerating import (
    Script,
    Table,
    TableCausal,
    TableMasked,
    divergence,
    entropy,
    every_code,
    law_drawn,
    random_joint,
    scripts,
    total_variation,
)
from tensors import randomised
from torch import Tensor

from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.decoding import Decoding, Rule
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.masked import decode

FOUR = CodeLayout(((2, 2),), ((3,),))
DIGITS = CodeLayout(((1, 3),), ((2, 2),))
BITS = CodeLayout(((1, 2),), ((2,),))


def _table(layout: CodeLayout) -> Table:
    return Table(layout, random_joint(layout))


def _law(table: Table, rule: Rule, steps: int | None = None, shuffled: bool = False, attempts: int = 1) -> Tensor:
    script = scripts(table.layout, attempts, shuffled)
    how = Decoding(rule, steps, choice_noise=0)
    return law_drawn(table.layout, decode(table, len(script.outcomes), script, how), script)


@pytest.mark.parametrize("layout", [FOUR, DIGITS])
def test_a_causal_prior_draws_from_the_law_of_its_conditionals(layout: CodeLayout) -> None:
    table = _table(layout)
    script = scripts(layout)
    tokens = TableCausal(table).draw(torch.zeros(len(script.outcomes), dtype=torch.int64), script, Decoding())
    assert total_variation(law_drawn(layout, tokens, script), table.joint) < 1e-12


def test_any_causal_prior_has_the_law_of_its_bits() -> None:
    """By enumeration, digit by digit, 2^-bits."""
    prior = randomised(CausalPrior(PriorConfig("causal", "digits", 16, 2, 2), DIGITS, 3), std=0.3).double()
    script, labels = scripts(DIGITS), torch.full((64,), 2)
    law = law_drawn(DIGITS, prior.draw(labels, script, Decoding()), script)
    expected = torch.exp2(-prior.bits(every_code(DIGITS), labels))
    assert torch.allclose(law, expected, rtol=1e-10) and float(law.sum()) == pytest.approx(1, abs=1e-12)
    assert float(law.max() / law.min()) > 10


@pytest.mark.parametrize("layout", [FOUR, DIGITS])
@pytest.mark.parametrize("rule", ["random", "halton", "certain"])
def test_one_evaluation_a_token_draws_from_the_law_of_the_conditionals(rule: Rule, layout: CodeLayout) -> None:
    table = _table(layout)
    shuffled = rule == "random"
    script = scripts(layout, shuffled=shuffled)
    tokens = decode(table, len(script.outcomes), script, Decoding(rule))
    assert total_variation(law_drawn(layout, tokens, script), table.joint) < 1e-12
    if script.orders is not None:  # in each order by itself
        orders = math.factorial(layout.length)
        for first in range(orders):
            own = Script(script.outcomes[first::orders], layout.sizes, script.orders[first::orders])
            drawn = decode(table, len(own.outcomes), own, Decoding(rule))
            own.orders = None
            assert total_variation(law_drawn(layout, drawn, own), table.joint) < 1e-12


def test_the_law_approaches_that_of_the_conditionals_with_every_evaluation() -> None:
    table = _table(FOUR)
    away = [divergence(table.joint, _law(table, "random", steps, shuffled=True)) for steps in (1, 2, 3, 4)]
    assert away[0] > 2 * away[1] > 2 * away[2] > 1e-2  # 4; 2, 2; 1, 1, 2 tokens each
    assert abs(away[3]) < 1e-12
    marginals = torch.einsum("c,clk->lk", table.joint, table.one_hot)
    product = torch.einsum("a,b,c,d->abcd", *marginals).flatten()
    assert total_variation(_law(table, "random", 1, shuffled=True), product) < 1e-12
    assert total_variation(_law(table, "maskgit", 1), product) < 1e-12


def test_the_rule_of_maskgit_prefers_what_is_probable() -> None:
    """Two independent bits, .9 and .5: after a draw of both the more probable one stays, so the first is 0 with .9 + .1 x .9."""
    joint = torch.tensor([0.45, 0.45, 0.05, 0.05], dtype=torch.float64)
    law = _law(Table(BITS, joint), "maskgit", 2, attempts=2)
    assert float(law[:2].sum()) == pytest.approx(0.99, abs=1e-12)
    for rule in ("random", "certain", "halton"):
        assert float(_law(Table(BITS, joint), rule, 2)[:2].sum()) == pytest.approx(0.9, abs=1e-12)


def test_the_bound_of_a_masked_prior_is_the_probability_where_conditionals_are_exact() -> None:
    """For each code, on average over all masks; on average over codes the entropy."""
    for layout in (FOUR, DIGITS):
        table = _table(layout)
        script = scripts(layout, shuffled=True)
        labels = torch.zeros(len(script.outcomes), dtype=torch.int64)
        bits = TableMasked(table).bits(script.outcomes[:, 0], labels, script, layout.length)
        mean = bits.view(-1, math.factorial(layout.length)).mean(1)
        assert torch.allclose(mean, -table.joint.log2(), atol=1e-12)
        assert float((table.joint * mean).sum()) == pytest.approx(entropy(table.joint), abs=1e-12)


def test_exact_bits_are_those_of_the_law() -> None:
    for layout in (FOUR, DIGITS):
        table, codes = _table(layout), every_code(layout)
        bits = TableCausal(table).bits(codes, torch.zeros(len(codes), dtype=torch.int64))
        assert torch.allclose(bits, -table.joint.log2(), atol=1e-12)
