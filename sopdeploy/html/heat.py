"""A grid of shares: the darker a cell, the larger its share; every cell says its number."""

from collections.abc import Sequence

from sopdeploy.html.markup import Html, picture, shortened, tag, words

WIDTH, LEFT, TOP = 360.0, 84.0, 14.0
LETTERS, WIDEST, HIGHEST = 13, 60.0, 26.0
LETTER = 7.5  # wide, at most
MOST_NUMBERS = 14  # columns that leave room for numbers


def heat(
    name: str,
    title: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    columns: Sequence[str],
    told: Sequence[Sequence[str]],
    *,
    wrong_off_diagonal: bool = False,
) -> Html:
    """Return a grid of *rows*, a label with shares from 0 to 1 each, whose numbers in words are *told*.

    *wrong_off_diagonal* gives cells off the diagonal the colour of mistakes.
    """
    side = min(WIDEST, (WIDTH - LEFT) / len(columns))
    height, letters = min(side, HIGHEST), max(3, int(side / LETTER))
    shapes = [
        words(LEFT + side * (place + 0.5), TOP - 4, shortened(column, letters), "small", "middle")
        for place, column in enumerate(columns)
        if len(columns) <= MOST_NUMBERS or place % 5 == 0
    ]
    for down, (label, shares) in enumerate(rows):
        y = TOP + height * down
        shapes.append(words(LEFT - 5, y + height / 2 + 4, shortened(label, LETTERS), "small", "end"))
        for across, share in enumerate(shares):
            kind = "cell wrong" if wrong_off_diagonal and across != down else "cell"
            text = told[down][across]
            x = LEFT + side * across
            shapes.append(
                tag(
                    "g",
                    tag("title", f"{label}, {columns[across]}: {text}"),
                    tag("rect", x=x, y=y, width=side - 1, height=height - 1, class_="empty"),
                    tag("rect", x=x, y=y, width=side - 1, height=height - 1, class_=kind, fill_opacity=share),
                    *number(x + side / 2, y + height / 2 + 4, text, share, len(columns)),
                )
            )
    said = "; ".join(f"{label}: {', '.join(told[place])}" for place, (label, _) in enumerate(rows))
    size = (WIDTH, TOP + height * len(rows) + 4)
    return picture(name, title, f"Columns are {', '.join(columns)}. {said}.", size, *shapes)


def number(x: float, y: float, text: str, share: float, columns: int) -> list[Html]:
    """Return the number of a cell where there is room for it and something to say."""
    if columns > MOST_NUMBERS or text == "0":
        return []
    return [words(x, y, text, "small dark" if share > 0.5 else "small", "middle")]
