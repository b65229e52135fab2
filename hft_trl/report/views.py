"""Write a report as Markdown and as one self-contained web page."""

import io
from base64 import b64encode
from collections.abc import Collection
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hft_trl.demo import shown
from hft_trl.report.plots import FIGURES
from hft_trl.report.record import REPORT_FILE, Report
from hft_trl.report.sections import CAPTIONS, Block, sections
from hft_trl.report.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_FILE = "report.html"
CSS_PIXELS = 96  # per inch


def report_markdown(report: Report, pictures: Collection[str]) -> str:
    """Write a report as Markdown. `pictures` are the names of the pictures in the same folder."""
    methods = ", ".join(f"{stage.name} with {stage.method.upper()}" for stage in report.stages)
    parts = [
        "# Fine-tuning report",
        f"{methods or 'No stage'}, from `{shown(report.base_model) or 'an unnamed model'}`, {report.created}. "
        f"Every figure below comes from `{REPORT_FILE}`.",
    ]
    for section in sections(report):
        blocks = [text for block in section.blocks if (text := _markdown(block, pictures))]
        parts += [f"## {section.title}", *blocks] if blocks else []
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block, pictures: Collection[str]) -> str:
    if block.kind == "heading":
        return f"### {block.text}"
    if block.kind == "table":
        note = f"\n\n*{block.grid.note}*" if block.grid.note else ""
        return f"{block.text}:\n\n{table(block.grid)}{note}"
    if block.kind == "picture":
        name = block.text
        return f"![{name.removesuffix('.png')}]({name})\n\n*{CAPTIONS[name]}*" if name in pictures else ""
    if block.kind == "code":
        fence = "```"
        while fence in block.text:
            fence += "`"
        code = f"{fence}{block.language}\n{block.text}\n{fence}"
        return f"<details>\n<summary>{block.summary}</summary>\n\n{code}\n\n</details>" if block.summary else code
    return block.text


def report_page(report: Report) -> str:
    """Write a report as one HTML page without scripts. The same report gives the same bytes."""
    blocks = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, **blocks)
    return templates.get_template("page.html.jinja").render(
        report=report,
        shown=shown,
        captions=CAPTIONS,
        verdict=verdict(report),
        sections=sections(report),
        drawings={name: _drawing(figure) for name, draw in FIGURES.items() if (figure := draw(report)) is not None},
    )


def verdict(report: Report) -> tuple[str, str]:
    """Return whether the frozen half is unchanged (`"good"`, `"bad"` or `"none"`), and a sentence."""
    broken = [stage.name for stage in report.stages if stage.frozen_unchanged is False]
    kept = [stage.name for stage in report.stages if stage.frozen_unchanged]
    if broken:
        return "bad", f"The frozen half did not stay unchanged: {', '.join(broken)}."
    if kept:
        stages = "every stage" if len(kept) == len(report.stages) else ", ".join(kept)
        return "good", f"What was frozen is unchanged, bit for bit, in {stages}."
    return "none", "Nothing was frozen."


def _drawing(figure: "Figure") -> tuple[str, int, int]:
    """Return a figure's address for the page, and its width and height in pixels."""
    from matplotlib import rc_context

    content = io.BytesIO()
    # Letters as outlines, no date and no random names, so that the same report gives the same bytes everywhere
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "hft_trl"}):
        figure.savefig(content, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    width, height = (ceil(CSS_PIXELS * inches) for inches in figure.get_size_inches())
    return "data:image/svg+xml;base64," + b64encode(content.getvalue()).decode(), width, height
