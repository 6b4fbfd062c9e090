"""A decoder program whose children do what the bytes of an image say, instead of decoding, or decode.

The names of what they do follow `START`, by which the server takes them for a JPEG.
"""

import json
import os
import time

from sopdeploy_service.decoding import child
from tests.service.decoding.sandboxed import FORBIDDEN, TAKES_MEMORY, attempt

decode_and_answer = child.answer
START = b"\xff\xd8\xff"


def answer(number: int, rules: bytes, image: bytes, options: child.ChildOptions) -> list[bytes]:
    """Misbehave if the image is a name below, or the first bytes of a pipe or environment are asked for."""
    header = child.REPLY.pack
    name = image.removeprefix(START)
    if name == b"die":
        os._exit(1)
    if name == b"hang" or (options.is_light and image.endswith(b"hang once")):
        os.write(2, b"process %d hangs\n" % os.getpid())  # the server logs this
        time.sleep(3600)
    if name == b"bug":
        rules = b"no rules"
    if name == b"nonsense":
        return [bytes(range(256)) * 1000]
    if name == b"too little":
        return [header(number, child.PIXELS, 0, 3 * child.read_rules(rules).crop ** 2), b"x"]
    if name == b"long message":
        return [header(number, child.FIRST_ERROR, 0, 65_000), bytes(65_000)]

    if name == b"forbidden":
        errors = {name: attempt(forbidden) for name, forbidden in FORBIDDEN.items()}
        text = json.dumps([sorted(set(errors.values())), dict(os.environ)]).encode()
        return [header(number, child.FIRST_ERROR, 0, len(text)), text]

    if name == b"memory":
        errors = {
            name: attempt(lambda take=take: take(2 * options.memory))  # type: ignore[misc]
            for name, take in TAKES_MEMORY.items()
        }
        text = json.dumps(errors).encode()
        return [header(number, child.FIRST_ERROR, 0, len(text)), text]

    reply = decode_and_answer(number, rules, image, options)
    return [b"".join(reply) + b"more"] if image.endswith(b"too many") else reply


def main() -> None:
    child.answer = answer
    child.main()
