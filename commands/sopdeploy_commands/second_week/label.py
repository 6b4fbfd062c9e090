"""`sopdeploy label`: a local web page to label kept photographs."""

from pathlib import Path
from shlex import join

from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field, say
from sopdeploy_service.settings import Port, load_settings


@command()
def label(kept: Path, *, photos: Path = Path("photos"), host: str = "127.0.0.1", port: Port = 8001) -> None:
    """Label kept photographs on a local web page, by keyboard or touch; Ctrl-C ends it.

    Each label moves a photograph to PHOTOS/<class>/, one of the uniform sample to PHOTOS-held-out/<class>/,
    and one of no class to PHOTOS-unknown/. Behind a proxy, the page has the settings of `serve` in the
    environment and in the file that SOPDEPLOY_CONFIG names, such as allowed_hosts and root_path.

    Example: sopdeploy label kept

    Example: sopdeploy label kept --photos flowers --host 192.168.1.5

    Args:
        kept: Folder that `serve --setting keep=KEPT` has written.
        photos: Folder of the classes; labels go to PHOTOS, PHOTOS-held-out, PHOTOS-unknown.
        host: IP address to listen on; the printed address has a key, without which the page opens for nobody.
        port: TCP port to listen on; 0 is any free port.
    """
    from sopdeploy_service.second_week.labelling.app import run_label_server

    def print_page(url: str, count: int) -> None:
        print_field("photos", f"{count:,} to label")
        print_field("page", url, style="bold green")

    settings = load_settings(host=host, port=port)
    folders = run_label_server(kept, photos, settings, on_ready=print_page)  # returns after Ctrl-C
    labels = [step for step in folders.steps if step.target is not None]  # the others are skips
    say(f"{len(labels):,} labels")
    if folders.photos.is_dir():
        # Both as the user named them, unless that was `.` or `..`, which have no siblings with their names.
        has_name = photos.name not in {"", ".."}
        unknown = photos.with_name(folders.unknown.name) if has_name else folders.unknown
        words = ["--data", str(photos), *(["--unknown", str(unknown)] if unknown.is_dir() else ())]
        say(f"next: sopdeploy train {join(words)}")
