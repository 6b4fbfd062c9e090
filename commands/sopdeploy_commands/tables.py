"""The output folder of `classify`: its names, and the format of its parquet files.

What writes the files, and what changes them, reads it here.
"""

from collections.abc import Mapping
from typing import Any, Literal

from sopdeploy.config import check_format
from sopdeploy.version import __version__

ROWS_FOLDER = "rows"
LISTING = "_list.parquet"
STATE = "_run.json"
VERSION: Literal[1] = 1
# Metadata of a parquet file
VERSION_KEY = b"sopdeploy.version"
_WRITER_KEY = b"sopdeploy.written_by"


def make_schema(columns: Mapping[str, Any]) -> Any:
    """Build the schema of a parquet file with *columns* of format 1."""
    import pyarrow as pa  # of an extra

    return pa.schema(columns, metadata={VERSION_KEY: str(VERSION), _WRITER_KEY: __version__})


def check_schema(schema: Any) -> None:
    """Raise `ValueError` if *schema* is that of a later format; files of other programs have no version."""
    version = (schema.metadata or {}).get(VERSION_KEY)
    if version is not None:
        check_format(
            int(version), VERSION, schema.metadata.get(_WRITER_KEY, b"").decode() or None
        )
