"""Repetition: outputs do not depend on how often the network ran, and nothing that it holds changes.

The network runs on probe images, then `CALLS` times on another image, and on the probe images
again: whatever holds the state, such as a context variable or a file, the outputs must be
equal. State that changes outputs only after more calls is found by `state.read_state` in the
objects that the network holds: once the network has run for both numbers of images, no call may
change them.

The repeated calls cost the time of Python code only. What the first of them computed from the
image is returned again in the others, and no kernel runs for it. What the network computes from
anything else, such as a counter, is computed every time.

A change that comes after more than `CALLS` calls, and that nothing the network holds shows, is
not found.

Refused: a counter, in whatever holds it (`tests/attacks/planted/state.py`).
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sopdeploy.errors import CertificateError, SopdeployError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy_export.admit.written import constant_content, owning_attribute
from sopdeploy_export.capture.deployed import compute_outputs
from sopdeploy_export.network import copy_network
from sopdeploy_export.program_hashes import are_equal
from sopdeploy_export.state import NOT_IN_EVAL, STATELESS, changes, read_state

STATEMENT = (
    "The detached network returns bitwise equal outputs after 300 calls on another image, and nothing "
    "that it reads again changes."
)

CALLS = 300
CALLS_PER_STEP = 100
PROBES = 4


class _Replayed(NamedTuple):
    """An operation on the image, its result, and the tensors in the result by their ids."""

    operation: Any
    result: Any
    tensors: dict[int, Tensor]


class _ReplayedCalls(TorchDispatchMode):
    """Returns what the first call computed from *image* again, as long as the operations are the same."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._image = image
        self._computed: list[_Replayed] = []
        self.begin_call()

    def begin_call(self) -> None:
        """Begin another call, for which the image alone is known, and nothing that an earlier call left."""
        self._position = 0  # among the operations on the image in this call
        # kept, so that no other tensor gets such an id
        self._from_image = {id(self._image): self._image}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Return the result of one operation on the image again; run any other one."""
        del types
        from_image = self._from_image
        on_image = [
            id(operand) in from_image
            for operand in _tensors_in((*args, *(kwargs or {}).values()))
        ]
        is_mutable, returns_alias = _effects(func)
        writes_elsewhere = is_mutable and not all(on_image[:1])  # such as a counter
        if not any(on_image) or writes_elsewhere:
            return func(*args, **(kwargs or {}))
        position = self._position
        self._position += 1
        is_known = position < len(self._computed) and self._computed[position].operation is func
        if is_known and not returns_alias:
            from_image.update(self._computed[position].tensors)
            return self._computed[position].result
        if is_known and is_mutable:
            return args[0]  # has its values from the first call
        # A new operation, or a view, which torch does not allow to return twice; to make it
        # takes no time.
        result = func(*args, **(kwargs or {}))
        tensors = {id(tensor): tensor for tensor in _tensors_in([result])}
        from_image.update(tensors)
        if not is_known:  # from here on, this call does something else than the one before
            self._computed[position:] = [_Replayed(func, result, tensors)]
        return result


@cache
def _effects(operation: Any) -> tuple[bool, bool]:
    """Return whether *operation* writes to an operand, and whether it returns an operand or a view of one."""
    schema = operation._schema
    return schema.is_mutable, any(
        returned.alias_info is not None for returned in schema.returns
    )


def _tensors_in(operands: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among *operands* and in their lists; `tree_leaves` takes ten times as long."""
    for operand in operands:
        if isinstance(operand, Tensor):
            yield operand
        elif isinstance(operand, list | tuple):
            yield from _tensors_in(operand)


@torch.no_grad()
def prove_repetition(
    network: nn.Module,
    preprocess: Preprocess,
    probes: Tensor,
    written: tuple[str, ...] = (),
    on_calls: Callable[[str], None] = lambda _: None,
) -> None:
    """Run a copy of *network* on uint8 *probes* (P, H, W, 3), at least two, before and after `CALLS` calls.

    The attributes *written* may change, because no run reads them (`check_unread`): only
    tensors in them may. Calls *on_calls* with a text as each `CALLS_PER_STEP` calls begin.
    Raises `CertificateError` if an output differs in any bit, if an object that the network
    holds changes, or if a call fails.
    """
    copied = copy_network(network)
    pixels = Normalize(preprocess, images_format(network))(probes[: PROBES + 1])
    images = pixels[:-1]
    other = pixels[-1:].clone()
    before = compute_outputs(copied, images.clone())  # which the network may write to
    try:
        with _ReplayedCalls(other) as replay:
            for call in range(CALLS):
                if call % CALLS_PER_STEP == 0:
                    on_calls(f"{call} of {CALLS} calls done")
                replay.begin_call()
                compute_outputs(copied, other)
                if call == 0:
                    held = read_state(copied)  # with the caches for both numbers of images
                    content = constant_content(copied, written) if written else []
                if written and constant_content(copied, written) != content:
                    raise CertificateError(
                        f"{written[0]} changes while the network runs; {NOT_IN_EVAL}"
                    )
        after = compute_outputs(copied, images.clone())
    except SopdeployError:
        raise
    except Exception as error:  # the network's own code, which can raise anything
        problem = f"the network fails when it runs {CALLS} times: {first_line(error)}"
        raise CertificateError(problem) from error
    if not all(map(are_equal, after, before)):
        raise CertificateError(
            f"the network gives other outputs after {CALLS} calls; {STATELESS}"
        )
    for changed in changes(held, read_state(copied)):
        if owning_attribute(changed, written) is None:
            raise CertificateError(f"{changed} changes while the network runs; {NOT_IN_EVAL}")
