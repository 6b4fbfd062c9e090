"""Logits of all heads of a network in one tensor, for training loops that know only one head.

Letters: B images, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor
from torch.utils._pytree import tree_map_only

MAIN = "main"


class JoinedHeads(Tensor):
    """The logits (B, K) of the main head, which bring those of the auxiliary heads along.

    Each operation runs for every head. Where its result is a single number, such as a loss, it is the sum over
    the heads with their weights, and the first one has the penalties added. Results without a gradient, such as
    classes, accuracies, and logits after `detach`, are those of the main head alone. So
    `cross_entropy(network(images), targets)` is the loss of DSoP (Eq. 4).
    """

    heads: Mapping[str, Tensor]
    weights: Mapping[str, float]
    penalties: list[Tensor]

    @classmethod
    def of(
        cls, heads: Mapping[str, Tensor], weights: Mapping[str, float], penalties: list[Tensor]
    ) -> Self:
        """Join the outputs of *heads*, of which `main` is one; *weights* are those of their losses."""
        joined = heads[MAIN].as_subclass(cls)
        joined.heads = heads
        joined.weights = weights
        joined.penalties = penalties
        return joined

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run *func* for each head of the arguments."""
        found: list[JoinedHeads] = []
        tree_map_only(JoinedHeads, found.append, (args, kwargs or {}))
        first = found[0]

        def run(name: str) -> Any:
            own_args, own_kwargs = tree_map_only(
                JoinedHeads, lambda joined: joined.heads[name], (args, kwargs or {})
            )
            return func(*own_args, **own_kwargs)

        result = run(MAIN)
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result

        results = {name: result if name == MAIN else run(name) for name in first.heads}
        if result.dim() > 0:
            return cls.of(results, first.weights, first.penalties)
        total = sum(first.weights[name] * value for name, value in results.items())
        while first.penalties:
            total = total + first.penalties.pop()
        return total
