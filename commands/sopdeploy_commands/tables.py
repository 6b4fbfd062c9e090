"""The output folder of `classify`: its names, and the format of its parquet files.

What writes the files, and what changes them, reads it here.
"""

from collections.abc import Mapping
from typing import Any, Literal

from sopdeploy.version import __version__

ROWS_FOLDER = "rows"
LISTING = "_list.parquet"
STATE = "_run.json"
VERSION: Literal[1] = 1
# Metadata of a parquet file
VERSION_KEY = b"sopdeploy.version"
_WRITER_KEY = b"sopdeploy.written_by"


def make_schema(columns: Mapping[str, Any]) -> Any:
    """Build the schema of the parquet files that `classify` writes, with *columns*, of format 1."""
    import pyarrow as pa  # of an extra

    return pa.schema(columns, metadata={VERSION_KEY: str(VERSION), _WRITER_KEY: __version__})
