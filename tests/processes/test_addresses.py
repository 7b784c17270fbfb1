"""Wildcard addresses, and addresses that no other machine can reach."""

import pytest

from meshpipe.processes.addresses import check_one_address, is_loopback, own_address


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "0x0", "::", "[::]", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0"])
def test_a_wildcard_address_is_refused_in_any_notation(host: str) -> None:
    with pytest.raises(ValueError, match=r"`address` must name one network interface .* or pass `allow_any_address`"):
        check_one_address("address", host)


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.5", "[::1]", "node-0.cluster", "localhost"])
def test_an_address_of_one_interface_is_accepted(host: str) -> None:
    check_one_address("address", host)


def test_only_loopback_is_unreachable_from_outside() -> None:
    hosts = ["127.0.0.1", "127.9.9.9", "::1", "localhost", "10.0.0.5", "node-0", "0.0.0.0"]
    assert list(map(is_loopback, hosts)) == [True, True, True, True, False, False, False]


def test_own_address_is_on_the_interface_towards_the_coordinator() -> None:
    assert own_address("127.0.0.1:1234") == "127.0.0.1"
    assert own_address(None) == "127.0.0.1"
