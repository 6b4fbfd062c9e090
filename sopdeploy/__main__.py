"""Entry point of the `sopdeploy` script and of `python -m sopdeploy`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C during import exits quietly with code 130, as a shell does."""
    try:
        from sopdeploy.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
