"""Importers of PyTorch projects: networks of torchvision, ResNets for CIFAR, fast-MPN-COV and GSoP.

fast-MPN-COV publishes files with torchvision's names and `layer_reduce`; its training
checkpoints number the parts. GSoP's files have torchvision's names and those of the blocks in
the last bottleneck of a stage.
"""

import importlib
import math
from dataclasses import replace

from sopdeploy.base.config import FieldValues
from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.backbones.resnet import BLOCKS, STAGES
from sopdeploy.models.gsop import RELEASED
from sopdeploy.models.registry import CATALOG
from sopdeploy.weights.conversion import ConvertedWeights, WeightFile, rename_tensors
from sopdeploy.weights.timm_files import FROM_HUB_CONFIG, read_hub_config

# by project: a part of a tensor's name, and ours
RENAMES: dict[str, dict[str, str]] = {
    "fast-MPN-COV": {
        "features.0.": "conv1.",
        "features.1.": "bn1.",
        **{f"features.{stage + 3}.": f"layer{stage}." for stage in range(1, 5)},
        "features.8.": "pooling.layer_reduce.",
        "features.9.": "pooling.layer_reduce_bn.",
        "representation.conv_dr_block.0.": "pooling.layer_reduce.",
        "representation.conv_dr_block.1.": "pooling.layer_reduce_bn.",
        "layer_reduce": "pooling.layer_reduce",
        "classifier.": "fc.",
    },
    "VGG-16": {
        "representation.conv_dr_block.0.": "pooling.layer_reduce.",
        "representation.conv_dr_block.1.": "pooling.layer_reduce_bn.",
        "features.": "layers.",
    },
    "GSoP": {
        "layer_reduce": "pooling.layer_reduce",
        ".conv_for_DR.": ".attention.channel.reduction.0.",
        ".bn_for_DR.": ".attention.channel.reduction.1.",
        ".row_bn.": ".attention.channel.excitation.row_bn.",
        ".row_conv_group.": ".attention.channel.excitation.row_conv.",
        ".fc_adapt_channels.": ".attention.channel.excitation.conv.",
        ".conv_for_DR_spatial.": ".attention.position.reduction.0.",
        ".bn_for_DR_spatial.": ".attention.position.reduction.1.",
        ".row_bn_for_spatial.": ".attention.position.excitation.row_bn.",
        ".row_conv_group_for_spatial.": ".attention.position.excitation.row_conv.",
        ".fc_adapt_channels_for_spatial.": ".attention.position.excitation.conv.",
        ".dilate_conv_for_concat1.": ".attention.fusion.conv_channel.",
        ".dilate_conv_for_concat2.": ".attention.fusion.conv_position.",
        ".bn_for_concat.": ".attention.fusion.bn.",
    },
    "pytorch_resnet_cifar10": {"linear.": "fc.", ".shortcut.": ".downsample."},
}
_TITLES = {"isqrt": "iSQRT-COV on ", "bcnn": "B-CNN on ", "gap": ""}
STRIDE_UNKNOWN = (
    "its arch does not determine the stride of conv5_x: 1 for mpncovresnet50, 2 for resnet50"
)
CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
VGG_CHANNELS = 512
VGG_FLATTENED = 512 * 7 * 7
SUM_OR_MAXIMUM = (
    "sum and maximum (the code's fusion_avg and fusion_max) have the same tensors; choose one"
)


def find_resnet_depth(file: WeightFile) -> int:
    """Find the depth of the ResNet in *file*; raises `WeightsError`."""
    # Pairs of a stage and a block, such as ("layer3", "0").
    blocks = {tuple(name.split(".")[:2]) for name in file.tensors if "." in name}
    stages = [stage for stage, _ in blocks]  # each stage once per block
    counts = tuple(stages.count(stage) for stage in STAGES)
    has_bottlenecks = "layer1.0.conv3.weight" in file.tensors

    for depth, expected_counts in BLOCKS.items():
        if counts == expected_counts and has_bottlenecks == (depth not in {18, 34}):
            return depth
    problem = f"a ResNet of {counts} {'bottlenecks' if has_bottlenecks else 'basic blocks'} is not in the catalog"
    raise WeightsError(f"{file.path}: {problem}; `sopdeploy models` lists the networks")


