"""Layouts of a finished table: Markdown, CSV, LaTeX (booktabs) and HTML."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Callable, Sequence

from analysis.columns import ARROWS
from analysis.inference import Estimate
from analysis.labels import stacked_tex, to_tex, without_math
from analysis.labels import to_html as label_html
from analysis.stats import Summary
from analysis.tables import Entry, Line, Panel, Table
from analysis.verdicts import INCONCLUSIVE, RATE, TOO_SMALL, Comparison, Judgement, counts
from core.splits import captions

FORMATS = ("md", "csv", "tex", "html")
CSV_COLUMNS = [
    "grid", "scale", "budget", "split", "block", "row", "label", "nfe",
    "metric", "power", "mean", "sd", "seeds", "best", "marks", "missing",
]  # fmt: skip


def render(table: Table, format: str) -> str:
    """``table`` as text in one of FORMATS; the same table gives the same bytes."""
    return {"md": to_markdown, "csv": to_csv, "tex": to_latex, "html": to_html}[format](table)


def number(found: Summary, digits: int, plus_minus: str = " ± ") -> str:
    """``mean ± sd`` with ``digits`` decimals; the spread is left out when there is one seed."""
    spread = f"{plus_minus}{found.sd:.{digits}f}" if found.n > 1 else ""
    return f"{found.mean:.{digits}f}{spread}"


def difference(comparison: Comparison) -> str:
    """``−1.20 [−1.51, −0.89]``, or the bare difference of one seed; three significant digits of the mean."""
    return estimated(comparison.estimate) if comparison.seeds else "no data"


def estimated(found: Estimate) -> str:
    """The mean of an estimate and its 95% interval, to three significant digits of the mean."""
    digits = 3 if not found.mean else min(max(2 - math.floor(math.log10(abs(found.mean))), 0), 6)
    text = f"{found.mean:+.{digits}f}"
    if not math.isnan(found.error):
        low, high = found.mean - found.half_width(), found.mean + found.half_width()
        text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return text.replace("-", "−")


# --- Markdown -------------------------------------------------------------------------------------------


def to_markdown(table: Table, folded: bool = False) -> str:
    """GitHub-flavoured Markdown; one table for each split. ``folded``: notes open on a click, for a page of tables."""
    origin = f"{table.source}; " if table.source else ""
    parts = [f"### {without_math(table.title)}", f"*{origin}{table.scale} scale, {table.budget} budget*"]
    for panel in table.panels:
        parts += [f"**{panel.title}**", _markdown_panel(table, panel)]
    if table.judgements:
        parts += ["**Published claims beside ours**", judgements_markdown(table.judgements)]
    notes = "  \n".join([*table.footnotes, *table.notes])
    parts.append(fold("What these numbers are", notes) if folded else notes)
    if table.holes:
        parts.append("Runs without a number:\n\n" + "\n".join(f"- {name}" for name in table.holes))
    return "\n\n".join(parts) + "\n"


def fold(summary: str, text: str) -> str:
    """Markdown that a reader opens with a click."""
    return f"<details><summary>{summary}</summary>\n\n{text.strip()}\n\n</details>"


def _markdown_panel(table: Table, panel: Panel) -> str:
    heads = _heads(table, [column.heading for column in table.columns])
    lines = [_pipe(heads), _pipe(["---", "---:", *["---:"] * (len(heads) - 2)])]
    for block in panel.blocks:
        for line in block.lines:
            cells = [_markdown_cell(e, d) for e, d in zip(line.entries, table.digits, strict=True)]
            lines.append(_pipe([without_math(line.label), _nfe(line), *cells, _seeds(line), *line.published]))
    return "\n".join(lines)


def _markdown_cell(entry: Entry, digits: int) -> str:
    if entry.is_empty:
        return ""
    if entry.summary.n == 0:
        return f"missing {entry.missing[0].split()[0]}"
    text = number(entry.summary, digits).replace("-", "−")
    return (f"**{text}**" if entry.best else text) + entry.symbols.replace("*", r"\*")


JUDGEMENT_COLUMNS = ("Claim", "Captions", "Ours: difference [95% interval]", "Published", "Seeds", "Verdict")


def judgements_markdown(judgements: Sequence[Judgement]) -> str:
    """One line for each contrast; the claim's verdict stands in the first."""
    lines = [_pipe(JUDGEMENT_COLUMNS), _pipe(["---"] * len(JUDGEMENT_COLUMNS))]
    return "\n".join(lines + [_pipe(cells) for j in judgements for cells in judgement_cells(j)])


def claims_markdown(judgements: Sequence[Judgement]) -> str:
    """Every contrast with its tests: ``judgements_markdown``, p values by three ways of testing, and what is left of
    each verdict when all are seen together (``analysis.verdicts.with_rates``)."""
    heads = (*JUDGEMENT_COLUMNS, "p", "p within seeds", "p of means", "q", "Verdict among all")
    lines = [_pipe(heads), _pipe(["---"] * len(heads))]
    for judgement in judgements:
        rows = zip(judgement_cells(judgement), judgement.comparisons, strict=True)
        for place, (cells, comparison) in enumerate(rows):
            together = [p_value(judgement.q), judgement.verdict_together] if place == 0 else ["", ""]
            lines.append(_pipe([*cells, *_tests(comparison), *together]))
    alone, among = (_tally(judgements, together) for together in (False, True))
    rule = "a claim about samples counts once on each split of captions"
    rates = f"among all of them, at a rate of false discoveries of {RATE:.0%}"
    return "\n".join(lines) + f"\n\nEach by itself: {alone} ({rule}).  \n{rates.capitalize()}: {among}.\n"


