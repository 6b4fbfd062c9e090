"""Batch sizes: the graph for any batch size, with one image, computes what the graph for one image computes.

torch.export itself checks that all batch sizes of at least 2 have one graph, so this is not
compared.

Refused: other operations for one image (`tests/attacks/planted/graphs.py`).
"""

from sopdeploy.errors import CertificateError
from sopdeploy_export.capture.program import Programs
from sopdeploy_export.program_hashes import describe_difference, value_root

STATEMENT = "The graph for any batch size, with one image, computes what the graph for one image computes."


def prove_batch_sizes(captured: Programs) -> None:
    """Raise `CertificateError` if the program for any batch size, with one image, is another one."""
    if captured.batch_of_one is captured.any_batch:
        return
    any_size = value_root(captured.any_batch, batch=1)
    one_image = value_root(captured.batch_of_one)
    if any_size.sha256 != one_image.sha256:
        raise CertificateError(
            "the network for larger batches is not the network for a batch of one: "
            f"{describe_difference(any_size, one_image, 'other')}; its code must not depend on the batch size"
        )
