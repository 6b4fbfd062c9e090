"""Export networks of other people's repositories by `inspect` and the command that it prints.

    python benchmarks/two_commands.py FOLDER [--only NAME]

FOLDER has a checkout of each repository under the last part of its name, and its code stays as
it is. The weights are random, in a file that is made as the repository's training makes it. The
table of docs/benchmarks/networks.md says what the two commands did.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STATE = "net.state_dict()"
RESULTS = "'epoch': 1, 'best_prec1': 1.0"
PARALLEL = f"{{{RESULTS}, 'arch': 'x', 'state_dict': torch.nn.DataParallel(net).state_dict()}}"
SINGLE = f"{{{RESULTS}, 'state_dict': {STATE}}}"
NET = f"{{'net': {STATE}, 'acc': 90.0, 'epoch': 1}}"


class Candidate(NamedTuple):
    """A network, what its training saves as code, and in *code* a module `mine` that builds it, if needed."""

    repository: str
    network: str
    saved: str
    options: tuple[str, ...] = ()
    pixels: int = 32
    logits: str | None = None
    code: str = ""


MIXTURE = """
from torch import nn
from moe import MoE
class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = MoE(input_size=3072, output_size=10, num_experts=10, hidden_size=128, k=4)
    def forward(self, images):
        return self.moe(images.flatten(1))
"""
DARTS = """
import genotypes
from model import NetworkCIFAR
def build():
    net = NetworkCIFAR(8, 10, 5, True, genotypes.DARTS_V2)
    net.drop_path_prob = 0.0
    return net
"""
COVARIANCE = """
from model_init import get_model
from src.representation import MPNCOV
def build():
    pooling = {"function": MPNCOV, "iterNum": 5, "is_sqrt": True, "is_vec": True, "input_dim": 512}
    return get_model("resnet18", {**pooling, "dimension_reduction": 32}, 10, 0)
"""
EXITING = """
from argparse import Namespace
import models
def build():
    scales = {"nScales": 3, "nChannels": 16, "growthRate": 6, "grFactor": [1, 2, 4], "bnFactor": [1, 2, 4]}
    blocks = {"nBlocks": 3, "base": 2, "stepmode": "even", "step": 1, "bottleneck": True}
    return models.msdnet(Namespace(**scales, **blocks, prune="max", reduction=0.5, data="cifar10"))