def _tests(comparison: Comparison) -> list[str]:
    """p of the estimate that is judged, of the plain paired t test, and of the plain unpaired one."""
    ways = (comparison.estimate, comparison.within_seeds, comparison.between_means)
    return [p_value(comparison.evidence_of(way).p if comparison.seeds > 1 else math.nan) for way in ways]


def p_value(p: float) -> str:
    """``.032``, ``<.001``, ``1``; nothing where none is known."""
    if math.isnan(p):
        return ""
    if p < 0.001:
        return "<.001"
    return f"{p:.3f}".lstrip("0") if p < 0.9995 else "1"


def _tally(judgements: Sequence[Judgement], together: bool) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in counts(judgements, together).items())


def verdicts_markdown(judgements: Sequence[Judgement]) -> str:
    """One line for each claim: its verdict on each split of captions, and the difference that decided it.

    A claim about training logs alone has one verdict, in the first column.
    """
    splits = list(dict.fromkeys(judgement.split for judgement in judgements if judgement.split)) or ["train"]
    found: dict[str, dict[str, str]] = {}
    for judgement in judgements:
        decisive = next((c for c in judgement.comparisons if c.verdict == judgement.verdict), judgement.comparisons[0])
        text = f"{verdict(judgement)}: {decisive.column.label} {difference(decisive)}"
        found.setdefault(judgement.claim.claim, {})[judgement.split or splits[0]] = text
    lines = [_pipe(["Claim", *map(captions, splits)]), _pipe(["---"] * (1 + len(splits)))]
    for claim, by_split in found.items():
        lines.append(_pipe([claim, *(by_split.get(split, "") for split in splits)]))
    return "\n".join(lines)


def judgement_cells(judgement: Judgement, show: Callable[[str], str] = without_math) -> list[list[str]]:
    """Texts of a claim's contrasts, under JUDGEMENT_COLUMNS; ``show`` turns a row's label into text."""
    lines = []
    for index, c in enumerate(judgement.comparisons):
        first = index == 0
        lines.append(
            [
                judgement.claim.claim if first else "",
                _split(judgement) if first else "",
                f"{c.column.label} of {show(c.label)}{c.at}: {difference(c)}",
                expected(c),
                seeds(c),
                verdict(judgement) if first else "",
            ]
        )
    return lines


def _split(judgement: Judgement) -> str:
    return captions(judgement.split).removesuffix(" captions") if judgement.split else "any"


def expected(comparison: Comparison) -> str:
    """``below 0``, ``above 0``, ``0 ± 0.09``, or ``0 ± 5%`` while the value of which it is a share is not measured."""
    margin = comparison.allowed
    equal = f"0 ± {comparison.contrast.margin:.0%}" if math.isnan(margin) else f"0 ± {margin:.2g}"
    return {"lower": "below 0", "higher": "above 0", "equal": equal}[comparison.contrast.expected]


def seeds(comparison: Comparison) -> str:
    """``5``, or ``3 of 5`` while there are fewer than were planned."""
    planned = comparison.claim.seeds
    return str(planned) if comparison.seeds >= planned else f"{comparison.seeds} of {planned}"


def verdict(judgement: Judgement) -> str:
    """The verdict; of an undecided claim also which way it leans and how many seeds would decide."""
    as_published = all(c.as_published for c in judgement.comparisons if c.seeds)
    side = {True: "as published", False: "against it"}[as_published]
    if judgement.verdict == TOO_SMALL:
        return f"{TOO_SMALL} ({side})"
    if judgement.verdict != INCONCLUSIVE:
        return judgement.verdict
    return f"inconclusive (leans {side}; needs {judgement.to_decide})"


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _heads(table: Table, columns: Sequence[str], show: Callable[[str], str] = str) -> list[str]:
    """The heading of every format: ``columns`` as it writes them, the published ones by ``show``."""
    return ["", "NFE", *columns, "seeds", *map(show, table.published_columns)]


def _nfe(line: Line) -> str:
    return "?" if line.nfe is None else str(line.nfe)


def _seeds(line: Line) -> str:
    """The number of seeds behind the line's numbers, as a range when its columns differ."""
    counts = sorted({entry.summary.n for entry in line.entries if not entry.is_empty})
    if len(counts) < 2:
        return "".join(map(str, counts))
    return f"{counts[0]}–{counts[-1]}"


# --- CSV ------------------------------------------------------------------------------------------------


