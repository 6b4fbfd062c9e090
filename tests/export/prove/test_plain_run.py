"""A plain run of a network against its captured graph, as measured on kinds of images."""

import contextlib
import itertools
import random
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.compiler import is_exporting as imported_by_its_name
from torch.nn import functional as F

from sopdeploy import Preprocess
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import CertificateError, SopdeployError
from sopdeploy_export.capture.deployed import Deployed, export_images
from sopdeploy_export.network import attributes_restored
from sopdeploy_export.prove import plain_run
from sopdeploy_export.prove.certificate import STATEMENTS, Checks
from sopdeploy_export.prove.networks import Compared
from sopdeploy_export.prove.plain_run import (
    find_difference,
    measure_plain_run,
    rounding_limits,
    run_plainly,
)
from sopdeploy_export.prove.removed import prove_removed
from sopdeploy_export.runs import SIZES, PlainOutputs, divide, run_as_users_do
from tests.export.user_network.networks import export_small, trained, variant
from tests.support.slow import mostly_slow

SIDE = 32
PREPROCESS = Preprocess(resize=SIDE, crop=SIDE)
MEAN = torch.tensor(PREPROCESS.mean)[:, None, None]
DEVIATION = torch.tensor(PREPROCESS.std)[:, None, None]
Logits = Callable[["Small", Tensor], Tensor]


class Small(nn.Module):
    """Passes images (B, 3, H, W) to *logits*, with layers that it can use."""

    def __init__(self, logits: Logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 2)
        self.aux = nn.Linear(3, 2)
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self, images)


class Tokens(nn.Module):
    """A transformer that leaves plain patches of *color* out of its attention, and pools by *pool*."""

    def __init__(
        self, color: int, pool: Callable[[Tensor, Tensor], Tensor], **options: bool
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, **options)
        self.fc = nn.Linear(16, 2)
        self.register_buffer("color", (color / 255 - MEAN) / DEVIATION)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        distances = (images - self.color).abs().amax(1, keepdim=True)
        is_plain = F.max_pool2d(distances, 8).flatten(1) < 1e-3
        is_left_out = is_plain & (torch.arange(16) > 0)
        encoded = self.encoder(tokens, src_key_padding_mask=is_left_out)
        return self.fc(self.pool(encoded, is_left_out))


def of_mean(logits: Logits) -> Logits:
    return lambda network, images: logits(network, images.mean((2, 3)))


def on_kind(name: str) -> Logits:
    """Return other logits for images such as the one that an export calls *name*, unless it is captured."""
    image = torch.from_numpy(export_images(PREPROCESS)[name]).permute(2, 0, 1)
    wanted = (image / 255 - MEAN) / DEVIATION

    def logits(network: Small, images: Tensor) -> Tensor:
        found = network.fc(images.mean((2, 3)))
        if imported_by_its_name():
            return found
        is_kind = (images - wanted).abs().amax((1, 2, 3)) < 0.01
        return torch.where(is_kind[:, None], -found, found)

    return logits


def in_a_batch_of(size: int) -> Logits:
    """Return other logits for batches of *size* images, unless the network is captured."""

    def logits(network: Small, x: Tensor) -> Tensor:
        found = network.fc(x)
        return found if imported_by_its_name() or x.shape[0] != size else -found

    return logits


def tries(attempt: Logits) -> Logits:
    """Do nothing while the network is captured, where *attempt* fails."""

    def logits(network: Small, images: Tensor) -> Tensor:
        with contextlib.suppress(Exception):
            return attempt(network, images)
        return network.fc(images.mean((2, 3)))

    return logits


def is_dark(images: Tensor) -> bool:
    return bool(images.mean((1, 2, 3)).min() < -1.5)


def keeps_the_last(network: Small, x: Tensor) -> Tensor:
    last = vars(network).get("last", x[:1])
    vars(network)["last"] = x[:1].clone()
    return network.fc(x + last)


def alternates() -> Logits:
    """Return twice the logits in every second run."""
    runs = itertools.count()
    return lambda network, x: network.fc(x) * (1 + next(runs) % 2)


def has_fast_path(network: Small, x: Tensor) -> Tensor:
    """Return other logits with torch's fast path, but has no layer that takes it."""
    is_fast = torch.backends.mha.get_fastpath_enabled() and not imported_by_its_name()
    return network.fc(x) * (2 if is_fast else 1)


def is_called_by_export(_: Tensor) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if Path(frame.f_code.co_filename).parts[-2:-1] == ("export",):
            return True
        frame = frame.f_back
    return False


def leaky(tokens: Tensor, _is_left_out: Tensor) -> Tensor:
    return tokens.mean(1)


def masked(tokens: Tensor, is_left_out: Tensor) -> Tensor:
    stays = (~is_left_out)[..., None].float()
    return (tokens * stays).sum(1) / stays.sum(1)


