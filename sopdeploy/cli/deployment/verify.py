"""`sopdeploy verify`: check the files of a bundle and replay its probes on this machine."""

from sopdeploy.cli.console import BundleArgument, JsonOption, one_line_errors, print_field, print_json, steps


def verify(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Check every file of a bundle and replay its probes on this machine, offline.

    Example: [bold]sopdeploy verify bundles/dsop-resnet20-3f6c01d2a4b7[/bold]
    """
    with one_line_errors(as_json), steps("verifying", quiet=as_json):
        from sopdeploy_service.commands.verify import verify as run

        result = run(bundle)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    print_field("files", f"{result.files} complete, {result.bytes:,} bytes, id {result.id}")
    for replay in result.replays:
        for name, deviation in replay.deviation.items():
            print_field(
                "probes",
                f"batch {replay.batch}: {name} of {replay.images} images deviate by {deviation:.2g} "
                f"(allowed {replay.tolerance[name]:.2g}) on {result.runtime}",
            )
    print_field("verified", str(result.bundle), style="bold green")
