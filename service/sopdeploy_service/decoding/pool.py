"""The server's side of decoder processes. What a child sends is not trusted: sizes are fixed or limited.

An image whose child ends, takes too long or sends a wrong reply raises `DecoderEndedError`, which says why.
"""

import atexit
import functools
import json
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import numpy as np

from sopdeploy.errors import ConfigError, ImageError, RuntimeUnavailableError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.decoding import child
from sopdeploy_service.images.decode import Decoded

DECODER_MODULE = "sopdeploy_service.decoding.child"
START_SECONDS = 60.0
MAX_COPY_BYTES = 1 << 26
LOGGED_CHARACTERS = 500  # of what children write to standard error at once

log = logging.getLogger("sopdeploy.decoding")


TIME, WRONG_REPLY, UNKNOWN, EXIT = "time", "wrong_reply", "unknown", "exit"  # and names of signals

OnEnd: TypeAlias = Callable[[str], None]  # is told why a child has ended


class DecoderEndedError(Exception):
    """The child ended, took too long or sent a wrong reply, and has been replaced; *reason* says which.

    *reason* is `TIME`, `WRONG_REPLY`, `EXIT`, the name of a signal, or `UNKNOWN` if its template ended, too.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.is_limit = reason in {TIME, WRONG_REPLY}  # of this program: the image is the cause
        self.is_kill = reason in {signal.SIGKILL.name, UNKNOWN}  # of the system or a user


def reason_of(code: int) -> str:
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


def is_stopped(process: int) -> bool:
    """Tell whether *process* was stopped, as by SIGSTOP; False where the system does not tell."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == "T"


class Template:
    """The process that forks the children; it is started when it is first needed. Thread-safe."""

    def __init__(self, program: str = DECODER_MODULE) -> None:
        self._program = program
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def fork(self, options: child.ChildOptions) -> tuple[socket.socket, int]:
        """Fork a child, or raise `RuntimeUnavailableError`; return the socket to it and its id."""
        request = json.dumps(options._asdict()).encode()
        ours, theirs = socket.socketpair()
        message = "the decoder processes do not start"
        with theirs, self._lock, ExitStack() as stack:
            stack.callback(ours.close)  # unless a child has the other end
            try:
                try:
                    process, code = self._ask(request, [theirs.fileno()])
                except OSError:  # the template has ended; the second try starts a new one
                    process, code = self._ask(request, [theirs.fileno()])
            except BrokenPipeError as error:
                raise RuntimeUnavailableError(f"{message}; see the message above") from error
            except OSError as error:
                raise RuntimeUnavailableError(
                    f"{message} ({error.strerror}); check the limits of this system"
                ) from error
            if process == 0:
                raise RuntimeUnavailableError(f"{message} ({os.strerror(code)}); allow more processes")
            stack.pop_all()
        return ours, process

    def end(self, process: int) -> int:
        """Kill the child *process*; return its exit code, or that with which it had ended before.

        If the template has ended, its children have ended with it, and the code is `UNKNOWN_CODE`.
        """
        with self._lock, suppress(OSError):
            return self._ask(str(process).encode(), [])[1]
        return child.UNKNOWN_CODE

    @property
    def process(self) -> int | None:
        """The id of the process of the template, if there is one."""
        process = self._process
        return None if process is None else process.pid

    def close(self) -> None:
        """End the template and its children."""
        with self._lock:
            self._close()

    def _ask(self, message: bytes, descriptors: list[int]) -> tuple[int, int]:
        """Send *message* and *descriptors* to the template, which is started if needed; return its reply.

        The reply has the id of a child and its exit code, as `TEMPLATE_REPLY` says.

        An `OSError` ends the template. The caller holds the lock.
        """
        control = self._control or self._start()
        try:
            socket.send_fds(control, [message], descriptors)
            reply = control.recv(child.TEMPLATE_REPLY.size, socket.MSG_WAITALL)
            if len(reply) != child.TEMPLATE_REPLY.size:
                raise BrokenPipeError
        except OSError:
            self._close()
            raise
        process, code = child.TEMPLATE_REPLY.unpack(reply)
        return process, code

    def _start(self) -> socket.socket:
        """Start the template, which gets nothing of this process but the modules; return the socket to it."""
        control, end = socket.socketpair()
        control.settimeout(START_SECONDS)
        path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100 - an entry may be empty
        code = f"import sys; sys.path[:] = {path!r}; from {self._program} import main; main()"
        with end:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", code, str(end.fileno())],  # -I: ignores the user's site-packages
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"OPENBLAS_NUM_THREADS": "1"},  # no secrets, and no threads: a fork would lose them
                pass_fds=[end.fileno()],
                cwd="/",
                start_new_session=True,  # Ctrl-C ends only the server, which decodes until it has drained
            )
        self._control = control
        threading.Thread(target=_log_errors, args=(self._process,), name="stderr", daemon=True).start()
        return control

    def _close(self) -> None:
        if self._control is not None and self._process is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
        self._control = self._process = None


def _log_errors(process: "subprocess.Popen[bytes]") -> None:
    """Log what *process* and its children write to standard error, until they have ended."""
    with cast(BinaryIO, process.stderr) as pipe:
        while text := os.read(pipe.fileno(), 1 << 16):
            log.warning("decoder: %s", text.decode(errors="replace").strip()[-LOGGED_CHARACTERS:])


@functools.cache
def shared_template() -> Template:
    """Return the template of this process; it ends with this process."""
    template = Template()
    atexit.register(template.close)
    return template


