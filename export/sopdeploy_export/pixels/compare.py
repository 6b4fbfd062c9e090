"""Compare the pixels of a training with those that the server gives the network.

`TrainedPixels` runs the transform of the training on the photos of this package. `PixelCheck` compares them
with what preprocessing rules give, through the decoding of the server (`sopdeploy.images.decode`) and the first
layer of the graph (`Deployed`), and counts the classes that change.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.bundle.manifest import PixelComparison
from sopdeploy.errors import ConfigError, SopdeployError, first_line
from sopdeploy.images.decode import decode
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.capture.deployed import Deployed, compute_outputs
from sopdeploy_export.network import attributes_restored
from sopdeploy_export.pixels.colors import Colors, measure_colors
from sopdeploy_export.pixels.differences import Difference, measure
from sopdeploy_export.pixels.explain import describe_differences, find_rules, pixels_of
from sopdeploy_export.pixels.photos import ALPHA, CMYK, EXIF, GRAY, UPRIGHT, draw_photo
from sopdeploy_export.pixels.transform import Transform

_COMPARED = (*UPRIGHT, EXIF)
_OTHER_KINDS = (GRAY, CMYK, ALPHA)  # whose conversion no rules describe
_BATCH = 8
# Photos of the user whose classes are compared: few if only rounding differs, which seldom changes a class
_MOST_PHOTOS = 500
_FEW_PHOTOS = 4


class TrainedPixels:
    """The pixels that *transform* gives photos, with its colors.

    Raises `ConfigError` if it gives no square, if it is random, or if no rules can say what it does to the
    values of pixels.
    """

    def __init__(self, transform: Transform) -> None:
        self.transform = transform
        self.colors: Colors = measure_colors(transform)

        # Its side decides the size of the photos.
        height, width = transform(draw_photo(EXIF, 64)).shape[1:]
        if height != width:
            raise ConfigError(
                f"gives {width} x {height} pixels; only squares are supported",
                setting="transform",
                value=transform.name,
            )
        self.side = width
        self.tensors = {kind: transform(draw_photo(kind, width)) for kind in _COMPARED}
        if any(
            not transform(draw_photo(kind, width)).equal(self.tensors[kind]) for kind in UPRIGHT
        ):
            raise ConfigError(
                "gives other pixels at a second call; give the transform of the validation, without "
                "random changes",
                setting="transform",
                value=transform.name,
            )

    @property
    def takes_files(self) -> bool:
        """Whether the transform reads files itself."""
        return self.transform.takes == "path"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The photos that are compared: turning by EXIF is the work of a transform that reads files itself."""
        return _COMPARED if self.takes_files else UPRIGHT

    @cached_property
    def levels(self) -> dict[str, NDArray[np.float32]]:
        """The pixels, 0 to 255, of each photo that is compared."""
        return {kind: self.colors.to_levels(tensor) for kind, tensor in self.tensors.items()}

    def find_rules(self, start: Preprocess | None = None) -> Preprocess | None:
        """Return the rules that give these pixels, from its steps or from *start*; None if no rules do."""
        steps, _ = self._read_steps
        for likely in [start] if steps is None else [steps, start]:
            rules = find_rules(self.levels, self.colors, likely, takes_files=self.takes_files)
            if rules is not None:
                return rules
        return None

    @cached_property
    def _read_steps(self) -> tuple[Preprocess | None, str]:
        """The rules that the steps of torchvision or timm say; None and why not, if they say none."""
        if self.transform.library not in ("torchvision", "timm"):
            return None, ""
        try:
            return Preprocess.from_torchvision(self.transform.call), ""
        except ConfigError as error:
            return None, f" ({error.message})"

    def read_rules(self) -> Preprocess:
        """Return the rules that give these pixels; raises `ConfigError` if no rules do."""
        rules = self.find_rules()
        if rules is None:
            raise ConfigError(
                f"no preprocessing rules give its pixels{self._read_steps[1]}; give the nearest ones as preprocess",
                setting="transform",
                value=self.transform.name,
            )
        return rules

    def describe(self, rules: Preprocess) -> tuple[str, ...]:
        """Say how these pixels differ from those of *rules*; empty if only rounding differs."""
        own_colors = Preprocess(
            **{
                **rules.model_dump(),
                "channels": self.colors.channels,
                "mean": self.colors.mean,
                "std": self.colors.std,
                "color_order": self.colors.order,
            }
        )
        has_colors = not describe_differences(own_colors, rules)
        if has_colors and all(each.is_rounding for each in self.measure(rules).values()):
            return ()

        own = self.find_rules(rules)
        if own is not None:
            return describe_differences(own, rules)
        most = max(self.measure(own_colors).values())
        by = (
            "another size"
            if most.mean == float("inf")
            else f"{most.mean:.0f} of 255 on average"
        )
        return (
            *describe_differences(own_colors, rules),
            f"gives pixels that differ by {by}, which no rules explain{self._read_steps[1]}",
        )

    def measure(self, rules: Preprocess, *, as_served: bool = False) -> dict[str, Difference]:
        """Measure how far these pixels are from those of *rules*, for each photo.

        Unless *as_served*, all pixels of a JPEG are decoded: the decoding "fast" differs on purpose.
        """
        if not as_served:
            rules = rules.model_copy(update={"decoding": "full"})
        return {
            kind: measure(self.levels[kind], pixels_of(draw_photo(kind, self.side), rules))
            for kind in self.kinds
        }

    def warn_of_kinds(self, rules: Preprocess) -> tuple[str, ...]:
        """Return a warning for each kind of file that the transform converts otherwise than a server."""
        if not self.takes_files:
            return ()
        warnings = []
        for kind in _OTHER_KINDS:
            photo = draw_photo(kind, self.side)
            try:
                levels = self.colors.to_levels(self.transform(photo))
            except ConfigError as error:
                warnings.append(
                    f"{kind}: {self.transform.name} {error.message}; the server accepts it"
                )
                continue
            difference = measure(levels, pixels_of(photo, rules))
            if not difference.is_rounding:
                warnings.append(
                    f"{kind} gets other pixels from {self.transform.name} than from the server "
                    f"({difference.mean:.0f} of 255 on average)"
                )
        return tuple(warnings)


