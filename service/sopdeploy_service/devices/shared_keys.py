"""The API keys in memory that the processes that serve HTTP share."""

import os
from collections.abc import Sequence
from contextlib import ExitStack

from sopdeploy.bundle.sealed import create_memory, map_memory
from sopdeploy_service.http.api_keys import STATE_BYTES, Key, KeyFile, KeyRing


class SharedKeys:
    """The API *keys* in two *files* for the processes that serve HTTP: the keys, the states of their limits."""

    def __init__(self, keys: Sequence[Key], earlier: KeyRing | None = None) -> None:
        """Write *keys*; a key that *earlier* has, too, keeps the state of its limit. Raises `OSError`."""
        states = memoryview(bytearray()) if earlier is None else earlier.states_of(keys)
        with ExitStack() as unless_written:
            keys_file = create_memory(
                "sopdeploy-keys", [KeyFile(key=tuple(keys)).model_dump_json().encode()]
            )
            unless_written.callback(os.close, keys_file)

            # At least one byte: nothing else can be mapped.
            limits_file = create_memory("sopdeploy-limits", STATE_BYTES * max(1, len(keys)))
            unless_written.callback(os.close, limits_file)
            memory = memoryview(map_memory(os.dup(limits_file)))  # closes what it maps
            unless_written.pop_all()

        self.files = keys_file, limits_file
        memory[: states.nbytes] = states.cast("B")
        self.ring = KeyRing(keys, memory.cast("d"))

    def close(self) -> None:
        """Close the files here; processes that have received them still have them open."""
        for file in self.files:
            os.close(file)
