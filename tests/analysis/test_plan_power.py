"""Plans of seeds: by the textbook where variances are known, and as the command prints them."""

from __future__ import annotations

import math

import pytest

from analysis.plan_power import chance, detectable, markdown, seeds_for
from analysis.spread import Kind, Spread
from experiments.cli import main

KNOWN = Spread(rows=99, variance=4.0, df=math.inf, correlation=0.0)  # sd 2


def test_with_a_known_variance_the_plan_is_the_normals() -> None:
    """(1.959964 + 0.841621) * 2 * sqrt(2 / n) is found in 80 of 100 cases."""
    assert detectable(KNOWN, 8) == pytest.approx(2.801585 * 2 * math.sqrt(2 / 8), rel=1e-5)
    assert chance(KNOWN, 0.0, 8) == pytest.approx(0.025, abs=1e-6)
    assert (seeds_for(KNOWN, 2.0), seeds_for(KNOWN, 0.1)) == (16, None)  # 15.7 seeds; more than 200


def test_what_seeds_have_in_common_counts_for_as_many_more() -> None:
    """Three quarters in common leave a quarter of the variance of a difference."""
    paired = Spread(rows=99, variance=4.0, df=math.inf, correlation=0.75)
    assert detectable(paired, 8) == pytest.approx(detectable(KNOWN, 8) / 2, rel=1e-6)


def test_a_grids_plan(full, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean 4.5: one sd of 0.2 and margins of 2% of it, 0.09."""
    monkeypatch.setattr("analysis.spread.SCALE", "tiny")
    spread = Spread(rows=9, variance=0.04, df=math.inf, correlation=0.0)
    text = markdown(full.results(), {Kind("flash/tiny", "kid", "train", 2): spread})
    found = 2.801585 * 0.2 * math.sqrt(2 / 4) / 4.5
    assert f"| 4.5 | 0.2 | 0.00 | {2.801585 * 0.2 * math.sqrt(2 / 3) / 4.5:.1%} | {found:.1%} |" in text
    assert f"| The term lowers FID | KID | training | 2% | 3 | {math.ceil(2 * (2.801585 * 0.2 / 0.09) ** 2)} |" in text


def test_only_what_is_recorded_has_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-power", "flash_losses", "--scale", "tiny"]) == 2
    assert "--scale emoji" in capsys.readouterr().err
