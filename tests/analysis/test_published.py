"""Published numbers keep their own column; the file holds what the sources state."""

from __future__ import annotations

import dataclasses

from analysis.published import published_numbers


def test_numbers_of_a_published_table(world) -> None:
    grid = dataclasses.replace(world.grid, published="table_2")
    published = published_numbers(dataclasses.replace(grid, source="Flash Diffusion, Table 2"))
    column = published.headings.index("published fid (sd15)")
    assert published.of("Flash Diffusion", 2)[column] == "12.27"
    assert published.of("LCM-LoRA", 4)[column] == "23.62"
    assert published.of("unknown row", 4) == ("",) * len(published.headings)


def test_tables_of_two_papers_with_one_name_are_kept_apart(world) -> None:
    grid = dataclasses.replace(world.grid, published="table_1")
    flash = published_numbers(dataclasses.replace(grid, source="Flash Diffusion, Table 1"))
    assert flash.of("Flash Diffusion", 4)[flash.headings.index("published fid (sd15)")] == "22.5"
    assert all("sdxl" not in heading for heading in flash.headings)


def test_a_figure_without_numbers_in_the_text_has_no_column(full) -> None:
    assert full.table().published_columns == ()
