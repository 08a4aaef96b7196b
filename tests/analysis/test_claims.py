"""Claims: verdicts by value, what would decide, and that the file fits the grids."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from ablations.grid import load
from analysis import claims
from analysis.claims import Claim, Comparison, Contrast, judge, load_claims
from analysis.columns import column
from analysis.render import expected, judgements_markdown, render, verdict
from analysis.stats import summarize
from core.schema import UserError

FILE = claims.FILE


def comparison(differences: list[float], expected: str, allowed: float = 0.0) -> Comparison:
    contrast = Contrast("a", "b", "kid", expected, margin=0.1)
    claim = Claim("c", "A is so", "A paper", "g", (contrast,))
    return Comparison(claim, contrast, "a − b", "train", 2, column("kid"), summarize(differences), allowed)


@pytest.mark.parametrize(
    ("differences", "expected", "verdict"),
    [
        ([-1.0, -1.1, -0.9], "lower", "reproduced"),
        ([-1.0, -1.1, -0.9], "higher", "contradicted"),
        ([-1.0, -1.1, 2.0], "lower", "inconclusive"),
        ([-1.0, -1.01], "lower", "inconclusive"),  # two seeds decide nothing, however near to each other
        ([-1.0], "lower", "inconclusive"),
        ([], "lower", "no data"),
        ([0.01, -0.02, 0.02], "equal", "reproduced"),
        ([1.0, 1.1, 0.9], "equal", "contradicted"),
        ([0.3, -0.4, 0.2], "equal", "inconclusive"),
    ],
)
def test_verdict_of_a_contrast(differences: list[float], expected: str, verdict: str) -> None:
    assert comparison(differences, expected, allowed=0.5 if expected == "equal" else 0.0).verdict == verdict


def test_an_undecided_contrast_says_how_many_seeds_would_decide() -> None:
    # mean -0.5, sd 0.5: t(.975, n-1) 0.5 / sqrt(n) < 0.5 needs n = 7 (2.4469 / sqrt(7) = 0.925; n = 6: 1.049)
    assert comparison([-1.0, -0.5, 0.0], "lower").seeds_needed == 7
    assert comparison([-0.5], "lower").seeds_needed is None
    assert comparison([-1.0, -1.01], "lower").seeds_needed == 3
    # within 0.6 of zero: 0.1 is left to the nearer border
    assert comparison([-1.0, -0.5, 0.0], "equal", allowed=0.6).seeds_needed is None


def test_the_paired_difference_stands_in_the_table(full) -> None:
    (judgement,) = full.table().judgements
    (found,) = judgement.comparisons
    assert found.difference.mean == pytest.approx(-1.0) and found.difference.n == 3  # kid is shown times 1000
    assert judgement.verdict == "reproduced" and judgement.seeds == 3
    assert (
        "| The term lowers FID | training | KID of L_distil + L_DMD − L_distil at 2 NFE: −1.00 [−1.25, −0.75]"
        in render(full.table(), "md")
    )


def test_one_seed_leans_but_decides_nothing(world) -> None:
    world.finish({("plain", 0): 0.004, ("full", 0): 0.005})
    (judgement,) = judge(world.results())
    assert verdict(judgement) == "inconclusive (leans against; needs at least 3 seeds)"


def test_a_claim_needs_all_of_its_contrasts(full) -> None:
    contrasts = (Contrast("full", "plain", "kid", "lower"), Contrast("full", "plain", "clip_score", "higher"))
    claim = Claim("two", "Better in both", "A paper", "influence", contrasts)
    (judgement,) = judge(full.results(), [claim])
    assert [c.verdict for c in judgement.comparisons] == ["reproduced", "contradicted"]  # both fall by 0.001
    assert judgement.verdict == "contradicted"


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
    contrasts = tuple(Contrast("full", "plain", metric, "higher") for metric in names)
    (judgement,) = judge(full.results(), [Claim("x", "x", "x", "influence", contrasts)])
    assert judgement.comparisons[0].difference.mean == pytest.approx(2.0)  # 12 against 10 for each image
    assert [c.at for c in judgement.comparisons] == ["", ""]
    assert judgement.comparisons[1].difference.mean > 0


def test_a_claim_about_training_logs_is_judged_once(full) -> None:
    grid = dataclasses.replace(full.grid, layout=dataclasses.replace(full.grid.layout, splits=("train", "heldout")))
    of = dataclasses.replace(full.results(), grid=grid)
    logs = (Contrast("full", "plain", "gradient_variation", "lower"),)
    mixed = (*logs, Contrast("full", "plain", "kid", "lower"))
    for contrasts, splits in ((logs, [""]), (mixed, ["train", "heldout"])):
        assert [j.split for j in judge(of, [Claim("x", "x", "x", "influence", contrasts)])] == splits


def test_a_margin_without_a_number_to_take_it_of_is_a_share() -> None:
    assert expected(comparison([], "equal", allowed=math.nan)) == "0 ± 10%"
    assert expected(comparison([0.01], "equal", allowed=0.085)) == "0 ± 0.085"


@pytest.mark.parametrize("scale", ["emoji", "tiny"])
def test_the_range_of_guidance_is_compared_with_its_middle(scale: str) -> None:
    methods = {cell.row: cell.config.method for cell in load("flash_guidance").expand(scale)}
    middle, drawn = methods["middle"], methods["range"]
    assert middle.guidance_min == middle.guidance_max == (drawn.guidance_min + drawn.guidance_max) / 2


def test_claims_fit_the_grids() -> None:
    for claim in load_claims(FILE):
        grid = load(claim.grid)
        claims._check_rows(claim, grid)
        if claim.source.startswith("Flash Diffusion"):
            assert grid.layout.nfe[0] == 2, "Figure 5 is evaluated at 2 NFE"
        papers = [part.partition(",")[0] for part in grid.source.split("; ")]
        assert any(claim.source.startswith(paper) for paper in papers), claim.id
    ids = [claim.id for claim in load_claims(FILE)]
    assert len(ids) == len(set(ids)) >= 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("expected: lower", "expected: less"),
        ("metric: kid", "metric: quality"),
        ("row: full", "row: fuller"),
        ("versus: plain", "against: plain"),
    ],
)
def test_a_wrong_claim_is_one_line(full, tmp_path: Path, changed: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(claims.FILE.read_text().replace(changed, message))
    with pytest.raises(UserError, match=message.split(": ")[0 if "against" in message else 1]) as error:
        judge(full.results(), load_claims(file))
    assert "\n" not in str(error.value)


def test_claims_as_markdown(full) -> None:
    text = judgements_markdown(judge(full.results()))
    assert text.count("\n") == 2 and text.endswith("| below 0 | 3 | reproduced |")
