"""`sopdeploy label`: a local web page that sorts photographs into classes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field, say
from sopdeploy.photos.files import kept_id
from sopdeploy_service.settings import Port, load_settings

if TYPE_CHECKING:
    from sopdeploy_service.labelling.label.heap import Vector


@command(
    examples=(
        "sopdeploy label camera --photos photos",
        "sopdeploy label kept",
        "sopdeploy label kept --photos flowers --host 192.168.1.5",
    )
)
def label(
    kept: Path, *, photos: Path = Path("photos"), host: str = "127.0.0.1", port: Port = 8001
) -> None:
    """Sort photos into classes on a local web page, by keyboard or touch; Ctrl-C ends it.

    You can label the photos that a server has kept, or any images in a folder. For images that no
    server has kept, a network suggests classes as soon as each class has two labelled images.

    A label moves a photo to PHOTOS/<class>/, or to PHOTOS-held-out/<class>/ if the photo is kept to
    compare the next bundle. Photos of no class move to PHOTOS-unknown/. The page reads the settings
    of `serve` from the environment and from the file that SOPDEPLOY_CONFIG names. Behind a proxy,
    it needs allowed_hosts and root_path.

    Args:
        kept: Folder of images, such as the folder that `serve --setting keep=KEPT` has written.
        photos: Folder of the classes; labels go to PHOTOS, PHOTOS-held-out, PHOTOS-unknown.
        host: IP address to listen on; the page opens only with the key in the printed address.
        port: TCP port to listen on; 0 is any free port.
    """
    from sopdeploy_service.labelling.label.app import run_label_server, training_command

    def print_page(url: str, count: int) -> None:
        print_field("photos", f"{count:,} to label")
        print_field("page", url, style="bold green")

    settings = load_settings(host=host, port=port)
    folders = run_label_server(kept, photos, settings, print_page, embed_lazily)  # until Ctrl-C
    num_labels = sum(not step.is_skip for step in folders.steps)
    progress = folders.progress()
    say(f"{num_labels:,} labels{progress and f': {progress}'}")
    if num_labels and folders.photos.is_dir():
        say(f"next: {training_command(folders, photos)}")


def embed_lazily(paths: Sequence[Path]) -> "Iterator[tuple[Path, Vector]]":
    """Compute the vectors of photographs; torch is imported by the thread that reads them.

    For kept photographs alone, which are only grouped, no weights are downloaded.
    """
    from sopdeploy.training.few_shot.default_network import embed_files, has_default_weights

    are_kept = all(kept_id(path.name) for path in paths)
    if not are_kept or has_default_weights():
        yield from embed_files(paths)
