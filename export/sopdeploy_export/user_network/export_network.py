"""Export any PyTorch classifier, with the same proof, checks and bundle as a network of the catalog."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from shlex import join
from typing import Any

from torch import nn

from sopdeploy.base.project import check_project_name
from sopdeploy.bundle.decision import Decision
from sopdeploy.bundle.manifest import PixelComparison
from sopdeploy.data.photos.outputs import check_takes_output
from sopdeploy.errors import CertificateError, ConfigError, DetachError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.admit.network import (
    check_tensors,
    check_torch_state,
    prepared,
    unwrap_and_check,
)
from sopdeploy_export.admit.outputs import check_trained_are_registered
from sopdeploy_export.capture.deployed import EXPORT_LOGITS, EXPORT_TWO_CLASSES
from sopdeploy_export.network import tensors
from sopdeploy_export.options import ExportOptions, Takes
from sopdeploy_export.pack.results import Exported
from sopdeploy_export.pipeline import Captured, check_photos, export_subject
from sopdeploy_export.pixels.compare import PixelCheck
from sopdeploy_export.pixels.transform import Transform
from sopdeploy_export.progress import reporting
from sopdeploy_export.prove.constants import check_constants
from sopdeploy_export.prove.networks import Compared
from sopdeploy_export.subject import Detachment, ExportSubject
from sopdeploy_export.user_network.admission import Admitted, admit, check_labels
from sopdeploy_export.user_network.rules import (
    choose_rules,
    read_pixels,
    warn_of_published_rules,
)


def export_network(
    trained: nn.Module,
    *,
    plain: Callable[[], nn.Module] | None = None,
    rebuild: Callable[[], nn.Module] | None = None,
    training_only: str | Sequence[str] = (),
    labels: Sequence[str],
    preprocess: Preprocess | None = None,
    transform: Callable[..., Any] | Transform | None = None,
    destination: str | Path,
    name: str,
    logits_key: str | int | None = None,
    allow_constants: bool = False,
    several_classes: bool = False,
    transform_takes: Takes | None = None,
    allow_other_pixels: bool = False,
    rename: Callable[[str], str] | None = None,
    options: ExportOptions | None = None,
    config: Mapping[str, Any] | None = None,
    sha256: str | None = None,
    warnings: Sequence[str] = (),
    on_step: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Export *trained* as a bundle, and prove that the exported network is the *plain* network.

    The network is as before afterwards. It receives float32 images (B, 3, H, W), normalized
    as *preprocess* says, and returns (B, classes) logits. If it takes gray images (B, 1, H, W) alone, it
    receives these, also if *preprocess* does not say so.

    Args:
        trained: The network as it was trained.
        plain: Builds the network that must remain, with any weights. With `None` the certificate compares
            less; `docs/own-network.md` says what it then cannot show.
        rebuild: Builds *trained* again, with any weights. Without *plain*, the certificate compares with this
            network, from which the same parts are removed.
        training_only: Dotted name of the part to remove, or a pattern such as `aux*`; several in a list.
        labels: Class names, in the order of the logits. A network with one logit takes two names: first the
            class of label 0, then the class of label 1, whose probability is the sigmoid of the logit.
        preprocess: Converts an image to the input of the network. By default, its rules are read from
            *transform*, or else from the `pretrained_cfg` that networks of timm have.
        transform: The transform of the validation: a callable that takes a Pillow image, an array or a path, and
            returns a tensor (3, S, S). Its pixels are compared with those of a server.
        destination: Folder for the bundle.
        name: Name of the network and, without `options.name`, of the project: at most 200 letters, digits,
            `.`, `_` and `-`, the first not `.`.
        logits_key: Attribute, key or index of the logits, if the network returns more than one tensor.
        allow_constants: Accept tensors of more than 16 numbers that are neither parameters nor buffers.
            Otherwise, they are accepted only if *plain* or *rebuild* makes new ones with equal content.
        several_classes: An image may have several classes. The sigmoid of a logit is the probability of its
            class, and the class is present from a probability of 0.5.
        transform_takes: What *transform* takes: "pillow", an array in "rgb" or "bgr", or a "path"; by
            default, it is tried out.
        allow_other_pixels: Export although a server's pixels are not those of *transform*; the bundle records
            how they differ.
        rename: Maps the name of a tensor of *trained* to its name in the plain network.
        options: Batch sizes, precision and more; `detach` is set if *training_only* names a part.
        config: Description of the network in the manifest; by default its class, its logits, *training_only*.
        sha256: Hash of the weight file; by default of the tensors.
        warnings: Put before the warnings of the export in the result.
        on_step: Called with a description of each step as it begins.

    Returns:
        The path of the bundle and the results of all checks; `certificate.proof` says which networks were
        compared.

    Raises:
        ConfigError: An argument is invalid.
        DetachError: An item of *training_only* names no part, or there is no item although
            `options.detach` is set.
        LoweringError: The network cannot be exported; the message says why.
        CertificateError: A statement of the proof does not hold.
        SopdeployError: Another step failed. Then nothing is left in *destination*, or only the bundle,
            if the page about it cannot be written.

    Examples:
        >>> import timm
        >>> build = lambda: timm.create_model("test_resnet", num_classes=3)
        >>> exported = sopdeploy.export_network(
        ...     build(),
        ...     plain=build,
        ...     labels=["rings", "stripes", "dots"],
        ...     preprocess=sopdeploy.Preprocess(crop=64),
        ...     destination="bundles",
        ...     name="small",
        ... )
        >>> exported.certificate.proof
        'trained-plain'
    """
    started = time.monotonic()

    # Check the arguments.
    if options is None:
        options = ExportOptions()
    training_only = [training_only] if isinstance(training_only, str) else training_only
    check_project_name(name)
    if preprocess is not None and not isinstance(preprocess, Preprocess):
        raise ConfigError(
            f"is a {type(preprocess).__name__}, not a Preprocess", setting="preprocess"
        )
    check_labels(labels)
    check_takes_output(Path(destination), "destination")

    # The rules, and the pixels of the training.
    trained_pixels = read_pixels(transform, transform_takes)
    rules_warnings = warn_of_published_rules(trained, preprocess, trained_pixels)
    preprocess = choose_rules(trained, preprocess, trained_pixels)
    options = options.model_copy(update={"detach": options.detach or bool(training_only)})
    decision: Decision | None = None
    if several_classes:
        decision = Decision(activation="sigmoid", thresholds=(0.5,) * len(labels))
    accuracy_check = check_photos(options, preprocess, tuple(labels), decision)
    pixel_check = None
    if trained_pixels is not None:
        photos = None
        if accuracy_check is not None and options.evaluate is not None:
            photos = accuracy_check.photos
        pixel_check = PixelCheck(trained_pixels, photos, allowed=allow_other_pixels)
        pixel_check.check_size(preprocess)
        rules_warnings += trained_pixels.warn_of_kinds(preprocess)

    with reporting(on_step), prepared(trained, training_only, logits_key) as network:
        # Check and capture the network. A single logit tells two classes apart.
        if len(labels) == 2 and not several_classes:
            vars(network)[EXPORT_TWO_CLASSES] = True
        admitted = admit(
            network,
            preprocess,
            classes=len(labels),
            training_only=training_only,
            several_classes=several_classes,
            options=options,
        )
        preprocess = admitted.preprocess

        if not allow_constants:
            check_trained_are_registered(admitted.trained.trace)

        # What it is compared with: the plain network, or itself built again.
        builder = rebuild if plain is None else plain
        build_checked: Callable[[], nn.Module] | None = None
        if builder is not None:
            build_checked = checked_builder(builder, network)
        elif not allow_constants:  # with a builder, `export_subject` checks them
            check_constants(admitted.trained.trace.program)
        detachment = Detachment(
            training_only=admitted.parts,
            plain=build_checked,
            role="plain" if plain is not None else "rebuilt",
            rename=rename or str,
            allow_constants=allow_constants,
        )
        removable_warnings = _warn_of_removable(admitted, detach=options.detach)

        # What the bundle records of it.
        if config is None:
            config = {
                "network": f"{type(network).__module__}.{type(network).__qualname__}",
                "logits": logits_key,
                "training_only": list(training_only),
            }

        subject = ExportSubject(
            name=name,
            project=options.name or name,
            network=network,
            detachment=detachment,
            labels=tuple(labels),
            preprocess=preprocess,
            config=config,
            sha256=_hash_network(admitted.trained) if sha256 is None else sha256,
            decision=decision,
            compare_pixels=partial(
                _compare_pixels,
                pixel_check,
                network,
                preprocess,
                several_classes=several_classes,
            ),
            warnings=(
                *warnings,
                *rules_warnings,
                *_describe_two_classes(admitted, labels),
                *(_warn_of_two_normalizations(admitted) if pixel_check is None else ()),
                *admitted.warnings,
                *removable_warnings,
            ),
        )
        return export_subject(
            subject,
            Path(destination),
            options,
            lambda: Captured(admitted.trained, admitted.plain),
            accuracy_check,
            started,
        )