@functools.lru_cache(maxsize=64)
def _write_rules(preprocess: Preprocess) -> bytes:
    return preprocess.model_dump_json().encode()


class DecoderProcess:
    """One child, which is replaced when it fails. Not thread-safe."""

    def __init__(
        self,
        template: Template,
        options: child.ChildOptions,
        seconds: float,
        on_end: OnEnd = lambda _reason: None,
    ) -> None:
        """Start a child that may take *seconds* for an image; *on_end* is called when it is replaced.

        Raises `RuntimeUnavailableError` if it does not start, `ConfigError` if a required sandbox is missing.
        """
        self._template, self._options, self._seconds, self._on_end = template, options, seconds, on_end
        self._end: socket.socket | None = None
        self._number = self.process = 0  # number of the last request; id of the child
        self.restrictions = self._start()

    def decode(self, image: bytes, preprocess: Preprocess) -> Decoded:
        """Decode *image* as `decode` does; also raises `LargerImageError` and `DecoderEndedError`."""
        shape = (preprocess.crop, preprocess.crop, 3)
        sizes = range(math.prod(shape), math.prod(shape) + 1)  # only one is valid
        bits, pixels = self._request(image, _write_rules(preprocess), child.PIXELS, sizes)
        warnings = tuple(name for index, name in enumerate(child.WARNINGS) if bits & (1 << index))
        return Decoded(np.frombuffer(pixels, np.uint8).reshape(shape), warnings)

    def copy(self, image: bytes) -> tuple[bytes, str]:
        """Copy *image* as `copy_without_metadata` does; raises what `decode` raises."""
        is_png, copy = self._request(image, b"", child.COPY, sizes=range(MAX_COPY_BYTES + 1))
        return copy, ".png" if is_png else ".jpg"

    def _request(self, image: bytes, rules: bytes, expected: int, sizes: range) -> tuple[int, bytes]:
        """Send *image* and *rules* to the child; return the bits and the data of its reply.

        That reply has the kind *expected* and one of *sizes* bytes of data. Raises what `decode` raises.
        """
        end = self._idle_end()
        self._number += 1
        header = child.REQUEST.pack(self._number, len(rules), len(image))
        deadline = time.monotonic() + self._seconds
        try:
            end.sendall(header + rules)
            end.sendall(image)
            number, kind, bits, num_bytes = child.REPLY.unpack(child.receive(end, child.REPLY.size, deadline))
            error_kinds = range(child.FIRST_ERROR, child.FIRST_ERROR + len(child.ERRORS))
            is_known = kind in {expected, child.LARGER, *error_kinds}
            valid_sizes = sizes if kind == expected else range(child.MAX_MESSAGE + 1)
            if number != self._number or not is_known or num_bytes not in valid_sizes:
                raise DecoderEndedError(self._replace(WRONG_REPLY))
            data = child.receive(end, num_bytes, deadline)
        except (BlockingIOError, TimeoutError) as error:  # BlockingIOError: after the timeout of the socket
            raise DecoderEndedError(self._replace(TIME)) from error
        except OSError as error:
            raise DecoderEndedError(self._replace()) from error
        if kind == expected:
            return bits, data
        if kind == child.LARGER:
            raise child.LargerImageError
        code, status = child.ERRORS[kind - child.FIRST_ERROR]
        raise ImageError(data.decode(errors="replace"), code=code, status=status)

    def close(self) -> None:
        """End the child."""
        if self._end is not None:
            self._end.close()
            self._end = None

    def _idle_end(self) -> socket.socket:
        """Return the socket; first replace a child that has ended or sent more than its replies."""
        reason = ""
        if self._end is not None:
            try:
                if self._end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):  # nothing: it has ended
                    reason = WRONG_REPLY
            except BlockingIOError:  # nothing to read: the child waits for a request
                return self._end
            except OSError:  # the child has ended
                pass
        reason = self._replace(reason)
        if self._end is None:
            raise DecoderEndedError(reason)
        return self._end

    def _replace(self, reason: str = "") -> str:
        """Start another child for one that has ended for *reason*, by default that of its exit code."""
        if self._end is None:  # the child was not replaced the last time
            reason = UNKNOWN
        else:
            self.close()
            code = self._template.end(self.process)
            reason = reason or reason_of(code)
            self._on_end(reason)
        try:
            self._start()
        except (ConfigError, RuntimeUnavailableError) as error:  # the next image tries again
            log.error("a decoder process is not replaced: %s", error)
        return reason

    def _start(self) -> str:
        """Fork a child, whose id is `process`; return its restrictions, or `no sandbox` and the reason."""
        end, self.process = self._template.fork(self._options)
        with ExitStack() as stack:
            stack.callback(end.close)  # unless everything below succeeds
            limit = struct.pack("@ll", int(self._seconds), int((self._seconds % 1) * 1e6))  # struct timeval
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            try:
                deadline = time.monotonic() + START_SECONDS
                _, kind, _, size = child.REPLY.unpack(child.receive(end, child.REPLY.size, deadline))
                text = child.receive(end, min(size, child.MAX_MESSAGE), deadline).decode()
            except OSError as error:
                message = "a decoder process does not start; see the message above"
                raise RuntimeUnavailableError(message) from error
            if kind != child.READY and self._options.sandbox == "required":
                raise ConfigError(f"sandbox=required: {text}; set sandbox=auto")
            stack.pop_all()
        self._end = end
        return text if kind == child.READY else f"no sandbox ({text})"
