"""Work in the background of an event loop."""

import asyncio
from collections.abc import Coroutine
from typing import Any


def start_task(
    tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]
) -> asyncio.Task[None]:
    """Start *work* on the running event loop; *tasks* keeps it until it ends, as the loop alone does not."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
