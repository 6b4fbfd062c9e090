"""The server's side of decoder processes. What a child sends is not trusted: sizes are fixed or limited.

The event loop sends requests and reads replies; the start and the end of a child need a thread.
"""

import asyncio
import atexit
import functools
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import ConfigError, RuntimeUnavailableError, SopdeployError
from sopdeploy_service.decoding import child
from sopdeploy_service.templates import START_SECONDS, TemplateProcess

DECODER_MODULE = "sopdeploy_service.decoding.child"
ERROR_KINDS = range(child.FIRST_ERROR, child.FIRST_ERROR + len(child.ERRORS))
# Of what children write to standard error at once, the last ones
LOGGED_CHARACTERS = 500
LOG_PAUSE_SECONDS = 0.1

# Why a child ends: one of these, or the name of a signal.
TIME = "time"
WRONG_REPLY = "wrong_reply"
UNKNOWN = "unknown"  # its template has ended, too, or there was no child
EXIT = "exit"

log = logging.getLogger("sopdeploy.decoding")


class Reply(NamedTuple):
    """The answer of a child; its *kind* and *bits* are those of `decoding.child.REPLY`."""

    kind: int
    bits: int
    data: NDArray[np.uint8]


class ChildEnded(NamedTuple):
    """The child of a request has ended, took too long or sent a wrong reply."""

    reason: str


