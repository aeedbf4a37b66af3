"""Text and tables as HTML: every text of a model or a file goes through `text`."""

import html
from collections.abc import Iterable, Sequence

LONGEST_TEXT = 4000
"""Characters of an answer that are shown."""


def text(value: str) -> str:
    """Hostile text as HTML; NUL is not allowed there, and very long text is cut, saying so."""
    if len(value) > LONGEST_TEXT:
        value = f"{value[:LONGEST_TEXT]} [... {len(value) - LONGEST_TEXT} more characters]"
    return html.escape(value.replace("\0", "\ufffd"))


def html_table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int,
    marked: int | None = None,
) -> str:
    """Cells are HTML already; the first `left` columns are text, the others numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}>{cell}</{tag}>" if place < left else f'<{tag} class="n">{cell}</{tag}>'
            for place, cell in enumerate(row)
        )

    body = "".join(
        f'<tr class="chosen">{cells("td", row)}</tr>'
        if place == marked
        else f"<tr>{cells('td', row)}</tr>"
        for place, row in enumerate(rows)
    )
    head = f"<thead><tr>{cells('th', titles)}</tr></thead>"
    return f'<div class="wide" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def section(anchor: str, title: str, *parts: str, lead: str = "") -> str:
    """A titled part of the page; empty when it would say nothing."""
    body = "".join(parts)
    if not body:
        return ""
    note = f'<p class="soft">{lead}</p>' if lead else ""
    return f'<section id="{anchor}"><h2>{title}</h2>{note}{body}</section>'


def figure(svg: str, caption: str) -> str:
    """A chart with what it shows; empty without a chart."""
    if not svg:
        return ""
    return (
        f'<figure class="card"><div class="wide">{svg}</div>'
        f'<figcaption class="small">{caption}</figcaption></figure>'
    )
