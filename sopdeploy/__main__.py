"""Entry point of the `sopdeploy` script and of `python -m sopdeploy`."""

import atexit
import gc
import sys

_YOUNG_OBJECTS = 50_000  # threshold of the youngest garbage collector generation


def main() -> None:
    """Run the command line; Ctrl-C during import exits quietly with code 130, as a shell does.

    Commands import torch and other large packages. With Python's default settings, garbage collection during
    these imports and at exit takes a third of the CPU time of `sopdeploy models NAME`.
    """
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)  # excludes all objects from the collection at exit
    try:
        from sopdeploy.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