def name_network(family: str, depth: int, *, fallback: int) -> str:
    """Name a network: "resnet20", or "resnet20 --option depth=32" if the catalog has no "resnet32"."""
    name = f"{family}{depth}"
    return name if name in CATALOG else f"{family}{fallback} --option depth={depth}"


def find_preprocess(name: str, file: WeightFile) -> tuple[Preprocess, tuple[str, ...]]:
    """Find the preprocessing of the *file* of torchvision's network *name*, with a note on its origin.

    torchvision publishes some networks twice, with different preprocessing; its file names end
    in the first eight digits of the SHA-256. For other files the config.json of timm's hub next
    to the file applies, or else, without a note, the usual resize to 256 and crop of 224.
    """
    models = importlib.import_module("torchvision.models")
    # torchvision has no resnet26.
    published = models.get_model_weights(name) if name in models.list_models() else ()
    for weights in published:
        if weights.url.endswith(f"-{file.sha256[:8]}.pth"):
            preprocess = Preprocess.from_torchvision(weights.transforms())
            return preprocess, (f"preprocessing of torchvision's {weights}",)

    config = read_hub_config(file.path)
    return (Preprocess.from_timm(config), (FROM_HUB_CONFIG,)) if config else (Preprocess(), ())


def convert_resnet(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert a ResNet of torchvision, or of fast-MPN-COV with iSQRT-COV or B-CNN; None for other files.

    Raises `WeightsError` for a ResNet whose depth or pooling the catalog does not have.
    """
    renamed = replace(file, tensors=rename_tensors(file, RENAMES["fast-MPN-COV"]))
    if not {"conv1.weight", "layer4.0.conv1.weight", "fc.weight"} <= renamed.tensors.keys():
        return None

    # Depth, widths and pooling from the shapes of the tensors.
    depth = find_resnet_depth(renamed)
    channels = len(renamed.tensor(f"layer4.0.bn{2 if depth in {18, 34} else 3}.weight"))
    classes, length = renamed.tensor("fc.weight").shape
    detected: FieldValues = {"depth": depth, "base_width": len(renamed.tensor("conv1.weight"))}
    detected |= detect_pooling(renamed, channels, length)
    pooling = detected["pooling.kind"]
    triangles = {"fc.weight": detected["pooling.width"]} if pooling == "isqrt" else {}

    model = name_network("isqrt-resnet" if pooling == "isqrt" else "resnet", depth, fallback=50)
    if pooling == "bcnn":
        model += " --option pooling=bcnn"

    # The files of fast-MPN-COV with average pooling are training checkpoints, where conv1 is
    # `features.0`.
    is_torchvision = pooling == "gap" and "conv1.weight" in file.tensors
    project = "torchvision" if is_torchvision else "fast-MPN-COV"

    # The stride of conv5_x changes no shape.
    undetermined = {}
    if not is_torchvision:  # torchvision's networks have the default stride
        if stride := find_conv5_stride(file, depth):
            detected["conv5_stride"] = stride
        else:
            undetermined["conv5_stride"] = STRIDE_UNKNOWN

    preprocess, notes = find_preprocess(f"resnet{depth}", file)

    return ConvertedWeights(
        project=project,
        description=f"{_TITLES[pooling]}ResNet-{depth} of {project}",
        model=model,
        tensors=renamed.tensors,
        triangles=triangles,
        num_classes=classes,
        preprocess=preprocess,
        detected=detected,
        undetermined=undetermined,
        notes=notes,
    )


def find_conv5_stride(file: WeightFile, depth: int) -> int | None:
    """Find the stride of conv5_x in a file of fast-MPN-COV; None if neither tensors nor `arch` determine it.

    It is 1 with the convolution `layer_reduce`, which training checkpoints call `features.8`.
    Otherwise an `arch` like `mpncovresnet50` has stride 1, and one like `resnet50`, trained
    with the pooling, stride 2.
    """
    if "layer_reduce.weight" in file.tensors or "features.8.weight" in file.tensors:
        return 1
    return {f"mpncovresnet{depth}": 1, f"resnet{depth}": 2}.get(file.arch or "")


def detect_pooling(renamed: WeightFile, channels: int, length: int) -> FieldValues:
    """Find the config of the pooling that maps *channels*, or the reduced ones, to *length* numbers.

    *renamed* has our tensor names. Raises `WeightsError` if no supported pooling does.
    """
    reduction = renamed.tensors.get("pooling.layer_reduce.weight")
    width = channels if reduction is None else len(reduction)
    if length == width * (width + 1) // 2:
        return {"pooling.kind": "isqrt", "pooling.width": width}

    # The average and bilinear pooling of fast-MPN-COV never reduce the channels.
    if reduction is None and length in {channels, channels**2}:
        return {"pooling.kind": "gap" if length == channels else "bcnn"}
    raise WeightsError(
        f"{renamed.path}: no supported pooling maps {width} channels to the "
        f"{length} inputs of the classifier (compact bilinear pooling is not "
        "supported: its random parts are not stored)"
    )


def convert_vgg(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert VGG-16 of torchvision or, with iSQRT-COV or B-CNN, of fast-MPN-COV; None for other files.

    Raises `WeightsError` for a VGG of another depth, or with a pooling that is not supported.
    """
    # The classifier is one linear layer, or the layers 0, 3 and 6 of the module `classifier`.
    is_linear = "classifier.weight" in file.tensors
    first, last = (
        ("classifier", "classifier") if is_linear else ("classifier.0", "classifier.6")
    )
    classifier = file.tensors.get(f"{first}.weight")
    if classifier is None or "features.0.weight" not in file.tensors:
        return None

    # Only the networks with 13 convolutions are VGG-16.
    renamed = replace(file, tensors=rename_tensors(file, RENAMES["VGG-16"]))
    convolutions = sum(
        name.startswith("layers.") and t.dim() == 4 for name, t in renamed.tensors.items()
    )
    if convolutions != 13:
        raise WeightsError(
            f"{file.path}: a VGG with {convolutions} convolutions, not 13; give VGG-16"
        )

    # The classifier's inputs tell what is in front of it.
    length = classifier.shape[1]
    if length == VGG_FLATTENED:
        project = "torchvision"
        option = ""
        pooling: FieldValues = {"pooling.kind": "flatten"}
    else:  # the classifier reads the vector of a global pooling
        project = "fast-MPN-COV"
        pooling = detect_pooling(renamed, VGG_CHANNELS, length)
        option = f" --option pooling={pooling['pooling.kind']}"

    batch_norm = "features.1.running_mean" in file.tensors
    name = "vgg16-bn" if batch_norm else "vgg16"
    preprocess, notes = find_preprocess(name.replace("-", "_"), file)
    detected = {
        **pooling,
        "classifier": "linear" if is_linear else "mlp",
        "batch_norm": batch_norm,
    }
    triangles = {}
    if "pooling.width" in pooling:  # of a covariance
        triangles = {f"{first}.weight": pooling["pooling.width"]}

    return ConvertedWeights(
        project=project,
        description=f"VGG-16 of {project}, {'with' if batch_norm else 'without'} batch norm",
        model=name + option,
        tensors=renamed.tensors,
        triangles=triangles,
        num_classes=len(file.tensor(f"{last}.weight")),
        preprocess=preprocess,
        detected=detected,
        notes=notes,
    )


def convert_cifar_resnet(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert a ResNet of pytorch_resnet_cifar10, with 6n + 2 layers; None for other files."""
    # Three stages: files of ImageNet's ResNets have four.
    sources = file.tensors.keys()
    known = {"conv1.weight", "layer3.0.conv1.weight", "linear.weight"} <= sources
    if not known or any(source.startswith("layer4.") for source in sources):
        return None

    # Two convolutions a block, three stages, and one layer before and after them.
    blocks = {source.split(".")[1] for source in sources if source.startswith("layer1.")}
    depth = 6 * len(blocks) + 2
    has_projections = any(".shortcut." in source for source in sources)

    return ConvertedWeights(
        project="pytorch_resnet_cifar10",
        description=f"ResNet-{depth} for CIFAR of pytorch_resnet_cifar10",
        model=name_network("resnet", depth, fallback=20),
        tensors=rename_tensors(file, RENAMES["pytorch_resnet_cifar10"]),
        num_classes=len(file.tensor("linear.weight")),
        preprocess=Preprocess(resize=32, crop=32),
        detected={
            "depth": depth,
            "pooling.kind": "gap",
            "base_width": len(file.tensor("conv1.weight")),
            "shortcut": "projection" if has_projections else "pad",
        },
        class_names=CIFAR10,
    )


def convert_gsop(file: WeightFile, _model: str) -> ConvertedWeights:
    """Convert GSoP-Net1, or GSoP-Net2, which has `layer_reduce` and triangle vectors column by column."""
    depth = find_resnet_depth(file)
    detected = {
        "depth": depth,
        "base_width": len(file.tensor("conv1.weight")),
        **_detect_block_options(file),
    }

    # Without `attention`, it is the sum or the maximum, and the user must choose.
    attention = detected.get("attention")
    reduction = file.tensors.get("layer_reduce.weight")
    net = 1 if reduction is None else 2

    triangles = {}
    if reduction is None:
        detected["final_pooling"] = "gap"
    else:
        detected |= {"final_pooling": "isqrt", "final_width": len(reduction)}
        triangles = {"fc.weight": len(reduction)}

    return ConvertedWeights(
        project="GSoP",
        description=f"GSoP-Net{net} on ResNet-{depth}, {attention or 'sum or maximum'} blocks",
        model=name_network(f"gsop-net{net}-resnet", depth, fallback=50),
        tensors=rename_tensors(file, RENAMES["GSoP"]),
        triangles=triangles,
        by_columns=True,
        num_classes=len(file.tensor("fc.weight")),
        detected=detected,
        defaults=RELEASED,
        undetermined={} if attention else {"attention": SUM_OR_MAXIMUM},
    )


def _detect_block_options(file: WeightFile) -> FieldValues:
    """Determine the options of the blocks.

    `attention` is missing if it is the sum or the maximum, whose files have the same tensors.
    """
    # The lengths of the weights. `layer4.2.conv_for_DR.weight` is under `conv_for_DR`, alike in
    # all blocks.
    lengths = {
        name.split(".")[-2]: len(tensor)
        for name, tensor in file.tensors.items()
        if name.endswith(".weight")
    }

    stages = sorted({name.partition(".")[0] for name in file.tensors if ".conv_for_DR" in name})
    if "conv_for_DR_spatial" not in lengths:  # no block has a position-wise half
        return {
            "block_stages": stages,
            "cov_width": lengths["conv_for_DR"],
            "attention": "channel",
        }

    width = lengths["conv_for_DR_spatial"]
    side = math.isqrt(lengths["row_bn_for_spatial"])  # the root of the number of positions
    config: FieldValues = {"block_stages": stages, "cov_width": width, "position_side": side}
    if "conv_for_DR" not in lengths:  # no block has a channel-wise half
        config["attention"] = "position"
    elif "dilate_conv_for_concat1" in lengths:
        config["attention"] = "concatenation"

    return config
