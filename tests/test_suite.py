"""The suite's own rules: no network, and tiny models that depend on their seed alone."""

import socket

import pytest
import torch


@pytest.mark.parametrize("connect", ["connect", "connect_ex"])
@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.com", 443)])
def test_only_the_loopback_interface_can_be_reached(address, connect):
    with socket.socket() as outside, pytest.raises(RuntimeError, match="loopback"):
        getattr(outside, connect)(address)


def test_the_loopback_interface_works():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"x")
        assert server.accept()[0].recv(1) == b"x"


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_bert_classifier", "tiny_t5"])
def test_tiny_models_are_small_seeded_and_leave_the_generator_alone(name, request):
    make = request.getfixturevalue(name)
    before = torch.get_rng_state()
    one, same, other = make(), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(one.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert sum(p.numel() for p in one.parameters()) < 60_000
    assert torch.get_num_threads() == 1
