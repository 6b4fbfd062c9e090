"""Entry point of the `sopdeploy` script and of `python -m sopdeploy`."""

import atexit
import gc
import os
import sys
from importlib import import_module
from io import TextIOWrapper

_YOUNG_OBJECTS = 50_000  # threshold of the youngest garbage collector generation


def main() -> None:
    """Run the command line; Ctrl-C during import exits with one line and code 130, as a shell does.

    Commands import torch and other large packages. With Python's default settings, garbage
    collection during these imports and at exit takes a third of the CPU time of `sopdeploy
    models NAME`.

    Names of files and classes are UTF-8. In other locales, such as `LC_ALL=C`, Python restarts
    in UTF-8 mode. What a terminal or pipe cannot show, as with `PYTHONIOENCODING=ascii`, is escaped.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # also for child processes
        # An option, because with -I or -X utf8=0 the variable has no effect.
        arguments = ["-X", "utf8", *sys.orig_argv[1:]]
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - the same program

    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")

    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)  # excludes all objects from the collection at exit

    try:
        # By name: this package imports none of the rooms above it.
        import_module("sopdeploy_commands.app").main()
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