OTHER = "other outputs"
WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **{
        f"other logits for {name}": (
            lambda name=name: Small(on_kind(name)),
            rf"^for {name} .*{OTHER}",
        )  # type: ignore[misc]
        for name in export_images(PREPROCESS)
    },
    **{
        f"other logits in a batch of {size}": (
            lambda size=size: Small(of_mean(in_a_batch_of(size))),
            rf"{'alone' if size == 1 else f'batch of {size}'}, .*{OTHER}",
        )
        for size in SIZES[1:]
    },
    "imports is_exporting": (
        lambda: Small(of_mean(lambda n, x: n.fc(x) if imported_by_its_name() else -n.fc(x))),
        OTHER,
    ),
    "looks at the stack": (
        lambda: Small(of_mean(lambda n, x: n.fc(x) if is_called_by_export(x) else -n.fc(x))),
        OTHER,
    ),
    "a value of the image behind try": (
        lambda: Small(tries(lambda n, x: n.fc(x.mean((2, 3))) * (2 if is_dark(x) else 1))),
        OTHER,
    ),
    "treats one image alone": (
        lambda: Small(of_mean(lambda n, x: n.fc(x) if x.shape[0] == 1 else n.fc(2 * x))),
        "image alone|batch sizes",
    ),
    "keeps the last image": (
        lambda: Small(of_mean(keeps_the_last)),
        "other outputs|earlier run",
    ),
    "draws random numbers": (
        lambda: Small(of_mean(lambda n, x: n.fc(x + torch.rand(3)))),
        "random",
    ),
    "draws random numbers of Python": (
        lambda: Small(of_mean(lambda n, x: n.fc(x) * random.random())),
        "random",
    ),
    "alternates": (
        lambda: Small(of_mean(alternates())),
        "second run",
    ),
    "asks for the fast path": (
        lambda: Small(of_mean(has_fast_path)),
        f"{OTHER}(?!.*TransformerEncoder)",
    ),
    "reads a removed part": (
        lambda: Small(of_mean(lambda n, x: n.fc(x) + 0 * n.aux(x))),
        "aux",
    ),
    "a number of a removed part": (
        lambda: Small(of_mean(lambda n, x: n.fc(x) * len(str(n.aux.weight.tolist())))),
        "aux|" + OTHER,
    ),
    **{
        f"the mean of tokens that are left out of attention, of color {color}": (
            lambda color=color: Tokens(color, leaky),  # type: ignore[misc]
            "nn.TransformerEncoder",
        )
        for color in (0, 114, 255)
    },
}
RIGHT: dict[str, Callable[[], nn.Module]] = {
    "asks torch.compiler": lambda: Small(
        of_mean(lambda n, x: n.fc(x) + (not torch.compiler.is_exporting()))
    ),
    "a table in forward": lambda: Small(of_mean(lambda n, x: n.fc(x + torch.arange(3)))),
    "writes to its own map": lambda: Small(
        of_mean(lambda n, x: n.fc(x.clone().add_(1).relu_()))
    ),
    "chunks of the batch": lambda: Small(
        of_mean(lambda n, x: n.fc(sum(torch.cat([x, 2 * x]).chunk(2))))
    ),
    "dropout in eval mode": lambda: Small(
        of_mean(lambda n, x: n.fc(F.dropout(x, 0.5, training=n.training)))
    ),
    "the mean of the tokens that attention reads": lambda: Tokens(114, masked),
    "a transformer without nested tensors": lambda: Tokens(
        114, leaky, enable_nested_tensor=False
    ),
}


def measure(network: nn.Module, largest: int = 8) -> tuple[int, ...]:
    parts = ("aux",) if isinstance(network, Small) else ()
    batch = BatchRange(optimum=1, maximum=largest)
    plain = run(network.eval(), largest)
    trained = Compared.of("trained", network, PREPROCESS, batch)
    prove_removed(trained, parts)
    return measure_plain_run(trained, plain, largest, parts).batches


def run(network: nn.Module, largest: int) -> PlainOutputs:
    """Run *network* on the images of an export; it is as before afterwards."""
    deployed = Deployed(network, PREPROCESS).eval()
    with attributes_restored(network):
        return run_as_users_do(
            partial(run_plainly, deployed), export_images(PREPROCESS), largest
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    mostly_slow(
        WRONG,
        "other logits for a dark image",
        "other logits in a batch of 3",
        "imports is_exporting",
        "a number of a removed part",
        "draws random numbers of Python",
        "alternates",
        "asks for the fast path",
    ),
)
def test_a_plain_run_that_gives_something_else_is_refused(name: str) -> None:
    build, phrase = WRONG[name]
    with pytest.raises(SopdeployError, match=phrase):
        measure(build())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name", mostly_slow(RIGHT, "asks torch.compiler", "writes to its own map")
)
def test_a_plain_run_that_gives_the_outputs_of_the_graph_passes(name: str) -> None:
    assert measure(RIGHT[name]()) == tuple(sorted({*SIZES}))


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 3, 4)), (64, (1, 2, 3, 6))],
)
def test_the_sizes_of_the_batches_follow_the_largest_one(
    largest: int, sizes: tuple[int, ...]
) -> None:
    images = torch.from_numpy(np.stack([*export_images(PREPROCESS).values()]))
    batches = divide(images, largest)

    assert {*map(len, batches)} == {*sizes}
    assert torch.equal(torch.cat(batches)[: len(images)], images)
    assert not re.search(r"\d", plain_run.STATEMENT)


