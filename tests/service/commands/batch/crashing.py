"""A worker process that ends at one image, as one with a bug in a C library does."""

import os

from sopdeploy_service.commands.batch import decoders


class CrashingDecoder(decoders.EntryDecoder):
    def __call__(self, slot: int, position: int, entry: decoders.Entry) -> decoders.Read:
        return os._exit(1) if entry.path.endswith("017.jpg") else super().__call__(slot, position, entry)


def start_crashing_worker(*arguments: object) -> None:
    decoders.EntryDecoder = CrashingDecoder
    decoders.start_worker(*arguments)
