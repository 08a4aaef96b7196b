"""Grids expand to runs: rows, axes, seeds, budgets, parents, references."""

import itertools
from collections import Counter
from pathlib import Path

import pytest

from ablations.grid import Grid, load, names
from core import config
from core.config import UserError, compose, resolve, run_id

HEAD = """
title: T
base: {tiny: flash/tiny}
seeds: [0, 1]
"""
NO_DATA = "data.path: 'random:x'"


def grid(tmp_path: Path, text: str) -> Grid:
    head = HEAD.replace("base: {tiny: flash/tiny}\n", "") if "base:" in text else HEAD
    (tmp_path / "g.yaml").write_text(head + text)
    return load(str(tmp_path / "g.yaml"))


def test_cell_id_is_that_of_the_command_it_runs(tmp_path: Path) -> None:
    rows = f"rows: [{{id: a, set: {{{NO_DATA}, method.dmd_weight: [0, 0, 0, 1]}}}}]"
    cells = grid(tmp_path, rows).expand("tiny")
    assert [(cell.row, cell.seed) for cell in cells] == [("a", 0), ("a", 1)]
    for cell in cells:
        command = resolve(compose(cell.experiment, cell.overrides))
        assert run_id(command) == cell.id and command == cell.config
        assert cell.config.method.dmd_weight == [0.0, 0.0, 0.0, 1.0] and cell.config.seed == cell.seed


def test_axes_as_product_with_exclusion(tmp_path: Path) -> None:
    text = f"""
axes:
  K: {{method.num_timesteps: [8, 16]}}
  batch: {{train.batch_size: [4, 8], train.budget.amount: [32, 64]}}
exclude: [{{method.num_timesteps: 16, train.batch_size: 8}}]
budgets: {{full: {{seeds: [5], set: {{{NO_DATA}}}}}}}
"""
    made = grid(tmp_path, text)
    points = [(c.config.method.num_timesteps, c.config.train.batch_size, c.config.train.budget.amount)
              for c in made.expand("tiny")]  # fmt: skip
    assert points == [(8, 4, 32), (8, 8, 64), (16, 4, 32)]
    assert made.rows[0].label == "K = 8, batch = 4, 32"


def test_axes_as_zip(tmp_path: Path) -> None:
    text = f"""
combine: zip
axes: {{K: {{method.num_timesteps: [8, 16]}}, w: {{method.guidance_min: [1, 2]}}}}
budgets: {{full: {{seeds: [0], set: {{{NO_DATA}}}}}}}
"""
    cells = grid(tmp_path, text).expand("tiny")
    methods = [cell.config.method for cell in cells]
    assert [(m.num_timesteps, m.guidance_min) for m in methods] == [(8, 1.0), (16, 2.0)]


def test_a_row_may_have_values_of_its_scale(tmp_path: Path) -> None:
    rows = f"rows: [{{id: a, set: {{{NO_DATA}}}, at: {{tiny: {{method.num_timesteps: 16}}}}}}]"
    cells = grid(tmp_path, rows).expand("tiny")
    assert [cell.config.method.num_timesteps for cell in cells] == [16, 16]
    with pytest.raises(UserError, match="row a: at=emoji is unknown; allowed: tiny"):
        grid(tmp_path, rows.replace("at: {tiny", "at: {emoji"))


def test_equal_rows_are_one_run(tmp_path: Path) -> None:
    same = f"{NO_DATA}, method.mixture_variance: 0.5"
    rows = f"rows: [{{id: a, set: {{{NO_DATA}}}}}, {{id: b, set: {{{same}}}}}]"
    cells = grid(tmp_path, rows).expand("tiny")
    assert len(cells) == 4 and len({cell.id for cell in cells}) == 2


