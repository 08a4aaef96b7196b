"""Result pages: prose that people write (``templates/``), with every number taken from the committed records.

``analysis/RESULTS.md`` is the index; ``analysis/papers/`` has one page for each paper. A template is Markdown in which
``{{ value(GRID, ROW, METRIC) }}`` and the other functions of ``Facts`` stand for numbers and tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2

from analysis.artefacts.context import Context
from analysis.facts import Facts
from analysis.render import fold
from analysis.speed import speed

FOLDER = Path(__file__).parent
TEMPLATES = FOLDER / "templates"
INDEX = "RESULTS.md"
NOTICE = "<!-- Written by `fewstep results --pages` from analysis/templates/{template}; change that file. -->\n\n"


@dataclass(frozen=True)
class Page:
    """One paper: the file's stem, its title in the index, and the grids that its template shows."""

    name: str
    title: str
    grids: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"papers/{self.name}.md"


PAGES = (
    Page(
        "flash_diffusion",
        "Flash Diffusion",
        (
            "few_steps",
            "flash_losses",
            "flash_gan_loss",
            "flash_distill_loss",
            "flash_guidance",
            "flash_num_timesteps",
            "flash_timesteps",
            "flash_stages",
            "flash_lora_rank",
            "flash_table_2",
            "flash_table_3",
        ),
    ),
    Page(
        "dmd2",
        "DMD2 and the FLUX.2 recipe",
        (
            "dmd2_teachers",
            "dmd2_ttur",
            "dmd2_fake_score",
            "dmd2_student_input",
            "dmd2_gan",
            "dmd2_regression",
            "num_steps",
            "ema",
            "precision_states",
            "sharing",
        ),
    ),
    Page(
        "step_and_guidance",
        "Step and guidance distillation",
        ("progressive_rounds", "progressive_targets", "guidance_then_steps", "guidance_against_steps"),
    ),
    Page("flash_dmd", "Flash-DMD", ("flash_dmd_components", "flash_dmd_ttur", "flash_dmd_score_ema")),
)


def build_pages(context: Context, templates: Path = TEMPLATES) -> Iterator[tuple[str, str]]:
    """(file below ``analysis/``, text) of every page, the index last; equal records give equal text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    facts = Facts(context)
    functions = {name: getattr(facts, name) for name in dir(facts) if not name.startswith("_") and name != "context"}
    environment.globals.update(functions, fold=fold, speed=speed)
    for page in PAGES:
        yield page.file, _render(environment, page.file, grids=page.grids)
    yield INDEX, _render(environment, INDEX, pages=PAGES)


def _render(environment: jinja2.Environment, file: str, **values: object) -> str:
    template = f"{file}.j2"
    return NOTICE.format(template=template) + environment.get_template(template).render(**values)
