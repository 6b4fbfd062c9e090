"""`sopdeploy` alone: what to type first, in the order of the walk."""

from sopdeploy.cli.console import out

WALK = (
    ("sopdeploy demo", "see all of it work, in about a minute"),
    ("sopdeploy train --data photos", "learn from photos/<class>/*.jpg"),
    ("sopdeploy export runs/photos-dsop/best.pt --detach", "take off the branches, prove it, write a bundle"),
    ("sopdeploy verify bundles/dsop-resnet20-*/", "is the bundle whole, does this machine compute it"),
    ("sopdeploy predict bundles/dsop-resnet20-*/ photo.jpg", "classify on the spot"),
    ("sopdeploy serve bundles/dsop-resnet20-*/", "answer over HTTP, and in a browser"),
    ("sopdeploy doctor --url http://127.0.0.1:8000", "what limits the server"),
)
BESIDE = {
    "before training": ("data", "recipes", "models", "describe", "import"),
    "of what learned": ("eval", "report", "compare"),
    "of a bundle": ("bench", "engine", "triton", "sign", "push", "pull"),
    "of a server": ("key", "health", "ray"),
    "of this machine": ("env",),
}


def show_map() -> None:
    """Print the walk, a command a line, and the verbs beside it."""
    out.print("[bold]What to type first[/]\n")
    width = max(len(command) for command, _ in WALK)
    for number, (command, about) in enumerate(WALK, 1):
        out.print(f"  {number}  [cyan]{command:<{width}}[/]  [dim]{about}[/]")
    out.print("\n[bold]Beside the walk[/]\n")
    for what, verbs in BESIDE.items():
        out.print(f"     {what:<16} {', '.join(verbs)}")
    out.print(
        "\n`sopdeploy VERB --help` shows a verb's options and an example, `sopdeploy --help` every verb."
    )
