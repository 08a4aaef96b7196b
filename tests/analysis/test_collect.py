"""The frame: holes are lines, protocols and scales are not mixed, only final numbers count."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.collect import comparable
from analysis.keep_records import save_records
from core.schema import UserError


def _value(frame: pd.DataFrame, row: str, seed: int, nfe: int = 2, metric: str = "kid") -> pd.Series:
    part = frame[(frame["row"] == row) & (frame["seed"] == seed) & (frame["metric"] == metric) & (frame["nfe"] == nfe)]
    assert len(part) == 1, part
    return part.iloc[0]


def test_frame_has_a_line_for_every_planned_number(world) -> None:
    world.finish({("plain", 0): 0.004})
    frame = world.frame()
    assert len(frame) == (3 + 3) * 2 * 2 + 2  # cells x metrics x steps, and the teacher's two unknown numbers
    assert frame["value"].notna().sum() == 4
    line = _value(frame, "plain", 0)
    assert (line["value"], line["n"], line["state"], line["label"]) == (0.004, 100, "done", "$L_{distil}$")
    hole = _value(frame, "full", 2)
    assert hole["state"] == "planned" and hole["run"] == world.cells()["full", 2].id


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_unfinished_run_has_no_numbers(world, state) -> None:
    run = world.run(world.cells()["plain", 0], state)
    world.measure(run, "kid", 0.1)
    assert pd.isna(_value(world.frame(), "plain", 0)["value"])


def test_only_the_end_of_the_budget_and_the_configured_weights_count(world) -> None:
    run = world.run(world.cells()["plain", 0])
    world.measure(run, "kid", 0.9, images=16)
    world.measure(run, "kid", 0.1)
    world.measure(run, "kid", 0.2, weights="ema")
    assert _value(world.frame(), "plain", 0)["value"] == 0.1


def test_mixed_protocols_are_refused_with_both_runs_and_the_field(world) -> None:
    cells = world.cells()
    world.measure(world.run(cells["plain", 0]), "kid", 0.1)
    world.measure(world.run(cells["full", 0]), "kid", 0.1, judge_hash="other")
    with pytest.raises(UserError) as error:
        comparable(world.frame())
    assert "mixes protocols" in str(error.value) and "judge_hash" in str(error.value)
    assert cells["plain", 0].id in str(error.value) and cells["full", 0].id in str(error.value)


def test_rows_may_differ_in_how_they_were_sampled(world) -> None:
    cells = world.cells()
    world.measure(world.run(cells["plain", 0]), "kid", 0.1, guidance=1.0, solver="lcm")
    world.measure(world.run(cells["teacher", 0]), "kid", 0.2, steps=50, guidance=4.0, solver="ddim")
    assert comparable(world.frame())["value"].notna().sum() == 2


def test_a_row_shows_the_numbers_of_its_own_sampler(world) -> None:
    cells = world.cells()
    run = world.run(cells["plain", 0])
    world.measure(run, "kid", 0.1, solver="ddim")
    assert comparable(world.frame())["value"].notna().sum() == 0
    world.measure(run, "kid", 0.2)
    assert _value(comparable(world.frame()), "plain", 0, nfe=2)["value"] == 0.2


def test_the_protocol_that_all_runs_share_is_taken(world) -> None:
    cells = world.cells()
    teacher = world.run(cells["teacher", 0])
    world.measure(teacher, "kid", 0.1, steps=50)
    world.measure(teacher, "kid", 0.2, steps=50, judge_hash="newer")
    world.measure(world.run(cells["plain", 0]), "kid", 0.3)
    frame = comparable(world.frame())
    assert _value(frame, "teacher", 0, nfe=100)["value"] == 0.1


def test_a_run_shared_by_two_budgets_shows_each_its_own_sizes(world) -> None:
    full, demo = (world.cells(budget)["teacher", 0] for budget in ("full", "demo"))
    assert full.id == demo.id
    world.measure(world.run(full), "kid", 0.1, steps=50)
    world.measure(world.run(demo), "kid", 0.2, steps=50)
    assert [_value(world.frame(b), "teacher", 0, nfe=100)["value"] for b in ("full", "demo")] == [0.1, 0.2]


def test_a_record_completes_a_run_that_was_measured_otherwise(full, tmp_path: Path) -> None:
    """A demo measures the teacher anew on fewer images; the full table still finds its record."""
    from analysis.collect import cell_runs

    records = tmp_path / "records"
    save_records(cell_runs(full.grid, "tiny", "full", [full.runs]), records)
    other = tmp_path / "elsewhere"
    full.runs = other
    run = full.run(full.cells()["teacher", 0])
    full.measure(run, "kid", 0.9, steps=50, num_images=10)
    frame = comparable(full.frame("full", records))
    assert _value(frame, "teacher", 0, nfe=100)["value"] == 0.0036


@pytest.mark.parametrize("key", ["scale", "budget"])
def test_mixed_scales_and_budgets_are_refused(full, key) -> None:
    frame = full.frame()
    with pytest.raises(UserError, match=f"numbers of {key} .* may not stand in one table"):
        comparable(pd.concat([frame, frame.assign(**{key: "other"})]))


def test_number_without_provenance_is_refused(full) -> None:
    file = next(full.runs.rglob("provenance.json"))
    file.write_text("{")
    with pytest.raises(UserError, match="provenance.json: absent or damaged"):
        full.frame()
