"""Options of an export and of an engine build."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pydantic

from sopdeploy.base.config import NonNegative, Options
from sopdeploy.base.project import Name
from sopdeploy.bundle.manifest import BatchRange, Int8For, Precision
from sopdeploy.errors import ConfigError

BatchSize = Annotated[int, pydantic.Field(ge=1, le=1_000_000)]
Takes = Literal["pillow", "rgb", "bgr", "path"]  # what a transform of the training takes
USUAL_BATCH = 8  # the batch size that equivalent forms of a layer are chosen for


class ExportOptions(Options):
    """Options of `sopdeploy.export`, `sopdeploy.export_network` and `sopdeploy export`.

    Raises:
        ConfigError: Options that are invalid or do not fit together.

    Examples:
        >>> options = sopdeploy.ExportOptions(detach=True, max_batch=16)
        >>> options.precision
        'fp32'
    """

    GROUPS: ClassVar = {"Precision and limits": (*("precision", "calibrate", "evaluate"),)}
    KEYS: ClassVar = (
        *("int8_for", "max_drop", "trained_logits"),
        *("allow_numerical_error", "allow_batch_dependence"),
    )

    name: Name = None
    """Name of the project; by default the name of the checkpoint or, for your own network, of its weight file."""
    detach: bool = False
    """Remove auxiliary branches, which only training uses, and prove equivalence."""
    max_batch: BatchSize = 64
    """Largest batch that the bundle must accept."""
    allow_numerical_error: bool = False
    """Write the bundle although the numerical error of an output exceeds its tolerance, and record it."""
    precision: Precision = "fp32"
    """Precision of the graph."""
    calibrate: Path | None = None
    """Folder of images to calibrate int8 ranges."""
    int8_for: Int8For = "cpu"
    """Runtime to quantize for, with int8."""
    evaluate: Path | None = None
    """Folder of images by class, to compare top-1 with top-1 in float32."""
    max_drop: NonNegative = 1.0
    """Largest allowed loss of top-1 (or of agreement, without labels) in percentage points."""
    allow_batch_dependence: bool = False
    """Write the bundle although its logits may depend on other images of the batch, and record it."""
    with_features: bool = False
    """Add the vector in front of the last linear layer, which the service returns for /v1/embed."""
    trained_logits: bool = False
    """Write the logits as trained; the prediction divides them by the temperature, instead of the classifier."""

    @property
    def batch(self) -> BatchRange:
        """Batch sizes that the bundle must accept."""
        return BatchRange(optimum=min(USUAL_BATCH, self.max_batch), maximum=self.max_batch)

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> "ExportOptions":
        """Raise `ConfigError` for an option without effect, and for int8 without images that calibrate."""
        if self.precision != "int8":
            for name in ("calibrate", "int8_for"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ConfigError("only with precision int8", setting=name)
        elif self.calibrate is None:
            raise ConfigError(
                "int8 needs images to measure ranges on",
                setting="precision",
                remedies={"calibrate": None},  # without a value: only the user knows the folder
            )

        is_measured = self.calibrate is not None or self.evaluate is not None
        if self.max_drop != type(self).model_fields["max_drop"].default and not is_measured:
            raise ConfigError(
                "needs images to measure on", setting="max_drop", remedies={"evaluate": None}
            )
        return self


class NetworkOptions(Options):
    """How to build a network of the user and to read its weights from a file."""

    KEYS: ClassVar[tuple[str, ...]] = ("logits_key", "ignore", "allow_constants")

    network: str | None = None
    """Builder of the network, package.module:callable; timm:NAME; or transformers for a folder of save_pretrained."""
    option: tuple[str, ...] = ()
    """Option KEY=VALUE of the network, a Python literal or text; repeatable."""
    preprocess: str | None = None
    """imagenet, timm, clip or none, each also as NAME:SIDE; timm:NAME, torchvision:WEIGHTS or FILE.json.

    fast:RULES is one of these: large JPEGs are decoded at a smaller scale, and images are resized in an eighth of
    the time.
    """
    weights_key: str | None = None
    """Key or prefix of the tensors to use, if the file has several networks, such as model_ema. `.` is not a key."""
    ignore: tuple[str, ...] = ()
    """Entry of the weight file to ignore, or a pattern, because the network has no such tensor; repeatable."""
    logits_key: str | None = None
    """Attribute, key or index of the logits, if the network returns several tensors."""
    allow_constants: bool = False
    """Accept large tensors that are neither weights nor buffers."""
    several_classes: bool = False
    """An image may have several classes: sigmoids turn the logits into probabilities."""


class NetworkExportOptions(NetworkOptions):
    """How to export a network of the user."""

    GROUPS: ClassVar = {
        "Your own network": (
            *(
                "network",
                "option",
                "labels",
                "preprocess",
                "transform",
                "training_only",
                "plain",
                "plain_option",
                "weights_key",
            ),
        )
    }

    KEYS: ClassVar = (*NetworkOptions.KEYS, "transform_takes", "allow_other_pixels")

    transform: str | None = None
    """Transform of the validation, package.module:callable. The export compares its pixels with the server's,
    and without --preprocess, it reads the rules from it."""
    transform_takes: Takes | None = None
    """What the transform takes: a Pillow image, an array in RGB or BGR, or a path; by default, it is tried out."""
    allow_other_pixels: bool = False
    """Write the bundle although the server's pixels differ from the transform's, and record how."""
    plain: str | None = None
    """Builder of the network without auxiliary branches, package.module:callable."""
    plain_option: tuple[str, ...] = ()
    """Option KEY=VALUE of the plain network, a Python literal or text; repeatable."""
    training_only: tuple[str, ...] = ()
    """Auxiliary branch to remove, or a pattern such as 'aux*'; repeatable."""
    labels: Path | None = None
    """File with one class name per line, or in JSON; by default class_to_idx of the weight file."""

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> "NetworkExportOptions":
        """Raise `ConfigError` for an option without effect: without a network, or without a plain one."""
        if self.network is None:
            for name, field in type(self).model_fields.items():
                if getattr(self, name) != field.default:
                    raise ConfigError(
                        "works only with a network of your own",
                        setting=name,
                        remedies={"network": None},  # without a value: only the user knows it
                    )

        if self.plain_option and self.plain is None:
            raise ConfigError(
                "works only with a plain network",
                setting="plain_option",
                remedies={"plain": None},
            )
        return self


class EngineOptions(Options):
    """Options of `sopdeploy engine`."""

    KEYS: ClassVar = ("allow_numerical_error", "via", "checkpoint", "cache")

    allow_numerical_error: bool = False
    """Store the engine although the numerical error of an output exceeds its tolerance, and record it."""
    via: Literal["onnx", "torch-tensorrt"] = "onnx"
    """Converter: TensorRT's ONNX parser, or torch-tensorrt, which needs the checkpoint."""
    checkpoint: Path | None = None
    """Checkpoint of the bundle, for torch-tensorrt."""
    profiles: str | None = None
    """Largest batch of each optimization profile, such as 1,8,32."""
    cache: Path | None = None
    """Engine cache folder; by default $SOPDEPLOY_ENGINE_CACHE, or engines/ next to the bundle."""

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> "EngineOptions":
        """Raise `ConfigError` for a checkpoint that the ONNX parser would not read."""
        if self.via == "onnx" and self.checkpoint is not None:
            remedies = {"via": "torch-tensorrt"}
            raise ConfigError(
                "only for torch-tensorrt", setting="checkpoint", remedies=remedies
            )
        return self