def test_child_follows_its_parent_of_the_same_seed(tmp_path: Path) -> None:
    rows = f"rows: [{{id: b, parent: a, set: {{{NO_DATA}}}}}, {{id: a, set: {{{NO_DATA}}}}}]"
    cells = grid(tmp_path, rows).expand("tiny")
    by_row = {(cell.row, cell.seed): cell for cell in cells}
    for seed in (0, 1):
        assert by_row["b", seed].parents == (by_row["a", seed].id,)
        assert by_row["b", seed].config.train.parent == by_row["a", seed].id
        assert cells.index(by_row["a", seed]) < cells.index(by_row["b", seed])


def test_a_changed_round_is_another_run_and_so_are_its_descendants_alone(tmp_path: Path) -> None:
    def ids(steps: int) -> dict[str, str]:
        later = "method.teacher: parent, method.teacher_steps"
        rows = f"""
rows:
  - {{id: last, parent: second, set: {{{NO_DATA}, {later}: 2, method.student_steps: 1}}}}
  - {{id: second, parent: first, set: {{{NO_DATA}, {later}: {steps}, method.student_steps: 2}}}}
  - {{id: first, set: {{{NO_DATA}}}}}
  - {{id: beside, parent: first, set: {{{NO_DATA}, {later}: 4, method.student_steps: 1}}}}
"""
        cells = grid(tmp_path, rows.replace("rows:", "base: {tiny: progressive/tiny}\nrows:")).expand("tiny")
        order = [cell.row for cell in cells if cell.seed == 0]
        assert order.index("first") < order.index("second") < order.index("last")
        return {cell.row: cell.id for cell in cells if cell.seed == 0}

    before, after = ids(4), ids(3)
    assert {row for row in before if before[row] != after[row]} == {"second", "last"}


def test_budget_changes_training_but_references_are_only_measured(tmp_path: Path) -> None:
    text = f"""
rows: [{{id: a, set: {{{NO_DATA}}}}}]
references: [{{id: t, experiment: {{tiny: teacher/tiny}}, set: {{{NO_DATA}}}}}]
budgets: {{full: {{}}, demo: {{seeds: [0], set: {{train.budget.amount: 16, eval.num_images: 4}}}}}}
"""
    made = grid(tmp_path, text)
    full, demo = made.expand("tiny"), made.expand("tiny", "demo")
    assert Counter(c.row for c in full) == {"a": 2, "t": 1}
    assert Counter(c.row for c in demo) == {"a": 1, "t": 1}
    assert full[0].id != demo[0].id and demo[0].config.train.budget.amount == 16
    assert full[-1].id == demo[-1].id and demo[-1].config.eval.num_images == 4


def test_a_machine_says_where_things_lie_but_not_what_a_cell_is(tmp_path: Path) -> None:
    rows = f"rows: [{{id: a, set: {{{NO_DATA}}}}}]"
    usual, here = grid(tmp_path, rows), load(str(tmp_path / "g.yaml"), ["execution.cache_dir=/tmp/x"])
    assert [cell.id for cell in usual.expand("tiny")] == [cell.id for cell in here.expand("tiny")]
    assert {cell.config.execution.cache_dir for cell in here.expand("tiny")} == {"/tmp/x"}
    moved = load(str(tmp_path / "g.yaml"), ["data.path=random:y"]).expand("tiny")
    assert {cell.config.data.data_hash for cell in moved} == {"random:y"}
    with pytest.raises(UserError, match="--set train.batch_size=8: a grid's cells are what its file says; allowed: "):
        load(str(tmp_path / "g.yaml"), ["train.batch_size=8"])


@pytest.mark.parametrize("name", names())
def test_every_grid_expands_at_each_of_its_scales(name: str) -> None:
    made = load(name, ["data.path=random:x"])
    for scale, budget in itertools.product(made.base, made.budgets):
        cells = made.expand(scale, budget)
        assert {cell.row for cell in cells} == {row.id for row in (*made.rows_of(budget), *made.references)}


def test_the_figure_s_grids_share_the_runs_of_the_usual_settings() -> None:
    grids = [load(name) for name in names() if name.startswith("flash_")]
    shared = [{cell.id for cell in grid.expand("emoji")} for grid in grids if grid.base.get("emoji") == "flash/emoji"]
    usual = {run_id(resolve(compose("flash/emoji", ["seed=0"])))}
    assert len(shared) >= 8 and set.intersection(*shared) == usual


