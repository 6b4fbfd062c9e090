"""The network of the user in a second process: what differs between processes is in no weight file.

There, Python's `hash` of a text is another one, so is the order of a set, and random numbers are
drawn from another seed. A network that depends on one of these would compute something else after
a restart, and does not compute now what it computed in its training.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sopdeploy.config import StrictModel
from sopdeploy.errors import CertificateError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.admit.network import prepared
from sopdeploy_export.capture.deployed import Deployed, evenly_spread, generated_images
from sopdeploy_export.network import NOT_OF_NETWORKS, attributes_restored, modules
from sopdeploy_export.user_network.admission import fit_channels
from sopdeploy_export.user_network.builder import network_builder
from sopdeploy_export.user_network.loading import load_weights, read_weights

IMAGES = 4
ROUNDING = 1e-3  # of the largest logit; both processes run the same operators
SEED = 1_618


class Request(StrictModel):
    """What the second process builds and runs, and where it writes the logits."""

    network: str
    option: tuple[str, ...]
    weights: Path
    weights_key: str | None
    logits_key: str | None
    ignore: tuple[str, ...]
    preprocess: Preprocess
    path: tuple[str, ...]
    threads: int
    result: Path


@contextmanager
def run_elsewhere(
    network: nn.Module,
    *,
    builder: str,
    option: tuple[str, ...],
    weights: Path,
    weights_key: str | None,
    logits_key: str | None,
    ignore: tuple[str, ...],
    preprocess: Preprocess,
) -> Iterator[Callable[[], None]]:
    """Start a second process that builds and runs *network* again; yield the function that compares.

    The other arguments are those of the command. The yielded function waits for the process, and
    raises `CertificateError` if its logits are not those of *network*, which must be `prepared`
    then. Code of installed packages alone is the same in many processes, so no process runs it.
    """
    if _is_installed(network):
        yield lambda: None
        return

    with tempfile.TemporaryDirectory() as folder:
        request = Request(
            network=builder,
            option=option,
            weights=weights.absolute(),
            weights_key=weights_key,
            logits_key=logits_key,
            ignore=ignore,
            preprocess=preprocess,
            path=tuple(sys.path),
            threads=torch.get_num_threads(),
            result=Path(folder) / "logits.npy",
        )
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, request.model_dump_json()],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

        def compare() -> None:
            _, errors = process.communicate()
            if process.returncode:
                raise CertificateError(_describe_end(process.returncode, errors))
            _compare(_logits(network, preprocess), np.load(request.result, allow_pickle=False))

        try:
            yield compare
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


def _describe_end(code: int, errors: str) -> str:
    """Say why a second process ended with *code*, which is the negative of a signal, and *errors*."""
    problem = "a second process cannot build the network"
    if code == -signal.SIGKILL:
        return f"{problem}: it was killed, probably because memory is short; use a machine with more memory"
    if code < 0:
        return f"{problem}: it was ended by signal {-code} ({signal.strsignal(-code)})"
    lines = errors.strip().splitlines()
    return f"{problem}: {lines[-1] if lines else 'no message'}"


def _is_installed(network: nn.Module) -> bool:
    """Tell whether all classes of *network* are those of installed packages."""
    names = {type(module).__module__ for _, module in modules(network)}
    return all(
        name.partition(".")[0] in NOT_OF_NETWORKS
        or "-packages" in str(getattr(sys.modules.get(name), "__file__", ""))
        for name in names
    )


def _logits(network: nn.Module, preprocess: Preprocess) -> NDArray[np.float32]:
    """Run *network*, which is `prepared`, on some of the generated images."""
    preprocess = fit_channels(network, preprocess)
    images = generated_images(preprocess.crop)
    chosen = torch.from_numpy(images[evenly_spread(len(images), IMAGES)])
    with attributes_restored(network), torch.no_grad():
        logits: NDArray[np.float32] = Deployed(network, preprocess).eval()(chosen)[0].numpy()
    return logits


def _compare(logits: NDArray[np.float32], elsewhere: NDArray[np.float32]) -> None:
    """Raise `CertificateError` unless *logits* are those of the process *elsewhere*, up to rounding."""
    logits = logits[:, -elsewhere.shape[1] :]  # without the first of two classes of one logit
    difference = float(np.abs(logits - elsewhere).max())
    largest = float(np.abs(logits).max())

    if not difference <= ROUNDING * largest:
        raise CertificateError(
            f"a second process builds another network: its logits differ by {difference:.2g}, and the "
            f"largest is {largest:.2g}; hash() of a text, the order of a set and random numbers differ "
            "between processes, so use numbers of a fixed seed, or keep them in a buffer of the weight file"
        )


def _main(text: str) -> None:
    """Build and run what *text*, a `Request`, describes, and write its logits."""
    request = Request.model_validate(json.loads(text))
    sys.path[:] = request.path
    torch.set_num_threads(request.threads)
    torch.manual_seed(SEED)

    weights = read_weights(request.weights)  # before the code of the network can change it
    network = network_builder("network", request.network, request.option)()
    load_weights(network, weights, request.weights_key, ignore=request.ignore)
    del weights  # frees as much memory as the network takes, beside the first process
    with prepared(network, logits_key=request.logits_key) as ready:
        np.save(request.result, _logits(ready, request.preprocess))


if __name__ == "__main__":
    _main(sys.argv[1])