def _compare_pixels(
    check: PixelCheck | None, network: nn.Module, rules: Preprocess, *, several_classes: bool
) -> PixelComparison | None:
    """Run *check* for *network* and its *rules*; None without a check."""
    if check is None:
        return None
    return check.run(network, rules, several_classes=several_classes)


def _warn_of_two_normalizations(admitted: Admitted) -> tuple[str, ...]:
    """Return a warning if the network seems to normalize images that the rules have normalized."""
    rules = admitted.preprocess
    if not admitted.normalizes_itself or (set(rules.mean) == {0} and set(rules.std) == {1}):
        return ()
    return (
        "the network shifts or scales its input itself, so images may be normalized twice: give the transform of "
        "the validation (--transform) or, if it takes values from 0 to 1, the preprocessing rules none",
    )


def _describe_two_classes(admitted: Admitted, labels: Sequence[str]) -> tuple[str, ...]:
    """Return a warning that says what the single logit of a network tells, if it becomes two logits."""
    if not admitted.is_completed:
        return ()
    first, second = labels
    return (
        f"the network has one logit: its sigmoid is the probability of {second}, and 1 minus it is the "
        f"probability of {first}; if it is the other way round, swap the names",
    )


def _warn_of_removable(admitted: Admitted, *, detach: bool) -> tuple[str, ...]:
    """Return a warning that names the parts that could be removed, too; no warning if there are none.

    With *detach*, the user wants parts to be removed. If the user named none of them
    (`--training-only`), it raises `DetachError` instead: it names those that could be removed,
    or says that there are none.
    """
    removable = admitted.removable
    problem = f"the output does not depend on {', '.join(removable)}"

    if detach and not admitted.parts:
        if not removable:
            raise DetachError(
                "the output depends on every part of the network; omit it", setting="detach"
            )
        words = [word for name in removable for word in ("--training-only", name)]
        raise DetachError(f"{problem}; add {join(words)}")

    if not removable:
        return ()
    return (f"{problem}; name it as training-only to prove its removal",)