def test_a_batch_of_one_sees_all_kinds_of_images() -> None:
    kinds = []

    def logits(network: Small, images: Tensor) -> Tensor:
        kinds.append(images.shape[0])
        return network.fc(images.mean((2, 3)))

    assert measure(Small(logits), largest=1) == (1,)
    assert len(kinds) >= len(export_images(PREPROCESS))
    assert {*kinds} == {1}


@pytest.mark.parametrize("wrong", [(), (0, 12)])
def test_the_graph_runs_only_where_its_file_gives_something_else(
    wrong: tuple[int, ...],
) -> None:
    network = Small(of_mean(lambda n, x: n.fc(x))).eval()
    compared = Compared.of(
        "trained", network, PREPROCESS, BatchRange(optimum=1, maximum=max(SIZES))
    )
    graph_runs = []
    compared.graph.register_forward_hook(lambda *_: graph_runs.append(1))

    images = torch.from_numpy(np.stack([*export_images(PREPROCESS).values()]))
    with torch.no_grad():
        of_file = compared.deployed(images)[0].numpy()
    of_file[[*wrong]] += 1

    plain = run(network, max(SIZES))
    measure_plain_run(compared, plain, max(SIZES), ("aux",), {"logits": of_file})
    assert len(graph_runs) == len(wrong)


def test_a_repeated_run_must_give_the_same_bits() -> None:
    network = Small(of_mean(lambda n, x: n.fc(x))).eval()
    compared = Compared.of("trained", network, PREPROCESS, BatchRange(optimum=1, maximum=1))
    plain = run(network, 1)
    repeated = (torch.nextafter(plain.repeated[0], torch.tensor(torch.inf)),)

    with pytest.raises(CertificateError, match="second run"):
        measure_plain_run(compared, plain._replace(repeated=repeated), 1, ("aux",))


def test_code_that_reads_the_memory_of_a_removed_tensor_is_refused() -> None:
    network = Small(
        of_mean(lambda n, x: n.fc(x) if (n.memory == n.before).all() else 2 * n.fc(x))
    )
    network.memory = network.aux.weight.detach().numpy()
    network.before = network.memory.copy()

    with pytest.raises(CertificateError, match="other values"):
        measure(network, 1)


def test_the_images_of_an_export_differ_and_fill_the_batches() -> None:
    for side in (8, 16, 32):
        images = [*export_images(Preprocess(resize=side, crop=side)).values()]
        assert len({image.tobytes() for image in images}) == len(images) == sum(SIZES)
        assert {image.shape for image in images} == {(side, side, 3)}
        assert {image.dtype for image in images} == {np.dtype(np.uint8)}


@pytest.mark.parametrize("left_out", STATEMENTS)
def test_an_export_that_leaves_out_a_statement_writes_no_certificate(left_out: str) -> None:
    checks = Checks()
    for statement in STATEMENTS:
        if statement != left_out:
            checks.begin(statement)

    with pytest.raises(CertificateError, match="a bug"):
        checks.evidence()


def test_the_certificate_says_what_was_proved_and_what_was_measured() -> None:
    checks = Checks()
    for statement in STATEMENTS:
        checks.begin(statement)

    assert checks.evidence() == {
        "Pixels": "measured",
        "Removed": "proved",
        "Graph": "proved",
        "Plain run": "measured",
        "Images": "measured",
        "File": "measured",
    }


@pytest.mark.parametrize("extreme", [torch.nan, torch.inf, -torch.inf])
def test_a_difference_beside_an_extreme_output_is_found(extreme: float) -> None:
    plain, captured = (
        torch.tensor([[1.0, extreme], [1, 2]]),
        torch.tensor([[1.0, extreme], [1, 3]]),
    )
    for limits in ([None], [rounding_limits(plain)]):
        assert find_difference([plain], [captured], limits) == 1
        assert find_difference([plain], [plain], limits) is None


@pytest.mark.slow
def test_an_export_warns_of_images_for_which_the_network_gives_nan(tmp_path: Path) -> None:
    def forward(self: nn.Module, images: Tensor) -> Tensor:
        steps = (images[..., 1:] - images[..., :-1]).abs().amin((1, 2, 3))
        is_other = (steps < 4)[:, None].float()  # 0 if each pixel is black beside white
        return self.fc(self.features(images)) * is_other / is_other

    network = variant(forward, aux=False)
    exported = export_small(trained(network), tmp_path)

    assert any("NaN" in warning and "checkerboard" in warning for warning in exported.warnings)
