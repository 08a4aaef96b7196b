"""Published numbers keep their own column; the file holds what the sources state."""

from __future__ import annotations

import dataclasses

from ablations.grid import load
from analysis.collect import results
from analysis.published import published_numbers
from analysis.render import to_markdown
from analysis.tables import build_table


def test_numbers_of_a_published_table(world) -> None:
    grid = dataclasses.replace(world.grid, published="table_2")
    published = published_numbers(dataclasses.replace(grid, source="Flash Diffusion, Table 2"), "paper")
    column = published.headings.index("published FID (sd15)")
    assert published.of("Flash Diffusion", 2)[column] == "12.27"
    assert published.of("LCM-LoRA", 4)[column] == "23.62"
    assert published.of("unknown row", 4) == ("",) * len(published.headings)


def test_tables_of_two_papers_with_one_name_are_kept_apart(world) -> None:
    grid = dataclasses.replace(world.grid, published="table_1")
    flash = published_numbers(dataclasses.replace(grid, source="Flash Diffusion, Table 1"), "paper")
    assert flash.of("Flash Diffusion", 4)[flash.headings.index("published FID (sd15)")] == "22.5"
    assert all("sdxl" not in heading for heading in flash.headings)


def test_a_figure_without_numbers_in_the_text_has_no_column(full) -> None:
    assert full.table().published_columns == ()


def test_published_rows_and_holes_stand_together_at_paper_scale(world) -> None:
    """Nobody has SD1.5's data here: our rows are holes that say so, and the paper's numbers keep their digits."""
    of = results(load("few_steps"), "paper", "full", [world.runs])
    table = build_table(of)
    assert table.panels[0].split == "val" and [c.metric for c in table.columns][:2] == ["fid", "clip_score"]
    text = to_markdown(table)
    hole = "missing flash/sd15"
    assert f"| Flash Diffusion | 2 | {hole} | {hole} | {hole} | {hole} | 0 | 22.6 | 0.306 | 26.4 | 26 |" in text
    assert "| InstaFlow | 1 |  |  |  |  |  | 23.4 | 0.304 | 900 |  |" in text
    assert "flash/sd15 (row flash, seed 1): data.path is not set; give data.path=FOLDER" in text
    assert "| published FID (sd15) | published CLIP score (sd15) | published Trainable parameters (M) (sd15) |" in text
    assert "| published GPU-hours (H100) (sd15) |" in text
    assert table.entries and not any(entry.best for entry in table.entries)


def test_published_numbers_never_stand_beside_another_scale() -> None:
    assert published_numbers(load("few_steps"), "emoji").headings == ()
