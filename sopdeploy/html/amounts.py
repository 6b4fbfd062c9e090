"""Numbers as a person reads them."""

SPACE = "\N{NO-BREAK SPACE}"  # a number and its unit stay on one line
STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(count: float) -> str:
    """Return *count* with three digits and a unit: 11.7 M."""
    for step, unit in STEPS:
        if count >= step:
            return f"{count / step:.3g}{SPACE}{unit}"
    return f"{count:g}"


def size(count: int) -> str:
    """Return a number of bytes: 44.7 MB."""
    return f"{short(count)}B" if count >= 1000 else f"{count}{SPACE}bytes"


def percent(share: float, digits: int = 1) -> str:
    """Return *share* in percent: 12.5 %."""
    return f"{100 * share:.{digits}f}{SPACE}%"


def less(before: float, after: float) -> str:
    """Return how much less *after* is: 12.5 % less, or the same."""
    if after >= before:
        return "the same"
    return f"{percent(1 - after / before)} less"


def shape(sizes: tuple[int, ...]) -> str:
    """Return the shape of one image's tensor: 64 x 56 x 56."""
    return "\N{MULTIPLICATION SIGN}".join(map(str, sizes))
