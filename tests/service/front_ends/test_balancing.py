"""Connections go to the process with the fewest, also if a process drains or has ended."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from sopdeploy.errors import ConfigError
from sopdeploy_service.front_ends.balancing import Group, receive
from sopdeploy_service.server.sockets import bind, bind_group

# Accepting process of each connection, in order -> process that serves it.
HASHES: dict[str, tuple[int, str, str]] = {
    "all are accepted by one of two processes": (2, "00000000", "01010101"),
    "the kernel has distributed them evenly": (2, "01100110", "01100110"),
    "all are accepted by the last of three": (3, "222222", "201201"),
    "the processes change": (3, "001122", "012120"),
}


@pytest.fixture
def group() -> Iterator[Group]:
    with ExitStack() as stack:
        group = Group(3)
        stack.callback(group.close)
        yield group


@pytest.mark.parametrize("case", HASHES)
def test_every_process_gets_the_same_number_of_connections(case: str) -> None:
    count, accepted, expected = HASHES[case]
    group = Group(count)
    members = [group.member(index) for index in range(count)]
    for member in members:
        member.join()
    served, opened = "", [0] * count
    with ExitStack() as stack:
        stack.callback(group.close)
        for index in map(int, accepted):
            for end in socket.socketpair():
                stack.enter_context(end)
            if members[index].hand_over(end.fileno()):
                waiting = [receive(inbox.reads)[0] for inbox in group.inboxes]
                index = [len(found) for found in waiting].index(1)
                stack.enter_context(waiting[index][0])
                opened[index] += 1
                members[index].set_open(opened[index])
                members[index].set_taken()
            else:
                opened[index] += 1
                members[index].set_open(opened[index])
            served += str(index)
    assert served == expected


def test_connections_on_their_way_count_and_a_full_inbox_keeps_them_here(group: Group) -> None:
    members = [group.member(index) for index in range(3)]
    members[0].join()
    members[1].join()
    members[0].set_open(3)
    with ExitStack() as stack:
        wire = stack.enter_context(socket.socket())
        assert [members[0].hand_over(wire.fileno()) for _ in range(4)] == [True, True, True, False]
        members[0].set_open(10**9)
        sent = 3
        while members[0].hand_over(wire.fileno()):
            sent += 1
        assert len([stack.enter_context(found) for found in receive(group.inboxes[1].reads)[0]]) == sent


def test_a_draining_or_ended_process_passes_on_every_connection(group: Group) -> None:
    members, supervisor = [group.member(index) for index in range(3)], group.member(3)
    for member in members[:2]:
        member.join()
    members[0].leave()
    with ExitStack() as stack:
        wire, listener = (stack.enter_context(bind("127.0.0.1", 0)) for _ in range(2))
        assert members[0].hand_over(wire.fileno())
        assert not members[1].hand_over(wire.fileno())  # the only one that is left
        listener.listen()
        listener.setblocking(False)
        client = stack.enter_context(socket.create_connection(listener.getsockname()))
        members[1].leave()
        supervisor.relay(1, listener, group.inboxes[1].reads)  # no process is left: both wait
        members[2].join()
        supervisor.relay(1, listener, group.inboxes[1].reads)
        found = [stack.enter_context(one) for one in receive(group.inboxes[2].reads)[0]]
        assert [one.getsockname() for one in found] == [wire.getsockname(), client.getpeername()]
        assert members[2].accepts(2)


def test_an_event_loop_shows_that_it_runs_until_it_leaves(group: Group) -> None:
    member, supervisor = group.member(1), group.member(3)
    assert supervisor.last_beat(1) == 0
    member.join()
    first = supervisor.last_beat(1)
    member.beat()
    assert 0 < first <= supervisor.last_beat(1) <= time.monotonic()
    supervisor.leave(1)
    assert supervisor.last_beat(1) == 0


def test_a_group_shares_a_port_that_no_other_server_can_take() -> None:
    with ExitStack() as stack:
        listeners = [stack.enter_context(one) for one in bind_group("127.0.0.1", 0, 3)]
        assert len({one.getsockname() for one in listeners}) == 1
        for listener in listeners:
            listener.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            bind_group("127.0.0.1", listeners[0].getsockname()[1], 2)
