"""What the script `sopdeploy` and `python -m sopdeploy` begin with."""

import sys

STOPPED = 130  # what a shell says of a program that Ctrl-C ended


def main() -> None:
    """Run the command line; a Ctrl-C while it is still loading ends it as quietly as one later."""
    try:
        from sopdeploy.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
