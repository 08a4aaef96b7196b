"""Verdicts by value: each of them, what would decide, and what many judgements together leave of them."""

from __future__ import annotations

import dataclasses
import math

import pytest
from scipy import stats

from analysis import spread
from analysis.claims import Claim, Contrast
from analysis.columns import column
from analysis.inference import paired
from analysis.render import claims_markdown, expected, judgements_markdown, p_value, render, verdict
from analysis.verdicts import Comparison, Judgement, counts, judge, with_rates


def comparison(differences: list[float], expected: str, allowed: float = 0.05) -> Comparison:
    contrast = Contrast("a", "b", "kid", expected, margin=0.1)
    claim = Claim("c", "A is so", "A paper", "g", 3, (contrast,))
    found = paired(differences)
    return Comparison(
        claim, contrast, "a − b", "train", 2, column("kid"), len(differences), found, found, found, allowed
    )


def judgement(*comparisons: Comparison) -> Judgement:
    return Judgement(comparisons[0].claim, "train", comparisons)


LOWER, HIGHER, SAME = [-1.0, -1.1, -0.9], [1.0, 1.1, 0.9], [0.01, -0.01, 0.02]
UNCLEAR, SMALL = [-1.0, -1.1, 2.0], [-0.010, -0.011, -0.009]


@pytest.mark.parametrize(
    ("differences", "expected", "verdict"),
    [
        (LOWER, "lower", "reproduced"),
        (LOWER, "higher", "contradicted"),
        (UNCLEAR, "lower", "inconclusive"),
        (SMALL, "lower", "decided but negligible"),
        (SMALL, "higher", "decided but negligible"),
        (SAME, "lower", "negligible"),
        ([-1.0, -1.01], "lower", "inconclusive"),  # two seeds decide nothing, however near to each other
        ([-1.0], "lower", "inconclusive"),
        ([], "lower", "no data"),
        ([0.01, -0.02, 0.02], "equal", "reproduced"),
        (HIGHER, "equal", "contradicted"),
        ([0.3, -0.4, 0.2], "equal", "inconclusive"),
    ],
)
def test_verdict_of_a_contrast(differences: list[float], expected: str, verdict: str) -> None:
    assert comparison(differences, expected).verdict == verdict
    assert judgement(comparison(differences, expected)).verdict == verdict


@pytest.mark.parametrize(
    ("contrasts", "verdict"),
    [
        ((LOWER, LOWER), "reproduced"),
        ((LOWER, UNCLEAR), "inconclusive"),
        ((LOWER, HIGHER), "contradicted"),
        ((LOWER, SAME), "negligible"),
        ((LOWER, SMALL), "decided but negligible"),
        ((UNCLEAR, HIGHER), "contradicted"),
    ],
)
def test_a_claim_needs_all_of_its_contrasts(contrasts: tuple[list[float], ...], verdict: str) -> None:
    assert judgement(*(comparison(differences, "lower") for differences in contrasts)).verdict == verdict


def test_a_contradiction_by_one_of_many_is_as_rare_as_a_reproduction_by_all() -> None:
    """p of 1.0, 1.3, 0.7 is .0286 on either side: it decides alone, but not as one of two."""
    above = comparison([1.0, 1.3, 0.7], "lower")
    assert above.evidence.contrary == pytest.approx(stats.ttest_1samp([1.0, 1.3, 0.7], 0).pvalue, rel=1e-9)
    assert above.verdict == "contradicted"
    assert judgement(above, comparison(UNCLEAR, "lower")).verdict == "inconclusive"
    assert judgement(above, comparison(UNCLEAR, "lower")).evidence.contrary == 2 * above.evidence.contrary


def test_many_judgements_together_are_held_to_a_rate() -> None:
    """p = .0286 alone is decided; among nine of p about .5 its rate is 10 times as large."""
    lone = judgement(comparison([1.0, 1.3, 0.7], "higher"))
    crowd = [judgement(comparison(UNCLEAR, "lower"))] * 9
    (alone,) = with_rates([lone])
    assert alone.verdict_together == "reproduced" and alone.q == pytest.approx(lone.evidence.p)
    first, *_ = with_rates([lone, *crowd])
    assert first.verdict == "reproduced" and first.verdict_together == "inconclusive"
    assert first.q == pytest.approx(10 * lone.evidence.p)
    assert counts([first, *crowd], together=True) == {"inconclusive": 10}


def test_an_undecided_contrast_says_how_many_seeds_would_find_it() -> None:
    """A difference as large as its sd is found by ten seeds in 80.3% of cases, by nine in 75.0%."""
    assert comparison([-1.0, -0.5, 0.0], "lower").seeds_needed == 10
    assert comparison([-0.5], "lower").seeds_needed is None
    assert comparison([-1.0, -1.01], "lower").seeds_needed == 3


def test_the_difference_stands_in_the_table(full) -> None:
    (found,) = full.table().judgements
    (only,) = found.comparisons
    assert only.estimate.mean == pytest.approx(-1.0) and only.seeds == 3  # kid is shown times 1000
    assert found.verdict == "reproduced" and found.seeds == 3
    assert (
        "| The term lowers FID | training | KID of L_distil + L_DMD − L_distil at 2 NFE: −1.00 [−1.25, −0.75]"
        in render(full.table(), "md")
    )


