"""What a notebook shows of a result: a headline and a table, as HTML without scripts."""

from collections.abc import Iterable, Sequence
from html import escape

from sopdeploy.html.report import sanitize

MAX_ROWS = 50
_CELL = "padding:.2rem .7rem;text-align:left"


def notebook_table(
    headline: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    lines: Sequence[str] = (),
    shares: bool = False,
) -> str:
    """Render a *headline*, *lines* and a table, of at most `MAX_ROWS` *rows*, as HTML; all text is escaped.

    With *shares*, the numbers of a row are counts, whose cells are colored by their share of the row.
    """

    def text(value: object) -> str:
        return escape(sanitize(str(value)))

    def cell(value: object, total: float) -> str:
        style = _CELL
        if shares and isinstance(value, int) and total and value:
            style += f";background:rgba(10,122,92,{0.1 + 0.5 * value / total:.2f})"
        return f'<td style="{style}">{text(value)}</td>'

    shown = list(rows)
    head = "".join(f'<th style="{_CELL}">{text(column)}</th>' for column in columns)
    body = []
    for row in shown[:MAX_ROWS]:
        total = sum(value for value in row if isinstance(value, int))
        body.append(f"<tr>{''.join(cell(value, total) for value in row)}</tr>")
    more = len(shown) - len(body)
    parts = [
        f"<p><strong>{text(headline)}</strong></p>",
        *(f"<p>{text(line)}</p>" for line in lines),
    ]
    if body:
        parts.append(
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        )
    if more > 0:
        parts.append(f"<p>and {more:,} more</p>")
    return f"<div>{''.join(parts)}</div>"
