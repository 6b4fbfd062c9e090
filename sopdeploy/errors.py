"""All errors that sopdeploy raises for users. Exit codes, codes and HTTP statuses: docs/errors.md."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePath
from shlex import quote
from typing import Any

# What errors of torch mean for the code of a network.
_REMEDIES = (
    (
        re.compile(r"NVIDIA driver|compiled with CUDA|No (?:CUDA|HIP) GPUs|CUDA driver"),
        "its code asks for a GPU, as .cuda() does, and none is usable here; write .to(x.device) "
        "or device=x.device instead",
    ),
    (
        re.compile(r"expected input\[\d+, [13], .*?\] to have ([13]) channels"),
        r"its first convolution takes images with another number of channels; set channels of preprocess to \1",
    ),
    (
        re.compile(r"expected input\[\d+, [13], .*?\] to have (\d+) channels"),
        r"its first convolution takes images with \1 channels, and preprocess makes 3 (RGB) or 1 (gray); "
        "compute the others in the network",
    ),
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Sentences with what a library asks of its own users.
_OF_THE_LIBRARY = re.compile(r"https?://|\bplease\b|\bfile an? \w+|\breport\b", re.IGNORECASE)
_MAX_LISTED = 10  # names in a message
# characters; files of others can have names of any length
_MAX_MESSAGE = 4_000
_MAX_END = 500


def python_argument(setting: str, value: object = None) -> str:
    """Write *setting* as an argument of a Python function, `max_batch=64`; without a value `max_batch`."""
    shown = str(value) if isinstance(value, PurePath) else value
    return setting if value is None else f"{setting}={shown!r}"


def command_line_option(setting: str, value: object = None, keys: Collection[str] = ()) -> str:
    """Write *setting* as an option of the command line, `--max-batch 64` or `--no-detach`.

    One of *keys* is written as `--set int8_for=tensorrt`, without a value as `--set int8_for=VALUE`.
    """
    if setting in keys:
        if isinstance(value, bool):
            value = str(value).lower()
        return f"--set {setting}={'VALUE' if value is None else quote(str(value))}"

    flag = setting.replace("_", "-")
    if value is None or value is True:
        return f"--{flag}"
    return f"--no-{flag}" if value is False else f"--{flag} {quote(str(value))}"


class SopdeployError(Exception):
    """Base class. The message is one line that names the file or value and the next step.

    The message does not name settings, because Python, the command line and HTTP write them
    differently. They are attributes instead, and `describe` adds them to the message.

    Attributes:
        code: stable identifier for scripts.
        message: the message without the settings.
        setting: the setting that the error is about, named as in Python, such as `max_batch`.
        value: the value of *setting*, if the message should show it.
        remedies: settings that may help, with the values to try; None stands for a value of the user.
        lists: all names, by what they are, of lists that the message shortens; `--json` prints them.
        status: the matching HTTP status; 0 if there is none.
    """

    code: str = "failed"
    exit_code: int = 2

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        status: int = 0,
        setting: str | None = None,
        value: object = None,
        remedies: Mapping[str, object] | None = None,
        lists: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if len(message) > _MAX_MESSAGE:  # the end says what to do
            message = f"{message[: _MAX_MESSAGE - _MAX_END]}...{message[-_MAX_END:]}"

        super().__init__(message)
        self.code = code or self.code
        self.status = status
        self.message = message
        self.setting = setting
        self.value = value
        self.remedies = dict(remedies or {})
        self.lists = {name: list(values) for name, values in (lists or {}).items() if values}

    def __str__(self) -> str:
        return self.describe()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error by its attributes, whatever arguments its class takes."""
        return _restore, (type(self), self.args), self.__dict__

    def describe(self, write: Callable[[str, object], str] = python_argument) -> str:
        """Return the message with its settings; *write* formats a setting and its value."""
        text = self.message
        if self.setting is not None:
            text = f"{write(self.setting, self.value)}: {text}"
        if self.remedies:
            text += " try " if text.endswith(",") else "; try "
            text += " or ".join(write(name, value) for name, value in self.remedies.items())
        return text


class ConfigError(SopdeployError):
    """Invalid value in a recipe, config or option."""

    code = "wrong_value"


class MissingPackageError(SopdeployError):
    """A package of an extra that is not installed."""

    code = "not_installed"


class DataError(SopdeployError):
    """Unusable data folder or image file."""

    code = "unusable_data"


class CheckpointError(SopdeployError):
    """The file is not a sopdeploy checkpoint, is unsafe or is damaged."""

    code = "unusable_checkpoint"


class WeightsError(SopdeployError):
    """A weight file of another project is unreadable or belongs to another network."""

    code = "unusable_weights"


class TrainingError(SopdeployError):
    """Training cannot continue, for example because the loss is not finite."""

    code = "training_failed"


