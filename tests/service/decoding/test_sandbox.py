"""A sandboxed process decodes images; what it cannot do is in `test_decoders`."""

import asyncio
import errno
import platform
import struct

import numpy as np
import pytest
from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.decode import decode
from sopdeploy.images.limits import FORMATS
from sopdeploy.images.metadata import copy_without_metadata
from sopdeploy_service.decoding import sandbox
from sopdeploy_service.inference.daemon_threads import running_loop
from sopdeploy_service.inference.decoders import Decoders
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings
from tests.service.api.test_bad_inputs import BAD_BODIES
from tests.support.decoding import RULES
from tests.support.pictures import encoded
from tests.support.service import picture_bytes

linux = pytest.mark.skipif(
    platform.system() != "Linux", reason="seccomp and Landlock exist on Linux only"
)


def saved(mode: str, kind: str, **options: object) -> bytes:
    return encoded(Image.new(mode, (20, 20), 1), kind, **options)


MORE = {"save_all": True, "append_images": [Image.new("RGB", (20, 20))]}
TURNED = Image.Exif()
TURNED[274] = 6  # the orientation
IMAGES = {
    **{kind: picture_bytes(kind=kind) for kind in FORMATS.values()},
    "CMYK JPEG": saved("CMYK", "JPEG"),
    "JPEG with two images": saved("RGB", "MPO", **MORE),
    "turned JPEG": saved("RGB", "JPEG", exif=TURNED),
    "palette PNG": saved("P", "PNG"),
    "16-bit PNG": saved("I;16", "PNG"),
    "damaged color profile": saved("RGB", "PNG", icc_profile=b"x" * 200),
    **{f"animated {kind}": saved("RGB", kind, **MORE) for kind in ("GIF", "PNG", "WEBP")},
    "truncated": picture_bytes()[:-100],
    "damaged WebP": b"RIFF\0\0\0\0WEBPVP8 " + bytes(100),
    "text": BAD_BODIES[415, "not_an_image"]["text"],
    "a bomb": BAD_BODIES[413, "too_many_pixels"]["PNG of 900 megapixels"],
}


@linux
def test_a_sandboxed_child_decodes_and_copies_every_format_as_without_a_sandbox() -> None:
    settings = Settings(sandbox="required")
    decoders = Decoders(1, settings, Metrics())
    errors = {}
    with running_loop() as loop:
        asyncio.run_coroutine_threadsafe(decoders.start(), loop).result(60)
        for name, body in IMAGES.items():
            try:
                found = decoders.wait_for(decoders.decode(body, RULES))
                expected = decode(body, RULES, max_bytes=10**6, max_pixels=10**6)
                assert np.array_equal(found.pixels, expected.pixels), name
                assert found.warnings == expected.warnings
                assert decoders.wait_for(decoders.copy(body)) == copy_without_metadata(body), (
                    name
                )
            except ImageError as error:
                errors[name] = error.code

        asyncio.run_coroutine_threadsafe(decoders.stop(), loop).result()

    assert errors == {
        "truncated": "truncated_image",
        "damaged WebP": "damaged_image",
        "text": "not_an_image",
        "a bomb": "too_many_pixels",
    }


OTHER = 1
SELF = 4242
X86 = "x86_64"
ARM = "aarch64"
FAIL = {error: 0x50000 | error for error in (errno.EPERM, errno.ENOSYS)}
CALLS: dict[str, tuple[str, int, list[int], int]] = {
    "read on ARM": (ARM, 63, [], sandbox.ALLOW),
    "openat": (X86, 257, [], FAIL[errno.EPERM]),
    "a call of a later kernel": (X86, 1000, [], FAIL[errno.EPERM]),
    "a thread": (X86, 56, [0x3D0F00], sandbox.ALLOW),
    "a process": (X86, 56, [0x1200011], FAIL[errno.EPERM]),
    "a process on ARM": (ARM, 220, [0x1200011], FAIL[errno.EPERM]),
    "a thread in its own namespace": (X86, 56, [0x10000 | 0x10000000], FAIL[errno.EPERM]),
    "clone3, which the C library replaces": (X86, 435, [], FAIL[errno.ENOSYS]),
    "a signal to itself": (X86, 62, [SELF], sandbox.ALLOW),
    "a signal to another process on ARM": (ARM, 129, [OTHER], FAIL[errno.EPERM]),
    "TIOCSTI, input to a terminal": (X86, 16, [0, 0x5412], FAIL[errno.EPERM]),
    "F_SETOWN, signals by a file": (X86, 72, [0, 8], FAIL[errno.EPERM]),
    "a pair of Unix sockets": (X86, 53, [1], FAIL[errno.EPERM]),
    "executable memory on ARM": (ARM, 222, [0, 0, 5], FAIL[errno.EPERM]),
}


@pytest.mark.parametrize(
    ("machine", "number", "arguments", "expected"), CALLS.values(), ids=CALLS
)
def test_the_filter_decides_by_number_and_arguments(
    machine, number, arguments, expected
) -> None:
    code = list(struct.iter_unpack("HBBI", sandbox.build_filter(machine, SELF, threads=True)))
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, sandbox.ARCHITECTURES[machine][1], 0, *padded)

    assert run_filter(code, data) == expected
    # 32 bits
    assert (
        run_filter(code, struct.pack("<IIQ6Q", number, 0x40000003, 0, *padded)) == sandbox.KILL
    )


@pytest.mark.parametrize(("machine", "clone"), [(X86, 56), (ARM, 220)])
def test_a_decoder_starts_threads_only_where_heic_is_installed(machine, clone) -> None:
    data = struct.pack(
        "<IIQ6Q", clone, sandbox.ARCHITECTURES[machine][1], 0, 0x3D0F00, *[0] * 5
    )
    answers = []
    for threads in (False, True):
        code = sandbox.build_filter(machine, SELF, threads=threads)
        answers.append(run_filter(list(struct.iter_unpack("HBBI", code)), data))

    assert answers == [FAIL[errno.EPERM], sandbox.ALLOW]


def run_filter(code: list[tuple[int, ...]], data: bytes) -> int:
    position = accumulator = 0
    while True:
        instruction, if_equal, otherwise, value = code[position]
        position += 1
        if instruction == sandbox.RETURN:
            return value
        if instruction == sandbox.LOAD:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif instruction == sandbox.AND:
            accumulator &= value
        else:
            position += if_equal if accumulator == value else otherwise
