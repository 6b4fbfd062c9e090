"""A file that an import of the user's code must not change."""

from pathlib import Path
from typing import Self


class KeptFile:
    """A file that code of the user may replace when it is imported or called.

    It gets the content back that it had before, by `restore` and at the end of the block. If the
    code has not changed it until the first `restore`, the content is not kept for longer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = self._read_state()
        self._content: bytes | None = path.read_bytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.restore()

    def _read_state(self) -> tuple[int, int, int] | None:
        """Return what a write to the file changes; None if it is missing."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def restore(self) -> tuple[str, ...]:
        """Give the file its content back if it was changed, and return a warning of this."""
        content = self._content
        if content is None or self._read_state() == self._state:
            self._content = None
            return ()
        is_equal = self._path.is_file() and self._path.read_bytes() == content
        if not is_equal:
            self._path.write_bytes(content)
        self._state = self._read_state()

        if is_equal:
            return ()
        return (
            f"the code of the network changed {self._path} when it was imported or called; it has "
            "its content back: call the code that saves it only in `if __name__ == '__main__':`",
        )
