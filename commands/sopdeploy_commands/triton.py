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
        bundle: A bundle written by `sopdeploy export`, or a model.onnx of one that has left its bundle.
        repository: Triton model repository; created if it is missing.
    """
    from sopdeploy.bundle.folder import open_bundle
    from sopdeploy_export.triton import Model, write_triton

    check_takes_output(repository, None)
    if is_output(repository):
        raise ConfigError(f"{repository}: holds runs or bundles; choose another folder")
    is_graph = bundle.suffix == ".onnx" and bundle.is_file()
    model = Model.of_file(bundle) if is_graph else Model.of_bundle(open_bundle(bundle))
    written = write_triton(model, repository)
    print_field("model", f"{written.name}, batches of 1 to {model.batch.maximum}")
    print_field("written", str(written), style="bold green")
