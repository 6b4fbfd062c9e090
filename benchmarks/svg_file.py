"""SVG files for the pictures of the documentation."""

from markupsafe import Markup

from sopdeploy.html.charts import element


def svg_file(title: str, description: str, style: str, size: tuple[float, float], *shapes: str) -> Markup:
    """Build an SVG file of *size* (width, height) with a white background."""
    width, height = size
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        element("style", style),
        element("rect", width=width, height=height, rx=8, fill="#ffffff"),
        *shapes,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
    )
