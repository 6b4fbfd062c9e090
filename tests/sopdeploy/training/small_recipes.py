"""Settings that shrink the network and the images of every packaged recipe."""

import pytest

from sopdeploy.models import dsop_networks  # noqa: F401 (copies the stages before they are patched)
from sopdeploy.models.backbones import alexnet_vgg, cifar_resnet, efficientnet, resnet

HEADS = "aux_widths=[8,8,8], iterations=2"
DSOP = ["model.name=dsop-resnet8", f"model.config={{{HEADS}}}"]
PLAIN = ["model.name=resnet8", "model.config={}"]
GATED = (
    "blocks_per_stage=1, conv5_stride=1, components=4, chosen=2, component_widths=[6], gate_widths=[], "
    "iterations=2, balance_weight=100"
)
AT_16 = ["preprocess.resize=20", "preprocess.crop=16"]
AT_32 = ["preprocess.resize=36", "preprocess.crop=32"]
AT_64 = ["preprocess.resize=72", "preprocess.crop=64"]
FROM_SCRATCH = ["start.weights=none"]
LITE = "width=0.1, depth=0.1"  # of EfficientNet-Lite
ISQRT = ["model.name=resnet8", 'model.config={pooling={kind="isqrt", width=8, iterations=2}}']
SIDES_16 = [*AT_16, "augment.sides=[20,30]"]
SMALL: dict[str, list[str]] = {
    "cifar10-dsop-resnet20": DSOP,
    "cifar10-dsop-resnet20-adahessian": DSOP,
    "cifar10-dsop-resnet20-radam": DSOP,
    "cifar10-gmsop-resnet20": [f"model.config={{{GATED}}}"],
    "cifar10-gsop-resnet20": ["model.config={blocks=1, cov_width=32, iterations=2}"],
    "cifar10-isqrt-resnet20": ISQRT,
    "cifar100-dsop-preact-resnet": [f"model.config={{blocks=1, {HEADS}}}"],
    "cifar100-dsop-wrn": [f"model.config={{blocks=1, widen=1, {HEADS}}}"],
    "cifar100-dsop-resnext": [f"model.config={{cardinality=1, group_width=4, {HEADS}}}"],
    "digits-dsop": ["batch_size=720"],
    "digits-gmsop": ["batch_size=720", f"model.config={{{GATED}}}"],
    "digits-gsop-net1": ["batch_size=720", "model.config={blocks=1, cov_width=32}"],
    "digits-gsop-net2": [
        "batch_size=720",
        "model.config={blocks=1, cov_width=32, iterations=2}",
    ],
    "digits-isqrt": ["batch_size=720", *ISQRT],
    "digits-plain": ["batch_size=720"],
    "fine-grained-isqrt-resnet50": [*ISQRT, *AT_16],
    "fine-grained-two-phase": [*ISQRT, *AT_16, "start.classifier_epochs=1"],
    "fine-tune-dsop": [*DSOP, *AT_16, *FROM_SCRATCH],
    "fine-tune-gmsop": ["model.name=gmsop-head:resnet8", *AT_16, *FROM_SCRATCH],
    "fine-tune-gsop": [f"model.config={{{LITE}, cov_width=32}}", *AT_64, *FROM_SCRATCH],
    "fine-tune-isqrt": [*PLAIN, *AT_16, *FROM_SCRATCH],
    "fine-tune-plain": [*PLAIN, *AT_16, *FROM_SCRATCH],
    "imagenet-distilled-resnet50": [*PLAIN, *SIDES_16, "teacher.model={name='resnet8'}"],
    "imagenet-distilled-seresnext101": [*PLAIN, *SIDES_16, "teacher.model={name='resnet8'}"],
    "imagenet-resnet50": [*PLAIN, *SIDES_16],
    "imagenet-dsop-efficientnet-b0": [
        "model.config={iterations=2}",
        *AT_32,
        "schedule.warmup_epochs=0.0",
    ],
    "imagenet-dsop-resnet18": [*DSOP, *SIDES_16],
    "imagenet-dsop-resnet18-adahessian": [*DSOP, *SIDES_16],
    "imagenet-dsop-resnet18-radam": [*DSOP, *SIDES_16],
    "imagenet-dsop-resnet50": [*DSOP, *SIDES_16],
    "imagenet-dsop-two-phase": [*DSOP, *SIDES_16],
    "imagenet-gsop-resnet50": [
        "model.name=gsop-net2-preact-resnet164",
        'model.config={blocks=2, cov_width=32, block_stages=["layer3"], final_width=8, iterations=2}',
        *AT_16,
    ],
    "imagenet-isqrt-resnet50": [*ISQRT, *AT_16],
    "imagenet-psdr-resnet50": [
        "model.config={depth=18, width=8, iterations=2}",
        *AT_32,
        "augment.sides=[36,48]",
    ],
    "imagenet64-gmsop-resnet18": [f"model.config={{{GATED}}}", *AT_16],
    "photos": [*DSOP, *AT_16, *FROM_SCRATCH, "procedure.kind=loop"],
    "photos-dsop": [*DSOP, *AT_16],
    "places365-gmsop-resnet18": [f"model.config={{{GATED}}}", *AT_16, "augment.sides=[20,20]"],
}


def few_blocks(patch: pytest.MonkeyPatch) -> None:
    """Reduce nearly all stages to one block, because each block adds a second to an export."""
    patch.setitem(resnet.BLOCKS, 18, (1, 1, 1, 1))
    patch.setitem(resnet.BLOCKS, 26, (1, 1, 1, 1))
    patch.setattr(cifar_resnet, "RESNEXT_BLOCKS", 1)
    patch.setattr(alexnet_vgg, "VGG_STAGES", ((16, 16), (32,), (32,), (32,), (32,)))
    stages = {
        name: stage._replace(blocks=1) for name, stage in efficientnet.MBCONV_STAGES.items()
    }
    stages["blocks.1"] = efficientnet.MBCONV_STAGES["blocks.1"]
    patch.setattr(efficientnet, "MBCONV_STAGES", stages)