def test_a_budget_may_leave_rows_out() -> None:
    made = load("flash_losses", ["data.path=random:x"])
    rows = {budget: {cell.row for cell in made.expand("tiny", budget)} for budget in made.budgets}
    assert rows["full"] - rows["demo"] == {"adv-dmd"}
    assert made.expand("tiny", "full")[-2].config.method.distill_weight == 0  # before the reference: adv-dmd


@pytest.mark.parametrize("scale", ["emoji", "paper", "tiny"])
def test_each_component_of_flash_dmd_is_alone_in_its_row(scale: str) -> None:
    """Timestep split, critic on decoded images, average in the score; the DMD2 rows are dmd2's own runs."""
    cells = {c.row: c.config.method for c in load("flash_dmd_components", ["data.path=random:x"]).expand(scale)}
    on = {
        row: (m.num_low_noise_steps > 0, m.gan != "bottleneck" and m.critic_heads == "pooled", m.score_ema_decay < 1)
        for row, m in cells.items()
        if m.name == "flash_dmd" and not row.startswith("ratio-")
    }
    assert on == {
        "split": (True, False, False), "pixel-gan": (False, True, False), "score-ema": (False, False, True),
        "all": (True, True, True),
    }  # fmt: skip
    theirs = {c.id for c in load("dmd2_ttur", ["data.path=random:x"]).expand(scale)}
    ours = {c.id for c in load("flash_dmd_ttur", ["data.path=random:x"]).expand(scale) if c.row.startswith("dmd2-")}
    assert len(ours) == 9 and (ours <= theirs or scale == "tiny"), "dmd2/tiny has another ratio than 5:1"
    weight = {m.adversarial_weight for row, m in cells.items() if row in ("dmd2", "dmd2-5", "split", "score-ema")}
    assert len(weight) == 1


@pytest.mark.parametrize("scale", ["emoji", "paper", "tiny"])
def test_with_and_without_a_fake_score_the_student_is_updated_as_often(scale: str) -> None:
    """Without critics the student has every turn; otherwise each ``ttur``-th."""
    updates = set()
    for cell in load("dmd2_fake_score", ["data.path=random:x"]).expand(scale):
        if cell.config.method.trains:
            ttur = cell.config.method.ttur if cell.config.method.fake_score == "network" else 1
            updates.add(cell.config.train.budget.amount / ttur)
    assert len(updates) == 1


def test_flash_losses_sets_the_published_terms_to_zero() -> None:
    cells = {c.row: c.config.method for c in load("flash_losses").expand("tiny", "demo")}
    del cells["teacher-50"]
    on = {row: (any(m.adversarial_weight), any(m.dmd_weight)) for row, m in cells.items()}
    expected = {"distil": (False, False), "distil-dmd": (False, True), "distil-adv": (True, False)}
    assert on == expected | {"all": (True, True)}


@pytest.mark.parametrize("name", names())
def test_a_grid_composes_once_for_each_experiment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra takes a second; a grid's cells differ in values alone."""
    grid = load(name, ["data.path=random:x"])
    composed: list[tuple] = []
    groups = config._compose_groups
    monkeypatch.setattr(config, "_compose_groups", lambda *choice: composed.append(choice) or groups(*choice))
    config._composed.cache_clear()
    cells = [cell for scale in grid.base for cell in grid.expand(scale)]
    assert len(composed) == len(set(composed)) <= len({cell.experiment for cell in cells})
    config._composed.cache_clear()
    again = [cell for scale in grid.base for cell in grid.expand(scale)]
    assert [cell.id for cell in again] == [cell.id for cell in cells]
    assert len(composed) == len(set(composed)), "what another process has composed is remembered"


def test_two_configurations_share_nothing() -> None:
    one, other = compose("flash/tiny"), compose("flash/tiny")
    one.method.stage_weights[0][0], one.eval.steps[0] = 9.0, 99
    assert other == compose("flash/tiny") != one