class PixelCheck:
    """Compares *trained* pixels with those of the rules of a network, and its classes for both.

    *photos* returns at most so many files of the user, on which classes are counted; without it, those of this
    package are. Pixels that differ are an error unless they are *allowed*.
    """

    def __init__(
        self,
        trained: TrainedPixels,
        photos: Callable[[int], Iterator[bytes]] | None,
        *,
        allowed: bool,
    ) -> None:
        self.trained = trained
        self.allowed = allowed
        self._photos = photos

    def check_size(self, rules: Preprocess) -> None:
        """Raise `ConfigError` if the pixels have another size than *rules*, which many networks cannot run."""
        if self.trained.side != rules.crop and not self.allowed:
            raise self._refuse(self.trained.describe(rules), "")

    def run(
        self, network: nn.Module, rules: Preprocess, *, several_classes: bool
    ) -> PixelComparison:
        """Compare the pixels and the classes of *network*, which is admitted with *rules*.

        With *several_classes*, the classes of an image are those with a positive logit. Raises `ConfigError`
        if pixels differ by more than rounding.
        """
        differences = self.trained.describe(rules)
        photos: Iterator[bytes]
        if self._photos is None:
            photos = (draw_photo(kind, self.trained.side) for kind in self.trained.kinds)
        else:
            photos = self._photos(_MOST_PHOTOS if differences else _FEW_PHOTOS)
        is_changed = [
            changed
            for batch in _batches(photos)
            for changed in _are_changed(
                network, self.trained.transform, rules, batch, several_classes=several_classes
            )
        ]
        measured = self.trained.measure(rules, as_served=True).values()
        comparison = PixelComparison(
            transform=self.trained.transform.name,
            num_images=len(is_changed),
            num_changed=sum(is_changed),
            largest_difference=min(255.0, round(max(each.largest for each in measured), 2)),
            differences=differences,
        )
        if differences and not self.allowed:
            raise self._refuse(differences, f"; {comparison.describe_classes()}")
        return comparison

    def _refuse(self, differences: Sequence[str], classes: str) -> ConfigError:
        """Return the error of pixels with *differences*, which change *classes*."""
        return ConfigError(
            f"gives other pixels than the preprocessing rules: it {'; it '.join(differences)}{classes}; "
            "omit preprocess, so that the rules come from the transform, or accept this",
            setting="transform",
            value=self.trained.transform.name,
            remedies={"allow_other_pixels": True},
        )


def _are_changed(
    network: nn.Module,
    transform: Transform,
    rules: Preprocess,
    photos: Sequence[bytes],
    *,
    several_classes: bool,
) -> list[bool]:
    """Tell for which *photos* the pixels of *transform* and of *rules* give other classes by *network*."""
    deployed = Deployed(network, rules).eval()
    served = torch.from_numpy(np.stack([decode(photo, rules).pixels for photo in photos]))
    trained = torch.stack([transform(photo) for photo in photos])
    trained = trained.contiguous(memory_format=deployed.normalise.memory_format)

    with torch.no_grad(), attributes_restored(network):
        after = deployed(served)[0]
        try:
            before = compute_outputs(network, trained)[0]
        except SopdeployError:
            raise
        except Exception as error:  # the user's code
            raise ConfigError(
                f"the network fails for its tensor {(*trained.shape,)} ({first_line(error)})",
                setting="transform",
                value=transform.name,
            ) from error
    changed = _classes(before, several_classes) != _classes(after, several_classes)
    return changed.any(dim=1).tolist()


def _classes(logits: Tensor, several: bool) -> Tensor:
    """Return the most probable class (B, 1) of *logits* (B, C) or, with *several*, which are present (B, C)."""
    return logits > 0 if several else logits.argmax(dim=1, keepdim=True)


def _batches(photos: Iterator[bytes]) -> Iterator[list[bytes]]:
    while batch := [*islice(photos, _BATCH)]:
        yield batch