def checked_builder(
    build: Callable[[], nn.Module], trained: nn.Module
) -> Callable[[], nn.Module]:
    """Return a function that builds the network of *build*, unwrapped, on the CPU and in eval mode.

    Its outputs are chosen as those of *trained*, which is `prepared`. The function raises
    `CertificateError` if this network shares memory with *trained*, and `LoweringError` if it is
    not accepted.
    """

    def addresses(network: nn.Module) -> set[int]:
        return {tensor.data_ptr() for tensor in tensors(network).values() if tensor.numel()}

    def build_checked() -> nn.Module:
        built = unwrap_and_check(build(), "plain")
        check_torch_state()  # which the builder can change
        if addresses(built) & addresses(trained):
            raise CertificateError(
                "the builder returns tensors of the trained network, as a builder "
                "does that keeps its network in a variable; build a new network at each call"
            )
        check_tensors(built)
        built.cpu().eval()
        # For `compute_outputs`, as of the trained network.
        for attribute in (EXPORT_LOGITS, EXPORT_TWO_CLASSES):
            if attribute in vars(trained):
                vars(built)[attribute] = vars(trained)[attribute]
        return built

    return build_checked


def _hash_network(trained: Compared) -> str:
    """Hash the names and contents of all tensors of *trained*."""
    lines = [f"{name} {sha256}\n" for name, sha256 in sorted(trained.hashes.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