"""
SIMPLE_VIT = (
    "image_size=32",
    "patch_size=8",
    "num_classes=10",
    "dim=32",
    "depth=2",
    "heads=2",
    "mlp_dim=64",
)
EXITS = ("input_shape=(3,32,32)", "num_classes=10", "starting_filter=2")
CANDIDATES = [
    Candidate(
        "davidmrau/mixture-of-experts", "mine:Classifier", STATE, logits="0", code=MIXTURE
    ),
    Candidate(
        "AberHu/Knowledge-Distillation-Zoo",
        "network:define_tsnet",
        NET,
        ("name=resnet20", "num_class=10", "cuda=False"),
        logits="5",
    ),
    Candidate("quark0/darts/cnn", "mine:build", STATE, logits="0", code=DARTS),
    Candidate("eksuas/eenets.pytorch", "custom_eenet:CustomEENet", "net", EXITS, logits="0"),
    Candidate("lucidrains/vit-pytorch", "vit_pytorch.simple_vit:SimpleViT", STATE, SIMPLE_VIT),
    Candidate(
        "leaderj1001/BottleneckTransformers",
        "model:ResNet50",
        f"{{'model_state_dict': {STATE}, 'global_epoch': 1, 'best_acc': 1.0}}",
        ("num_classes=10", "resolution=(64,64)"),
        64,
    ),
    Candidate("chengyangfu/pytorch-vgg-cifar10", "vgg:vgg11_bn", SINGLE),
    Candidate(
        "luanyunteng/pytorch-be-your-own-teacher",
        "models.resnet:multi_resnet18_kd",
        PARALLEL,
        ("num_classes=10",),
        logits="0",
    ),
    Candidate("jiangtaoxie/fast-MPN-COV", "mine:build", PARALLEL, pixels=64, code=COVARIANCE),
    Candidate(
        "Jongchan/attention-module",
        "MODELS.model_resnet:ResidualNet",
        PARALLEL,
        ("network_type=CIFAR10", "depth=18", "num_classes=10", "att_type=CBAM"),
    ),
    Candidate("akamaster/pytorch_resnet_cifar10", "resnet:resnet20", PARALLEL),
    Candidate("junyuseu/pytorch-cifar-models", "models:resnet20_cifar", SINGLE),
    Candidate(
        "xternalz/WideResNet-pytorch",
        "wideresnet:WideResNet",
        PARALLEL,
        ("depth=10", "num_classes=10", "widen_factor=1"),
    ),
    Candidate(
        "kuangliu/pytorch-cifar", "models.shufflenetv2:ShuffleNetV2", NET, ("net_size=0.5",)
    ),
    Candidate(
        "weiaicunzai/pytorch-cifar100",
        "models.stochasticdepth:stochastic_depth_resnet18",
        STATE,
    ),
    Candidate(
        "bearpaw/pytorch-classification",
        "models.cifar.preresnet:preresnet",
        PARALLEL,
        ("num_classes=10", "depth=20"),
    ),
    Candidate(
        "lukemelas/EfficientNet-PyTorch",
        "efficientnet_pytorch:EfficientNet.from_name",
        PARALLEL,
        ("model_name=efficientnet-b0",),
        64,
    ),
    Candidate(
        "moskomule/senet.pytorch", "senet.se_resnet:se_resnet20", STATE, ("num_classes=10",)
    ),
    Candidate(
        "BangguWu/ECANet", "models.eca_resnet:eca_resnet18", PARALLEL, ("num_classes=10",), 64
    ),
    Candidate(
        "d-li14/mobilenetv2.pytorch",
        "models.imagenet:mobilenetv2",
        PARALLEL,
        ("width_mult=0.35",),
        64,
    ),
    Candidate("kalviny/MSDNet-PyTorch", "mine:build", PARALLEL, logits="-1", code=EXITING),
    Candidate(
        "ArchipLab-LinfengZhang/pytorch-self-distillation-final",
        "resnet:resnet18",
        STATE,
        ("num_classes=10",),
        logits="0.0",
    ),
]
# Networks of further kinds, 2026-11-28
HIGH_RESOLUTION = """
from yacs.config import CfgNode
from models.cls_hrnet import get_cls_net
def stage(branches, block, channels):
    widths = [channels * 2**i for i in range(branches)]
    return {"NUM_MODULES": 1, "NUM_BRANCHES": branches, "BLOCK": block, "NUM_BLOCKS": [1] * branches,
            "NUM_CHANNELS": widths, "FUSE_METHOD": "SUM"}
def build():
    stages = [stage(1, "BOTTLENECK", 32)] + [stage(number, "BASIC", 16) for number in (2, 3, 4)]
    extra = {f"STAGE{number}": each for number, each in enumerate(stages, 1)}
    return get_cls_net(CfgNode({"MODEL": {"EXTRA": extra}}))
"""
FREQUENCIES = """
import sys
import types
import numpy
sys.modules["numpy.lib.arraypad"] = types.SimpleNamespace(pad=numpy.pad)  # of an older NumPy
from gfnet import GFNet
def build():
    return GFNet(img_size=32, patch_size=4, embed_dim=32, depth=2, num_classes=10)
