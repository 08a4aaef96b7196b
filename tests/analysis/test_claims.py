"""Claims: that the file fits the grids, and that a mistake in it is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablations.grid import load
from analysis import claims
from analysis.claims import check_rows, load_claims
from analysis.verdicts import judge
from core.schema import UserError

FILE = claims.FILE


@pytest.mark.parametrize("scale", ["emoji", "tiny"])
def test_the_range_of_guidance_is_compared_with_its_middle(scale: str) -> None:
    methods = {cell.row: cell.config.method for cell in load("flash_guidance").expand(scale)}
    middle, drawn = methods["middle"], methods["range"]
    assert middle.guidance_min == middle.guidance_max == (drawn.guidance_min + drawn.guidance_max) / 2


def test_claims_fit_the_grids() -> None:
    for claim in load_claims(FILE):
        grid = load(claim.grid)
        check_rows(claim, grid)
        if claim.source.startswith("Flash Diffusion"):
            assert claim.nfe_in(grid) == 2, "Figure 5 is evaluated at 2 NFE"
        papers = [part.partition(",")[0] for part in grid.source.split("; ")]
        assert any(claim.source.startswith(paper) for paper in papers), claim.id
    ids = [claim.id for claim in load_claims(FILE)]
    assert len(ids) == len(set(ids)) >= 16


def test_one_margin_for_all_claims_of_a_metric() -> None:
    found: dict[str, set[float]] = {}
    for claim in load_claims(FILE):
        for contrast in claim.contrasts:
            if contrast.expected != "equal":
                found.setdefault(contrast.metric, set()).add(contrast.margin)
    assert len(found) >= 4 and all(len(margins) == 1 for margins in found.values())


@pytest.mark.parametrize(
    ("text", "changed", "named"),
    [
        ("expected: lower", "expected: less", "expected"),
        ("metric: kid", "metric: quality", "metric"),
        ("row: full", "row: fuller", "row"),
        ("versus: plain", "against: plain", "against"),
        ("expected: lower", "expected: lower, margin: 0.1", "margin"),
        ("seeds: 3", "seeds: 2", "seeds=2"),
        ("seeds: 3", "nfe: 2", "seeds"),
        ("seeds: 3", "seeds: 3\n  nfe: 3", "nfe"),
        ("kid: 0.02, ", "", "kid has no margin"),
        ("kid: 0.02", "quality: 0.02", "margins"),
    ],
)
def test_a_wrong_claim_is_one_line(full, tmp_path: Path, text: str, changed: str, named: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(claims.FILE.read_text().replace(text, changed))
    with pytest.raises(UserError, match=named) as error:
        judge(full.results(), load_claims(file))
    assert "\n" not in str(error.value)