class DetachError(SopdeployError):
    """The network still has training-only modules, or a module that you named does not exist."""

    code = "wrong_detach"


class CertificateError(SopdeployError):
    """The network without its removed parts differs from the plain network."""

    code = "not_certified"


class LoweringError(SopdeployError):
    """The network has no ONNX form that all runtimes accept."""

    code = "not_lowered"


class ParityError(SopdeployError):
    """The exported file and its network compute different numbers."""

    code = "numbers_differ"


class BundleError(SopdeployError):
    """Files and manifest of a bundle do not match."""

    code = "unusable_bundle"


class PromotionError(SopdeployError):
    """The images do not show that a bundle is as good as the current one, or there is no bundle to go back to."""

    code = "not_promoted"


class EngineError(SopdeployError):
    """A TensorRT engine cannot be built, or differs from the request."""

    code = "no_engine"


class RuntimeUnavailableError(SopdeployError):
    """No runtime on this machine can run the bundle."""

    code = "no_runtime"


class StorageError(SopdeployError):
    """A file cannot be read or written: no space, no permission, a read-only disk, or its name is in use."""

    code = "no_storage"


class NoMemoryError(SopdeployError):
    """The memory of the machine or of the GPU is too small for this work."""

    code = "no_memory"


class ImageError(SopdeployError):
    """An image cannot be used; `status` is the matching HTTP status."""

    code = "unusable_image"


class ServiceError(SopdeployError):
    """An error of a server, with its `code` and HTTP `status` (0 if no response came)."""

    code = "service_error"


class OverloadedError(ServiceError):
    """The server, or a proxy in front of it, refused each attempt until the call timed out (408, 429, 502, 503, 504).

    *retry_after* is the delay in seconds that the last response requested, 0 if none.
    """

    code = "overloaded"

    def __init__(
        self, message: str, *, code: str, status: int, retry_after: float = 0.0
    ) -> None:
        super().__init__(message, code=code, status=status)
        self.retry_after = retry_after


class UnreachableError(ServiceError):
    """The server did not respond, or not before the deadline."""

    code = "unreachable"


def _restore(kind: type[SopdeployError], arguments: tuple[Any, ...]) -> SopdeployError:
    """Create an error of *kind*, which gets its attributes next."""
    return kind.__new__(kind, *arguments)


def is_memory_exhausted(error: BaseException) -> bool:
    """Tell whether *error* of Python, NumPy, torch or a runtime means that memory is exhausted."""
    torch_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    torch_gpu = type(error).__name__ == "OutOfMemoryError"  # torch is not imported here
    return isinstance(error, MemoryError) or torch_cpu or torch_gpu


def first_line(error: BaseException) -> str:
    """Describe *error*, from a library or the user's code, in one line that says what it is.

    The line has its type and the first line of its message that is left without what the library
    asks of its own users, such as to file an issue. For the errors of `_REMEDIES`, it says what to do instead.
    """
    if known := describe_known(error):
        return known

    for line in str(error).splitlines():
        sentences = _SENTENCE_END.split(line.strip())
        kept = " ".join(each for each in sentences if not _OF_THE_LIBRARY.search(each))
        if kept:
            return f"{type(error).__name__}: {kept}"
    return type(error).__name__


def describe_known(error: BaseException) -> str | None:
    """Say what *error* means for the code of a network, and what to do; None unless it is in `_REMEDIES`."""
    for cause, remedy in _REMEDIES:
        if match := cause.search(str(error)):
            return match.expand(remedy)
    return None


def amount(number: int, noun: str, sign: str = "") -> str:
    """Write a number with its *noun*, whose plural ends in s; *sign* "+" also marks positive numbers."""
    return f"{number:{sign},} {noun}{'' if abs(number) == 1 else 's'}"


def shorten(names: Sequence[str], separator: str = ", ") -> str:
    """Join the first ten of *names* for a message, and count the others."""
    more = len(names) - _MAX_LISTED
    shown = separator.join(names[:_MAX_LISTED])
    return f"{shown} and {more} more" if more > 0 else shown


def with_hint(message: str, hint: str) -> str:
    """Return *message* with the *hint* behind it, if there is one."""
    return f"{message}; {hint}" if hint else message


def shorten_problems(problems: Sequence[str]) -> str:
    """Join *problems*, texts `PLACE: REASON`, for a message: each reason once, as `shorten` does.

    A reason stands behind its place, or in front of several places.
    """
    places_by_reason: dict[str, list[str]] = {}
    for problem in problems:
        place, _, reason = problem.partition(": ")
        places_by_reason.setdefault(reason, []).append(place)

    texts = []
    for reason, places in places_by_reason.items():
        listed = shorten(places)
        if reason:  # what to do, before many names
            listed = f"{listed}: {reason}" if len(places) == 1 else f"{reason}: {listed}"
        texts.append(listed)
    return shorten(texts, "; ")
