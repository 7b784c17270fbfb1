"""Which addresses stand for every network, and which no other machine reaches."""

import pytest

from meshpipe.processes.addresses import check_one_address, is_loopback, own_address


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "0x0", "::", "[::]", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0"])
def test_an_address_of_all_networks_is_refused_however_it_is_written(host: str) -> None:
    with pytest.raises(ValueError, match=r"`address` must name one network interface .* or pass `allow_any_address`"):
        check_one_address("address", host)


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.5", "[::1]", "node-0.cluster", "localhost"])
def test_an_address_of_one_interface_is_taken(host: str) -> None:
    check_one_address("address", host)


def test_only_loopback_is_out_of_reach() -> None:
    hosts = ["127.0.0.1", "127.9.9.9", "::1", "localhost", "10.0.0.5", "node-0", "0.0.0.0"]
    assert list(map(is_loopback, hosts)) == [True, True, True, True, False, False, False]


def test_the_own_address_is_that_of_the_way_to_the_coordinator() -> None:
    assert own_address("127.0.0.1:1234") == "127.0.0.1"
    assert own_address(None) == "127.0.0.1"
