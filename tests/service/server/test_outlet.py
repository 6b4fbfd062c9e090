"""An answer leaves in as few writes as it can, and nothing of it is held back for good."""

import asyncio

import pytest

from sopdeploy_service.server.http_protocol import Outlet


class Sink(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return False


@pytest.fixture
def sink() -> Sink:
    return Sink()


def outlet(sink: Sink, *, bodiless: bool = False) -> Outlet:
    return Outlet(sink, lambda: sink.writes.append(b"<closed>"), bodiless=bodiless)


def test_the_head_leaves_with_the_first_piece_of_the_body(sink):
    answer = outlet(sink)
    for piece in (b"head ", b"one", b"two"):
        answer.write(piece)
    assert sink.writes == [b"head one", b"two"]


def test_the_head_of_an_answer_without_a_body_is_not_held_back(sink):
    outlet(sink, bodiless=True).write(b"head")
    assert sink.writes == [b"head"]


def test_an_invitation_to_send_the_body_leaves_at_once(sink):
    answer = outlet(sink)
    for piece in (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"body"):
        answer.write(piece)
    assert sink.writes == [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nbody"]


def test_an_answer_that_breaks_off_shows_its_head(sink):
    answer = outlet(sink)
    answer.write(b"head")
    answer.close()
    assert sink.writes == [b"head", b"<closed>"]
