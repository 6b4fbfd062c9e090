"""Every error a user can meet, on one page.

SopdeployError              one line: what, where, what to do; the CLI ends with exit code 2
 +- ConfigError             a value in a recipe, a config or an option is wrong
 +- DataError               a data folder or an image in it cannot be used
 +- CheckpointError         the file is not a sopdeploy checkpoint, is unsafe or is damaged
 +- WeightsError            a weight file of another project cannot be read or is another network
 +- TrainingError           training cannot go on (a number is no longer finite, say)
 +- DetachError             there is nothing to detach, or a training-only name does not exist
 +- CertificateError        what is left after detaching is not the plain network
 +- LoweringError           the network has no ONNX form that every runtime accepts
 +- ParityError             the exported file gives other numbers than the network
 +- BundleError             files and manifest of a bundle disagree
 +- EngineError             a TensorRT engine cannot be built, or is not what was asked for
 +- RuntimeUnavailableError no runtime on this machine can run the bundle
 +- StorageError            a disk is full, or somebody else's, or only reads
 +- ImageError              a picture cannot be used; the service answers with its own 4xx
 +- ServiceError            a server answered with an error; has the problem's code and status
 +- OverloadedError         a ServiceError: the server refused for now, and went on refusing
 +- UnreachableError        a ServiceError: no answer came at all, or none in time
"""


class SopdeployError(Exception):
    """Shown to the user as it is; names the file or value and the next step.

    `code` is stable: scripts may ask for it, a kind keeps the one it has. `told` where several processes
    compute together: another one has shown the same line.
    """

    code: str = "failed"
    told: bool = False


class ConfigError(SopdeployError):
    """A value in a recipe, a config or an option is wrong."""

    code = "wrong_value"


class DataError(SopdeployError):
    """A data folder or an image in it cannot be used."""

    code = "unusable_data"


class CheckpointError(SopdeployError):
    """The file is not a sopdeploy checkpoint, is unsafe or is damaged."""

    code = "unusable_checkpoint"


class WeightsError(SopdeployError):
    """A weight file of another project cannot be read or is another network."""

    code = "unusable_weights"


class TrainingError(SopdeployError):
    """Training cannot go on."""

    code = "training_failed"


class DetachError(SopdeployError):
    """There is nothing to detach, or a training-only name does not exist."""

    code = "wrong_detach"


class CertificateError(SopdeployError):
    """What is left after detaching is not the plain network."""

    code = "not_certified"


class LoweringError(SopdeployError):
    """The network has no ONNX form that every runtime accepts."""

    code = "not_lowered"


class ParityError(SopdeployError):
    """The exported file gives other numbers than the network it came from."""

    code = "numbers_differ"


class BundleError(SopdeployError):
    """Files and manifest of a bundle disagree."""

    code = "unusable_bundle"


class EngineError(SopdeployError):
    """A TensorRT engine cannot be built, or is not what was asked for."""

    code = "no_engine"


class RuntimeUnavailableError(SopdeployError):
    """No runtime on this machine can run the bundle."""

    code = "no_runtime"


class StorageError(SopdeployError):
    """A file cannot be read or written: no space, no permission, a medium that only reads."""

    code = "no_storage"


class ImageError(SopdeployError):
    """A picture cannot be used.

    `code` is stable and machine-readable; `status` is the HTTP answer that fits it.
    """

    code = "unusable_image"

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class ServiceError(SopdeployError):
    """A server answered with an error.

    `code` is the stable one of the problem that it sent; `status` is the HTTP status, 0 where there was no
    answer.
    """

    code = "service_error"

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class OverloadedError(ServiceError):
    """The server refused for now (429, 503), and went on until there was no time or attempt left.

    `retry_after` is how many seconds it asked to wait the last time; 0 where it said nothing.
    """

    code = "overloaded"

    def __init__(self, message: str, *, code: str, status: int, retry_after: float = 0.0) -> None:
        super().__init__(message, code=code, status=status)
        self.retry_after = retry_after


class UnreachableError(ServiceError):
    """No answer came, or none before the deadline."""

    code = "unreachable"
