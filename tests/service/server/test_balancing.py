"""Connections go to the process with the fewest, also if a process drains or has ended."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from sopdeploy.errors import ConfigError
from sopdeploy_service.server.balancing import Group, receive
from sopdeploy_service.server.process import DrainingServer
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
    members = [group.member(place) for place in range(count)]
    for member in members:
        member.join()
    served, opened = "", [0] * count
    with ExitStack() as stack:
        stack.callback(group.close)
        for place in map(int, accepted):
            for end in socket.socketpair():
                stack.enter_context(end)
            if members[place].hand_over(end.fileno()):
                waiting = [receive(inbox.reads)[0] for inbox in group.inboxes]
                place = [len(found) for found in waiting].index(1)
                stack.enter_context(waiting[place][0])
                opened[place] += 1
                members[place].set_open(opened[place])
                members[place].set_taken()
            else:
                opened[place] += 1
                members[place].set_open(opened[place])
            served += str(place)
    assert served == expected


def test_connections_on_their_way_count_and_a_full_inbox_keeps_them_here(group: Group) -> None:
    members = [group.member(place) for place in range(3)]
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
    members, supervisor = [group.member(place) for place in range(3)], group.member(3)
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


# State of the service, places of front ends of other devices that accept connections -> accepts some.
ENGINES = {
    "a running engine": ("ok", (), True),
    "an engine that is restarted": ("engine_restarting", (), True),  # clients get 503 from this process
    "an engine that is restarted, another device": ("engine_restarting", (2,), False),
    "a model that was unloaded": ("no_model", (2,), True),
}


@pytest.mark.parametrize("case", ENGINES)
def test_a_front_end_without_engine_leaves_new_connections_to_another_device(group: Group, case: str) -> None:
    state, others, accepts = ENGINES[case]
    balancer = group.member(0)
    for place in (0, *others):
        group.member(place).join()
    server = SimpleNamespace(
        _service=SimpleNamespace(state=state),
        _elsewhere=(2,),
        server_state=SimpleNamespace(connections={1, 2}),
    )
    for state_now, expected in ((state, accepts), ("ok", True)):
        server._service.state = state_now
        DrainingServer._avoid_dead_engine(server, balancer)
        assert balancer.accepts(0) is expected


def test_an_event_loop_shows_that_it_runs_until_it_leaves(group: Group) -> None:
    member, supervisor = group.member(1), group.member(3)
    assert supervisor.last_beat(1) == 0
    member.join()
    first = supervisor.last_beat(1)
    member.set_accepting(0, accepting=False)
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
