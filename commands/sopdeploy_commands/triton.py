"""`sopdeploy triton`: write a bundle into a Triton model repository."""

from pathlib import Path

from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field
from sopdeploy.data.photos.outputs import check_takes_output
from sopdeploy.errors import ConfigError
from sopdeploy.paths import is_output


@command(examples=("sopdeploy triton bundles/photos-3f6c01d2a4b7 models",))
def triton(bundle: Path, repository: Path) -> None:
    """Write a bundle into a Triton model repository: config, labels, warm-up and graph.

    Args:
        bundle: A bundle written by `sopdeploy export`.
        repository: Triton model repository; created if it is missing.
    """
    from sopdeploy.bundle.folder import open_bundle
    from sopdeploy_export.triton import write_triton

    check_takes_output(repository, None)
    if is_output(repository):
        raise ConfigError(f"{repository}: holds runs or bundles; choose another folder")
    opened_bundle = open_bundle(bundle)
    written = write_triton(opened_bundle, repository)
    print_field(
        "model", f"{written.name}, batches of 1 to {opened_bundle.manifest.batch.maximum}"
    )
    print_field("written", str(written), style="bold green")