"""
FACES = """
from torch import nn
from resnet import resnet_face18
class Gray(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = resnet_face18(use_se=True)
    def forward(self, images):
        return self.net(images.mean(1, keepdim=True))
"""
CAPSULES = """
from torch import nn
from capsnet import ConvLayer, DigitCaps, PrimaryCaps
class Lengths(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = ConvLayer(3, 32)
        self.primary = PrimaryCaps(8, 32, 8, 9, 8 * 6 * 6)
        self.digits = DigitCaps(10, 8 * 6 * 6, 8, 16)
    def forward(self, images):
        return self.digits(self.primary(self.conv(images))).squeeze(-1).norm(dim=2)
"""
SPLINES = """
from torch import nn
from KANConv import KAN_Convolutional_Layer
from KANLinear import KANLinear
def build():
    layer = KAN_Convolutional_Layer(3, 2, (3, 3))
    return nn.Sequential(layer, nn.MaxPool2d(5), nn.Flatten(), KANLinear(2 * 6 * 6, 10))
"""
STATE_SPACE = """
from torch import nn
from mambapy.vim import MambaConfig, VMamba
class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.mamba = VMamba(MambaConfig(d_model=32, n_layers=2))
        self.head = nn.Linear(32, 10)
    def forward(self, images):
        return self.head(self.mamba(self.patches(images).flatten(2).transpose(1, 2)).mean(1))
"""
AROUND = """
from torch import nn
def around(*layers, channels=32):
    stem = (nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
    head = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stem, *layers, *head, nn.Linear(channels, 10))
"""
MIXED_ATTENTION = f"""{AROUND}
from test_bottleneck import ACmix
def build():
    return around(ACmix(16, 32, head=4))
"""
INVOLUTION = f"""{AROUND}
from involution import Involution2d
def build():
    return around(Involution2d(16, 32, groups=4))
"""
GRAPH = """
from types import SimpleNamespace
from vig import DeepGCN
def build():
    kinds = {"conv": "mr", "act": "gelu", "norm": "batch", "bias": True}
    sizes = {"k": 3, "n_blocks": 2, "n_filters": 32, "n_classes": 10}
    choices = {"use_dilation": True, "use_stochastic": False, "epsilon": 0.2}
    return DeepGCN(SimpleNamespace(**kinds, **sizes, **choices, dropout=0.0, drop_path=0.0))
"""
LARGE_KERNELS = """
from models.van import VAN
def build():
    widths = {"embed_dims": [16, 32, 32, 64], "mlp_ratios": [2] * 4, "depths": [1] * 4}
    return VAN(img_size=64, num_classes=10, **widths)
"""
SMALL_SWIN = (
    "hidden_dim=24",
    "layers=(2,2,2,2)",
    "heads=(1,2,2,4)",
    "window_size=4",
    "num_classes=10",
    "downscaling_factors=(2,2,2,1)",
)
MIXER = ("dim=64", "depth=4", "kernel_size=5", "patch_size=4", "n_classes=10")
# With statistics of noise, because the logits of these nearly vanish with those of a new network
NOISE = f"[net.train()(torch.randn(16, 3, 64, 64)) for _ in range(9)] and {STATE}"
MODEL = f"{{'model': {STATE}}}"
CANDIDATES += [
    Candidate("kentaroy47/vision-transformers-cifar10", "models.swin:swin_t", NET, SMALL_SWIN),
    Candidate("clovaai/rexnet", "rexnetv1:ReXNetV1", NOISE, ("classes=10",), 64),
    Candidate(
        "rwightman/gen-efficientnet-pytorch",
        "geffnet.mobilenetv3:mobilenetv3_small_075",
        NOISE,
        ("num_classes=10",),
        64,
    ),
    Candidate(
        "rwightman/gen-efficientnet-pytorch",
        "geffnet.gen_efficientnet:mixnet_s",
        NOISE,
        ("num_classes=10",),
        64,
    ),
    Candidate(
        "HRNet/HRNet-Image-Classification/lib",
        "mine:build",
        SINGLE,
        pixels=64,
        code=HIGH_RESOLUTION,
    ),
    Candidate("raoyongming/GFNet", "mine:build", MODEL, code=FREQUENCIES),
    Candidate(
        "SHI-Labs/Compact-Transformers",
        "src.cct:cct_2_3x2_32",
        STATE,
        ("pretrained=False", "progress=False", "num_classes=10"),
    ),
    Candidate(
        "ronghuaiyang/arcface-pytorch/models", "mine:Gray", PARALLEL, pixels=128, code=FACES
    ),
    Candidate(
        "jindongwang/Pytorch-CapsuleNet", "mine:Lengths", STATE, pixels=28, code=CAPSULES
    ),
    Candidate("locuslab/convmixer", "convmixer:ConvMixer", STATE, MIXER),
    Candidate(
        "AntonioTepsich/Convolutional-KANs/kan_convolutional",
        "mine:build",
        STATE,
        code=SPLINES,
    ),
    Candidate("alxndrTL/mamba.py", "mine:Classifier", STATE, code=STATE_SPACE),
    Candidate(
        "iduta/pyconv", "models.pyconvresnet:pyconvresnet18", SINGLE, ("num_classes=10",), 64
    ),
    Candidate(
        "Visual-Attention-Network/VAN-Classification",
        "mine:build",
        SINGLE,
        pixels=64,
        code=LARGE_KERNELS,
    ),
    Candidate("LeapLabTHU/ACmix/ResNet", "mine:build", STATE, code=MIXED_ATTENTION),
    Candidate("ChristophReich1996/Involution", "mine:build", STATE, code=INVOLUTION),
    Candidate(
        "huawei-noah/Efficient-AI-Backbones/vig_pytorch",
        "mine:build",
        SINGLE,
        pixels=224,
        code=GRAPH,
    ),
    Candidate(
        "mmaaz60/EdgeNeXt",
        "models.model:edgenext_xx_small",
        MODEL,
        ("num_classes=10", "classifier_dropout=0.0"),
        64,
    ),
]
# Classifiers of papers of 2021 to 2024, 2026-11-28
STAND_INS = """
import importlib
import math
import sys
import types
def stand_in(name, **values):
    sys.modules[name] = types.SimpleNamespace(__path__=[], **values)
stand_in("timm.models.layers.helpers", to_2tuple=importlib.import_module("timm.layers").to_2tuple)
"""
POOLS = f"""{STAND_INS}
from models.poolformer import PoolFormer
def build():
    sizes = dict(embed_dims=[16, 32, 40, 64], mlp_ratios=[4] * 4, downsamples=[True] * 4)
    return PoolFormer([1, 1, 1, 1], num_classes=10, **sizes)
"""
CLUSTERS = f"""{STAND_INS}
from models.context_cluster import coc_tiny
def build():
    return coc_tiny(num_classes=10)
"""
PRUNED_TOKENS = f"""{STAND_INS}
stand_in("torch._six", inf=math.inf)
stand_in("tensorboardX", SummaryWriter=None)
from models.dyvit import VisionTransformerDiffPruning
def build():
    ratios = dict(pruning_loc=[1, 2], token_ratio=[0.7, 0.5])
    return VisionTransformerDiffPruning(embed_dim=64, depth=4, num_heads=2, num_classes=10, **ratios)
"""
CHOSEN_PARTS = """
from models.modeling import CONFIGS, VisionTransformer
def build():
    config = CONFIGS["ViT-B_16"]
    config.hidden_size = 48
    config.transformer.update(mlp_dim=96, num_heads=2, num_layers=3)
    return VisionTransformer(config, 64, 10)
"""
ROUTED_WINDOWS = f"""{STAND_INS}
stand_in("fairscale")
stand_in("fairscale.nn")
stand_in("fairscale.nn.checkpoint", checkpoint_wrapper=None)
from models.biformer import BiFormer
def build():
    widths = [32, 64, 96, 128]
    windows = dict(kv_downsample_mode="identity", kv_per_wins=[-1] * 4, topks=[1, 4, 16, -2])
    return BiFormer([1] * 4, num_classes=10, embed_dim=widths, head_dim=32, qk_dims=widths, **windows)
"""
OFFSETS = f"""{STAND_INS}
stand_in("natten")
stand_in("natten.functional", NATTEN2DQKRPBFunction=None, NATTEN2DAVFunction=None)
from models.dat import DAT
def build():
    sizes = dict(dim_stem=24, dims=[24, 48, 96, 192], depths=[2, 2, 2, 2], heads=[1, 2, 4, 8])
    offsets = dict(groups=[1, 1, 2, 4], strides=[8, 4, 2, 1], use_pes=[True] * 4)
    return DAT(num_classes=10, stage_spec=[["L", "D"]] * 4, **sizes, **offsets)
"""
MERGED_TOKENS = """
import sys
import types
import timm
sys.modules["tome.vis"] = types.SimpleNamespace(make_visualization=None)
import tome
def build():
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=4)
    tome.patch.timm(net)
    net.r = 3
    return net
"""
LARGE_KERNEL_SIZES = """
from replknet import RepLKNet
def build():
    sizes = dict(large_kernel_sizes=[31, 29, 27, 13], layers=[1] * 4, channels=[16, 32, 32, 64])
    return RepLKNet(**sizes, drop_path_rate=0.0, small_kernel=5, num_classes=10, use_sync_bn=False)
"""
CANDIDATES += [
    Candidate("sail-sg/poolformer", "mine:build", STATE, pixels=64, code=POOLS),
    Candidate("ma-xu/Context-Cluster", "mine:build", STATE, pixels=64, code=CLUSTERS),
    Candidate("raoyongming/DynamicViT", "mine:build", MODEL, pixels=224, code=PRUNED_TOKENS),
    Candidate("TACJu/TransFG", "mine:build", MODEL, pixels=64, code=CHOSEN_PARTS),
    Candidate("rayleizhu/BiFormer", "mine:build", MODEL, pixels=224, code=ROUTED_WINDOWS),
    Candidate("LeapLabTHU/DAT", "mine:build", MODEL, (), 224, "0", OFFSETS),
    Candidate("facebookresearch/ToMe", "mine:build", STATE, pixels=64, code=MERGED_TOKENS),
    Candidate(
        "DingXiaoH/RepLKNet-pytorch", "mine:build", MODEL, pixels=64, code=LARGE_KERNEL_SIZES
    ),
    Candidate(
        "ma-xu/Rewrite-the-Stars/imagenet", "starnet:starnet_s1", STATE, ("num_classes=10",), 64
    ),
    Candidate(
        "yitu-opensource/T2T-ViT",
        "models.t2t_vit:t2t_vit_7",
        STATE,
        ("num_classes=10", "img_size=64"),
        64,
    ),
]
SAVE = """
import sys
import torch
from sopdeploy_export.user_network.builder import network_builder
net = network_builder("network", sys.argv[1], sys.argv[3:])()
torch.save(eval(sys.argv[2]), "w.pth.tar")
"""


def attempt(candidate: Candidate, folder: Path) -> str:
    """Save the weights of *candidate*, run both commands, and describe the result in a row of the table."""
    place = folder.joinpath(*candidate.repository.split("/")[1:])
    with tempfile.TemporaryDirectory() as work:
        paths = os.pathsep.join([str(place), work, os.environ.get("PYTHONPATH", "")])
        Path(work, "mine.py").write_text(candidate.code, encoding="utf-8")

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                (sys.executable, *words),
                cwd=work,
                env={**os.environ, "PYTHONPATH": paths},
                capture_output=True,
                text=True,
                check=False,
            )

        saved = run("-c", SAVE, candidate.network, candidate.saved, *candidate.options)
        if saved.returncode:
            raise SystemExit(saved.stderr)
        options = [word for option in candidate.options for word in ("--option", option)]
        options += [
            "--network",
            candidate.network,
            "--preprocess",
            f"imagenet:{candidate.pixels}",
        ]
        options += [] if candidate.logits is None else ["--logits-key", candidate.logits]
        done = run("-m", "sopdeploy", "inspect", "w.pth.tar", *options, "--json")
        result = ""
        if not done.returncode:
            inspected = json.loads(done.stdout)
            names = "".join(f"class {number}\n" for number in range(inspected["num_classes"]))
            Path(work, "labels.txt").write_text(names, encoding="utf-8")
            done = run("-m", *shlex.split(inspected["command"]), "--json")
            if not done.returncode:
                removed = ", ".join(inspected["unused"]) or "nothing"
                result = f"{json.loads(done.stdout)['proof']} | {removed}"
    result = result or f"refused: {done.stderr.strip().splitlines()[-1]} | "
    return f"| {candidate.repository} | {candidate.network} | {candidate.pixels} | {result} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Try all networks, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args(arguments)
    for candidate in CANDIDATES:
        if options.only in candidate.repository:
            print(attempt(candidate, options.folder.resolve()), flush=True)


if __name__ == "__main__":
    main()
