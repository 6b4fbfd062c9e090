"""The steps from fresh weights to an exported file, for every model of the catalog."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sopdeploy.bundle.manifest import BatchRange, Precision
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import create_model
from sopdeploy.training.loop.losses import training_loss
from sopdeploy.weights.checkpoint import build_classifier, read_checkpoint
from sopdeploy_export.capture.deployed import (
    Deployed,
    export_images,
    generated_images,
    output_names,
)
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.export_checkpoint import export_checkpoint
from sopdeploy_export.lower.constant_parts import fold_constant_parts
from sopdeploy_export.lower.precision import NO_IMAGES, Lowered, UserImages, convert_precision
from sopdeploy_export.lower.to_onnx import lower
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.results import Exported
from sopdeploy_export.prove.file import FileContent, ParityReport, prove_file
from sopdeploy_export.prove.graphs import prove_graph
from sopdeploy_export.prove.images import run_file
from sopdeploy_export.prove.networks import Compared, build_plain
from sopdeploy_export.prove.reference import ParityReference, compute_reference
from sopdeploy_export.runs import open_session, run_probes
from sopdeploy_export.subject import Detachment
from tests.export.conftest import save

TRAINED_ON = 4
FEW = BatchRange(optimum=2, maximum=3)


class Small(NamedTuple):
    """A small configuration of a catalog model, for images of *side* pixels."""

    name: str
    side: int
    config: Mapping[str, Any] = MappingProxyType({})
    classes: int = 3

    def build(self) -> Classifier:
        """Build the network in train mode, with fixed weights."""
        torch.manual_seed(3)
        return create_model(self.name, num_classes=self.classes, **self.config)

    def trained(self, path: Path) -> Path:
        """Train one step and write the checkpoint *path*."""
        network = self.build()
        assert one_training_step(network, self.side)
        labels = tuple(f"class {number}" for number in range(self.classes))
        return save(
            network, self.name, path, Preprocess(resize=self.side, crop=self.side), labels
        )


def one_training_step(network: Classifier, side: int) -> bool:
    """Train one step on random images; return whether the loss and all gradients were finite."""
    images = torch.randn(TRAINED_ON, 3, side, side, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(TRAINED_ON) % network.num_classes
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    loss = training_loss(network.train()(images), labels, network.loss_weights()).total
    loss.backward()
    optimizer.step()
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    return bool(gradients) and all(
        bool(torch.isfinite(found).all()) for found in [loss, *gradients]
    )


def loaded(checkpoint: Path) -> Classifier:
    """Load the network of *checkpoint* in eval mode."""
    return build_classifier(read_checkpoint(checkpoint), checkpoint)


def exported(checkpoint: Path, destination: Path) -> Exported:
    """Run the whole export, which captures and converts three networks."""
    options = ExportOptions(
        detach=bool(loaded(checkpoint).training_only), max_batch=FEW.maximum
    )
    return export_checkpoint(checkpoint, destination, options=options)


def agreed(
    checkpoint: Path, destination: Path, precision: Precision = "fp32", batch: BatchRange = FEW
) -> ParityReport:
    """Compare the file with the network; see `measured`."""
    return measured(checkpoint, destination, precision, batch)[1]


def measured(
    checkpoint: Path, destination: Path, precision: Precision = "fp32", batch: BatchRange = FEW
) -> tuple[ParityReference, ParityReport]:
    """Write the file of a checkpoint whose network has the outputs of the plain one.

    The graphs of three networks and their ONNX roots are what `exported` compares beside.
    """
    found = compared(checkpoint)
    options = ExportOptions(precision=precision, max_batch=batch.maximum)
    return write_file(found.network, found.preprocess, destination, options)


def write_file(
    network: nn.Module,
    preprocess: Preprocess,
    destination: Path,
    options: ExportOptions,
    *,
    own: bool = False,
) -> tuple[ParityReference, ParityReport]:
    """Run the steps of an export that make its file and compare it, without the proof of the network.

    That a network of a user's *own* keeps images apart is checked, too.
    """
    certified = lowered(network, preprocess, options)
    found = write_graph(certified, preprocess, destination, options)
    if own:
        images = np.stack([*export_images(preprocess).values()])
        assert not run_file(open_session(destination), images, options.batch).mixing
    return found


def lowered(network: nn.Module, preprocess: Preprocess, options: ExportOptions) -> Lowered:
    """Capture *network* for the batches of *options*, and convert it to ONNX."""
    program = fold_constant_parts(capture_any_batch(network, preprocess, options.batch))
    return Lowered(network, program, lower(program, output_names(network)))


def write_graph(
    certified: Lowered,
    preprocess: Preprocess,
    destination: Path,
    options: ExportOptions,
    user_images: UserImages = NO_IMAGES,
) -> tuple[ParityReference, ParityReport]:
    """Write the graph in the precision of *options*, and compare the file with the network."""
    images = generated_images(preprocess.crop)
    shipping = convert_precision(certified, preprocess, options, user_images)
    destination.write_bytes(shipping.model.SerializeToString(deterministic=True))
    rounded = run_probes(shipping.run, torch.from_numpy(images))
    deployed = Deployed(certified.network, preprocess).eval()
    expected = compute_reference(deployed, images, rounded, options.precision, shipping.gate)
    return expected, prove_file(
        open_session(destination),
        FileContent.of(shipping.model, destination.stat().st_size),
        expected,
        images,
        options.batch,
        allow_numerical_error=options.allow_numerical_error,
    )


class Prepared(NamedTuple):
    """The trained network of a checkpoint, whose outputs equal the plain network's bit for bit."""

    network: nn.Module
    images: NDArray[np.uint8]
    preprocess: Preprocess


def compared(checkpoint: Path) -> Prepared:
    """Load *checkpoint*, and compare it with a newly built plain network with its weights."""
    preprocess = read_checkpoint(checkpoint).preprocess
    images = generated_images(preprocess.crop)
    network = loaded(checkpoint)
    detachment = Detachment.of(network)
    trained = Compared.of("trained", network, preprocess, FEW)
    plain = build_plain(detachment, trained, preprocess, FEW)
    prove_graph(trained, plain)
    expected, outputs = (
        run_probes(each.deployed, torch.from_numpy(images)) for each in (trained, plain)
    )
    assert all(map(torch.equal, outputs, expected))
    return Prepared(network, images, preprocess)