def to_csv(table: Table) -> str:
    """One line for each number, in shown units, holes included."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for panel in table.panels:
        for block in panel.blocks:
            for line in block.lines:
                for shown, e in zip(table.columns, line.entries, strict=True):
                    mean, sd = ("" if value != value else f"{value:.6g}" for value in (e.summary.mean, e.summary.sd))
                    writer.writerow(
                        [table.name, table.scale, table.budget, panel.split, block.title, line.row]
                        + [without_math(line.label), "" if line.nfe is None else line.nfe, shown.metric, shown.power]
                        + [mean, sd, e.summary.n, int(e.best), " ".join(e.marks), "; ".join(e.missing)]
                    )
    return out.getvalue()


# --- LaTeX ----------------------------------------------------------------------------------------------


def to_latex(table: Table) -> str:
    r"""A ``table`` environment (package booktabs); splits stacked with \midrule."""
    heads = _heads(table, [column.tex_heading for column in table.columns], stacked_tex)
    count = len(heads)
    body = [r"\toprule", " & ".join(heads) + r" \\"]
    for panel in table.panels:
        body += [r"\midrule", rf"\multicolumn{{{count}}}{{l}}{{\emph{{{to_tex(panel.title)}}}}} \\"]
        for block in panel.blocks:
            body.append(r"\addlinespace[2pt]")
            body += [_tex_line(table, line) for line in block.lines]
    origin = f" ({to_tex(table.source)})" if table.source else ""
    footnotes = "".join(to_tex(f"{note}. ") for note in table.footnotes)
    notes = footnotes + " ".join(to_tex(note) for note in table.notes)
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering\small",
            rf"\begin{{tabular}}{{@{{}}lr{'r' * (count - 2)}@{{}}}}",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{to_tex(table.title)}{origin}. {notes}}}",
            rf"\label{{tab:{table.name}}}",
            r"\end{table}",
            *(f"% missing: {name}" for name in table.holes),
            "",
        ]
    )


def _tex_line(table: Table, line: Line) -> str:
    cells = [_tex_cell(entry, d) for entry, d in zip(line.entries, table.digits, strict=True)]
    return (
        " & ".join([to_tex(line.label), _nfe(line), *cells, to_tex(_seeds(line)), *map(to_tex, line.published)])
        + r" \\"
    )


def _tex_cell(entry: Entry, digits: int) -> str:
    if entry.is_empty:
        return ""
    if entry.summary.n == 0:
        return rf"{{\scriptsize missing \texttt{{{entry.missing[0].split()[0]}}}}}"
    mean = f"{entry.summary.mean:.{digits}f}"
    spread = rf"{{\scriptstyle\pm {entry.summary.sd:.{digits}f}}}" if entry.summary.n > 1 else ""
    mean = rf"\mathbf{{{mean}}}" if entry.best else mean
    marks = entry.symbols.replace("‡", r"\ddagger ").replace("†", r"\dagger ")
    return f"${mean}{spread}{f'^{{{marks.strip()}}}' if marks else ''}$"


# --- HTML -----------------------------------------------------------------------------------------------


def to_html(table: Table) -> str:
    """A fragment: one ``<table>`` for each split in a scrolling ``<div>``; the page's style dresses it."""
    parts = [_html_panel(table, panel) for panel in table.panels]
    notes = "<br>".join(html.escape(note) for note in [*table.footnotes, *table.notes])
    parts.append(f'<p class="notes">{notes}</p>')
    return "\n".join(parts) + "\n"


def _html_panel(table: Table, panel: Panel) -> str:
    heads = _heads(table, [column.heading for column in table.columns])
    head = "".join(f"<th>{_html_heading(text)}</th>" for text in heads)
    body = "".join(
        "<tbody>" + "".join(_html_line(table, line) for line in block.lines) + "</tbody>" for block in panel.blocks
    )
    title = html.escape(panel.title)
    head = f"<caption>{title}</caption><thead><tr>{head}</tr></thead>"
    return f'<div class="scroll"><table>{head}{body}</table></div>'


def _html_heading(text: str) -> str:
    """A heading that may stand on several lines, its arrow never alone on one."""
    words, space, arrow = text.rpartition(" ")
    return html.escape(f"{words}\N{NO-BREAK SPACE}{arrow}" if space and arrow in ARROWS.values() else text)


def _html_line(table: Table, line: Line) -> str:
    cells = [_html_cell(entry, d) for entry, d in zip(line.entries, table.digits, strict=True)]
    texts = [_nfe(line), *cells, _seeds(line), *map(html.escape, line.published)]
    return f"<tr><th>{label_html(line.label)}</th>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>"


def _html_cell(entry: Entry, digits: int) -> str:
    if entry.is_empty:
        return ""
    if entry.summary.n == 0:
        run = html.escape(entry.missing[0].split()[0])
        return f'<span class="hole" title="{html.escape("; ".join(entry.missing))}">missing {run}</span>'
    mean, _, spread = number(entry.summary, digits, "\0").partition("\0")
    mean = f"<b>{mean}</b>" if entry.best else mean
    spread = f'<span class="sd"> ± {spread}</span>' if spread else ""
    return f"{mean}{spread}{f'<sup>{entry.symbols}</sup>' if entry.marks else ''}".replace("-", "−")