def test_one_seed_leans_but_decides_nothing(world) -> None:
    world.finish({("plain", 0): 0.004, ("full", 0): 0.005})
    (found,) = judge(world.results())
    assert verdict(found) == "inconclusive (leans against it; needs at least 3 seeds)"
    assert "| 1 of 3 |" in judgements_markdown([found])


def test_seeds_beyond_the_plan_do_not_count(full) -> None:
    claim = Claim("x", "x", "x", "influence", 3, (Contrast("full", "plain", "kid", "lower", 0.02),))
    (planned,) = judge(full.results(), [claim])
    (fewer,) = judge(full.results(), [dataclasses.replace(claim, seeds=2)])
    assert planned.seeds == 3 and fewer.seeds == 2
    assert fewer.comparisons[0].estimate.mean == pytest.approx((-0.9 - 1.1) / 2)


def test_a_seed_that_diverged_is_as_bad_as_the_worst(full) -> None:
    """Seed 0 of ``full`` diverges: it counts with the worst of all rows, 6, against ``plain``'s 4."""
    run = full.run(full.cells()["full", 0], state="diverged")
    assert run.state() == "diverged"
    (found,) = judge(full.results())
    assert found.comparisons[0].estimate.mean == pytest.approx((6 - 4 - 1.1 - 1.0) / 3)


def test_a_kind_with_a_known_spread_borrows_from_it(full, monkeypatch) -> None:
    """Variances 0.01 of two degrees of freedom and 0.04 of six: (6 * 0.04 + 2 * 0.01) / 8."""
    known = {spread.Kind("flash/tiny", "kid", "train", 2): spread.Spread(9, 0.4, 6.0, 0.95)}
    monkeypatch.setattr(spread, "SCALE", "tiny")
    monkeypatch.setattr(spread, "load", lambda: known)
    (found,) = judge(full.results())
    estimate = found.comparisons[0].estimate
    assert (estimate.df, estimate.error) == (8, pytest.approx(math.sqrt((6 * 0.04 + 2 * 0.01) / 8 / 3)))
    assert found.comparisons[0].within_seeds.error == pytest.approx(0.1 / math.sqrt(3))


def test_costs_and_training_logs_are_judged_too(full) -> None:
    for (row, seed), cell in full.cells().items():
        run = full.run(cell)
        for images in (8, 16, 24, 32):
            norm = {"plain": 1.0, "full": 1.0 + images % 16}.get(row, 0.0)
            facts = {
                "device_hours": 1.0,
                "evaluations": {"teacher": 10 * images},
                "stored_evaluations": (row == "full") * 2 * images,
            }
            line = {"attempt": 1, "images": images, "student/grad_norm": norm + seed, **facts}
            run.append_metrics(line)
    names = ("teacher_evaluations", "gradient_variation")
    contrasts = tuple(Contrast("full", "plain", metric, "higher", 0.02) for metric in names)
    (found,) = judge(full.results(), [Claim("x", "x", "x", "influence", 3, contrasts)])
    assert found.comparisons[0].estimate.mean == pytest.approx(2.0)  # 12 against 10 for each image
    assert [c.at for c in found.comparisons] == ["", ""]
    assert found.comparisons[1].estimate.mean > 0


def test_a_claim_about_training_logs_is_judged_once(full) -> None:
    grid = dataclasses.replace(full.grid, layout=dataclasses.replace(full.grid.layout, splits=("train", "heldout")))
    of = dataclasses.replace(full.results(), grid=grid)
    logs = (Contrast("full", "plain", "gradient_variation", "lower", 0.05),)
    mixed = (*logs, Contrast("full", "plain", "kid", "lower", 0.02))
    for contrasts, splits in ((logs, [""]), (mixed, ["train", "heldout"])):
        claim = Claim("x", "x", "x", "influence", 3, contrasts)
        assert [j.split for j in judge(of, [claim])] == splits


def test_a_margin_without_a_number_to_take_it_of_is_a_share() -> None:
    assert expected(comparison([], "equal", allowed=math.nan)) == "0 ± 10%"
    assert expected(comparison([0.01], "equal", allowed=0.085)) == "0 ± 0.085"


def test_claims_as_markdown(full) -> None:
    found = judge(full.results())
    text = judgements_markdown(found)
    assert text.count("\n") == 2 and text.endswith("| below 0 | 3 | reproduced |")
    full_text = claims_markdown(with_rates(found))
    p = stats.ttest_1samp([-0.9, -1.1, -1.0], 0).pvalue
    assert f"| 3 | reproduced | {p_value(p)} | {p_value(p)} | " in full_text
    assert "Each by itself: 1 reproduced" in full_text


@pytest.mark.parametrize(("p", "text"), [(0.0321, ".032"), (0.0001, "<.001"), (1.0, "1"), (math.nan, "")])
def test_p_values_as_papers_print_them(p: float, text: str) -> None:
    assert p_value(p) == text