@dataclass(eq=False, slots=True)
class Request:
    """An *image* to decode by *rules*, or to copy without them.

    A reply without an error has *expected_kind* and data of one of *sizes*. *result* gets a
    `Reply`, `ChildEnded`, or the reason why no child runs the request. While it waits, it
    counts as *pixels*; a child ends if it takes more than *seconds* of CPU time (0: no limit).
    A child needs about *work* seconds. The reply is of use until *latest*, and *began* when a
    child got the request (None: it waits), both times of `time.monotonic`.
    """

    image: bytes = field(repr=False)
    rules: bytes
    expected_kind: int
    sizes: range
    result: "asyncio.Future[Any]"
    pixels: int = 0
    seconds: float = 0.0
    work: float = 1.0
    latest: float = math.inf
    began: float | None = None

    def busy_seconds(self) -> float:
        """Return for how long a child has had the image; 0 while it waits."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    def settle(self, result: object) -> None:
        """Set *result* unless nobody waits for one any more."""
        if not self.result.done():
            self.result.set_result(result)


def exit_reason(code: int) -> str:
    """Name the reason for the exit *code* of a child."""
    if code == child.UNKNOWN_CODE:
        return UNKNOWN
    if code >= 0:
        return EXIT

    if -code == signal.SIGPROF:  # after the CPU time of its options
        return TIME

    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"


class DecoderTemplate(TemplateProcess):
    """Forks decoder processes, which end with it; it gets nothing of this process but the modules."""

    def __init__(self, program: str = DECODER_MODULE) -> None:
        super().__init__()
        self._program = program

    def fork(self, options: child.ChildOptions) -> tuple[socket.socket, int]:
        """Fork a child, or raise `RuntimeUnavailableError`; return the socket to it and its id."""
        ours, theirs = socket.socketpair()
        message = "the decoder processes do not start"
        with theirs, ExitStack() as unless_forked:
            unless_forked.enter_context(ours)

            try:
                process, code = self.ask(
                    json.dumps(options._asdict()).encode(), theirs.fileno()
                )
            except BrokenPipeError as error:
                raise RuntimeUnavailableError(f"{message}; see the message above") from error
            except OSError as error:
                raise RuntimeUnavailableError(
                    f"{message} ({error.strerror}); check the limits of this system"
                ) from error

            if process == 0:
                raise RuntimeUnavailableError(
                    f"{message} ({os.strerror(code)}); allow more processes"
                )

            unless_forked.pop_all()
        return ours, process

    def kill(self, process: int) -> int:
        """Kill the child *process* if it runs; return its exit code, `UNKNOWN_CODE` without the template."""
        with suppress(OSError):
            return self.ask(str(process).encode())[1]
        return child.UNKNOWN_CODE

    def run(self, file: int) -> subprocess.Popen[bytes]:
        """Run the program; log what it writes to standard error."""
        # A thread of its own starts it: the system ends a template with the thread that started it.
        process: Future[subprocess.Popen[bytes]] = Future()
        threading.Thread(
            target=self._run_and_log, args=(file, process), name="template", daemon=True
        ).start()
        return process.result()

    def _run_and_log(self, file: int, started: "Future[subprocess.Popen[bytes]]") -> None:
        """Run the program, which *started* gets, and log its standard error until it has ended."""
        path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100 - an entry may be empty
        lines = (
            f"import sys; sys.path[:] = {path!r}",
            "from sopdeploy_service.templates import end_with_parent",
            f"end_with_parent({os.getpid()})",  # before the imports, which take seconds
            f"from {self._program} import main; main()",
        )

        # Start it without files, secrets and threads, which a fork would lose.
        try:
            process = subprocess.Popen(
                # The option -I ignores the user's site-packages.
                [sys.executable, "-I", "-c", "\n".join(lines), str(file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"OPENBLAS_NUM_THREADS": "1"},
                pass_fds=[file],
                cwd="/",
                # Ctrl-C ends only the server, which decodes until it has drained.
                process_group=0,
            )
        except OSError as error:  # for the caller of `run`
            started.set_exception(error)
            return

        # Stay until it has ended.
        started.set_result(process)
        _log_stderr(process)


def _log_stderr(process: "subprocess.Popen[bytes]") -> None:
    """Log the end of what *process* and its children write to standard error, until they have ended."""
    with cast(BinaryIO, process.stderr) as pipe:
        while text := os.read(pipe.fileno(), 1 << 16):
            log.warning(
                "decoder: %s", text.decode(errors="replace").strip()[-LOGGED_CHARACTERS:]
            )
            time.sleep(LOG_PAUSE_SECONDS)


@functools.cache
def shared_template() -> DecoderTemplate:
    """Return the template of this process; it ends with this process."""
    template = DecoderTemplate()
    atexit.register(template.close)
    return template


class DecoderProcess(asyncio.BufferedProtocol):
    """One child, which is replaced when it fails; its public methods are called on the event loop.

    It runs one request at a time, for at most *seconds*, and calls *on_idle* when it can run
    the next one. A reply is read into `_reply`, which is as long as the longest one that the
    request may have; without a request, nothing may come.
    """

    def __init__(
        self,
        template: DecoderTemplate,
        options: child.ChildOptions,
        seconds: float,
        on_idle: Callable[["DecoderProcess", Request, bool], None] = lambda *_: None,
        on_end: Callable[[str], object] = lambda _reason: None,
    ) -> None:
        """Start no child yet; *on_end* gets the reason why one is replaced.

        *on_idle* gets the request that the child had, and whether it has sent the expected data.
        """
        self._template = template
        self._options = options
        self._seconds = seconds
        self._on_idle = on_idle
        self._on_end = on_end

        self.process = self._number = 0  # id of the child; number of the last request
        # None if there is no child, or if it has to be replaced
        self._transport: asyncio.Transport | None = None

        self._reason = ""  # for which the child has to be replaced, if not for its exit code
        self._request: Request | None = None
        self._reply = np.empty(1, np.uint8)
        self._arrived = 0  # bytes of the reply

    async def start(self) -> str:
        """Start a child; return its restrictions, or `no sandbox` and the reason.

        Raises `RuntimeUnavailableError` if it does not start, `ConfigError` if a required
        sandbox is missing.
        """
        self._end, restrictions = await asyncio.to_thread(self._fork_and_wait)
        self._loop = asyncio.get_running_loop()
        await self._loop.connect_accepted_socket(lambda: self, self._end)
        return restrictions

    def run(self, request: Request) -> None:
        """Run *request*; if the child has ended or sent more than its reply, start another one first."""
        # See whether the idle child has ended, or has sent what nobody asked for.
        if self._transport is not None:
            try:
                unexpected = self._end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:  # nothing to read: the child waits for a request
                pass
            except OSError:  # the child has ended
                self._end_child()
            else:  # nothing: the child has ended
                self._end_child(WRONG_REPLY if unexpected else "")

        request.began = time.monotonic()
        self._request = request

        if self._transport is None:
            self._replacing = self._loop.create_task(self._replace_child(sends=True))
        else:
            self._send(self._transport, request)

    def close(self, reason: object) -> None:
        """End the child; a request that it runs gets *reason*."""
        if self._request is not None:
            self._request.settle(reason)
        self._request = None
        self._end_child()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Use the new child."""
        self._transport = cast(asyncio.Transport, transport)

    def _send(self, transport: asyncio.Transport, request: Request) -> None:
        longest = max(request.sizes.stop - 1, child.MAX_MESSAGE)
        self._reply = np.empty(child.REPLY.size + longest, np.uint8)
        self._arrived = 0

        self._number += 1
        sizes = (len(request.rules), len(request.image))
        header = child.REQUEST.pack(self._number, *sizes, request.seconds)

        # At once, so that the child wakes only once.
        transport.writelines([header, request.rules, request.image])
        self._timer = self._loop.call_later(self._seconds, self._end_child, TIME)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Return the memory for what arrives."""
        return self._reply[self._arrived :].data

    def buffer_updated(self, nbytes: int) -> None:
        """Check the header of a reply; pass on a reply that is complete."""
        request = self._request
        if request is None:
            self._end_child(WRONG_REPLY)
            return

        self._arrived += nbytes
        if self._arrived < child.REPLY.size:
            return

        # Check the header.
        number, kind, bits, size = child.REPLY.unpack_from(self._reply.data)
        is_expected = kind == request.expected_kind
        sizes = request.sizes if is_expected else range(child.MAX_MESSAGE + 1)
        end = child.REPLY.size + size

        if (
            number != self._number
            or not (is_expected or kind in ERROR_KINDS)
            or size not in sizes
            or self._arrived > end
        ):
            self._end_child(WRONG_REPLY)
            return

        # Pass on the reply.
        if self._arrived == end:
            request.settle(Reply(kind, bits, self._reply[child.REPLY.size : end]))
            self._reply = np.empty(1, np.uint8)  # the image may outlive the request
            self._arrived = 0
            self._timer.cancel()
            self._become_idle(is_done=is_expected)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """End the child, which has closed its end; a request that it runs fails."""
        self._end_child()

    def _end_child(self, reason: str = "") -> None:
        """End the child for *reason* (empty: its exit code says why), unless this was called before.

        If it runs a request, this fails, and another child is started.
        """
        if self._transport is None:
            return
        self._transport.abort()
        self._transport = None
        self._reason = reason

        if self._request is not None:  # otherwise, the next request replaces the child
            self._timer.cancel()
            self._replacing = self._loop.create_task(self._replace_child(sends=False))

    async def _replace_child(self, *, sends: bool) -> None:
        """Start another child, which gets the request if *sends* is true; otherwise the request fails."""
        # Find out why the child has ended, and start another one.
        reason = UNKNOWN  # stays if there is no child: the last call could not start one
        try:
            if self.process:
                code = await asyncio.to_thread(self._template.kill, self.process)
                reason = self._reason or exit_reason(code)
                self.process = 0
                self._on_end(reason)
                if reason != TIME:
                    log.warning("a decoder process has ended (%s) and is replaced", reason)

            await self.start()
        except Exception as error:  # the next image tries again
            is_bug = not isinstance(error, SopdeployError | OSError)
            log.error("a decoder process is not replaced: %s", error, exc_info=is_bug)

        # Give the request to the new child, or tell why it was not answered.
        request = self._request
        if request is None:  # closed
            self._end_child()
        elif sends and self._transport is not None:
            self._send(self._transport, request)
        else:
            request.settle(ChildEnded(reason))
            self._become_idle(is_done=False)

    def _become_idle(self, *, is_done: bool) -> None:
        """Tell the owner that the child is idle, who may give it the next request."""
        request = cast(Request, self._request)
        self._request = None
        self._on_idle(self, request, is_done)

    def _fork_and_wait(self) -> tuple[socket.socket, str]:
        """Fork a child and wait until it is restricted; return the socket to it and its restrictions."""
        end, process = self._template.fork(self._options)
        with ExitStack() as stack:
            stack.callback(end.close)  # unless everything below succeeds
            end.settimeout(START_SECONDS)

            # Wait for the first reply, which lists the restrictions.
            try:
                deadline = time.monotonic() + START_SECONDS
                _, kind, _, size = child.REPLY.unpack(
                    child.receive(end, child.REPLY.size, deadline)
                )
                text = child.receive(end, min(size, child.MAX_MESSAGE), deadline).decode(
                    errors="replace"
                )
            except OSError as error:
                message = "a decoder process does not start; see the message above"
                raise RuntimeUnavailableError(message) from error

            if kind != child.READY and self._options.sandbox == "required":
                raise ConfigError(f"sandbox=required: {text}; set sandbox=auto")
            stack.pop_all()

        end.setblocking(False)
        self.process = process
        return end, text if kind == child.READY else f"no sandbox ({text})"
