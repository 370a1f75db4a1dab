"""Which addresses a webhook may go to."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from worker.addresses import NEVER, SPECIAL, Network, why_forbidden

EVERYTHING: list[Network] = [IPv4Network("0.0.0.0/0"), IPv6Network("::/0")]
FORBIDDEN: list[Network] = [network for network, _ in (*NEVER, *SPECIAL)]

#: Every way to write an IPv4 address into an IPv6 one that something on the way may turn back.
EMBEDDINGS: dict[str, Callable[[int], int]] = {
    "mapped": lambda bits: 0xFFFF << 32 | bits,
    "compatible": lambda bits: bits,
    "siit": lambda bits: 0xFFFF << 48 | bits,
    "nat64": lambda bits: 0x64FF9B << 96 | bits,
    "nat64 local, /96": lambda bits: 0x64FF9B0001 << 80 | bits,
    "nat64 local, /48": lambda bits: 0x64FF9B0001 << 80 | (bits >> 16) << 64 | (bits & 0xFFFF) << 40,
    "nat64 local, /64": lambda bits: 0x64FF9B0001 << 80 | bits << 24,
    "6to4": lambda bits: 0x2002 << 112 | bits << 80,
    "teredo's client": lambda bits: 0x20010000 << 96 | (bits ^ 0xFFFFFFFF),
    "teredo's server": lambda bits: 0x20010000 << 96 | bits << 64,
    "isatap": lambda bits: 0x26064700 << 96 | 0x5EFE << 32 | bits,
    "isatap, global": lambda bits: 0x26064700 << 96 | 0x02005EFE << 32 | bits,
}


def inside(network: Network) -> st.SearchStrategy[IPv4Address | IPv6Address]:
    return st.ip_addresses(network=str(network)).filter(lambda address: address in network)


def within(*blocks: str) -> st.SearchStrategy[IPv6Address]:
    """Addresses of these blocks, of each about as many: a small one in a large one would never be met."""
    return st.one_of(*(st.ip_addresses(v=6, network=block) for block in blocks))


many = settings(max_examples=2000)

forbidden = st.sampled_from(FORBIDDEN).flatmap(inside)
forbidden_v4 = st.sampled_from([network for network in FORBIDDEN if network.version == 4]).flatmap(inside)
never = st.sampled_from([network for network, _ in NEVER]).flatmap(inside)
embedding = st.sampled_from(sorted(EMBEDDINGS))


@given(forbidden)
def test_every_address_of_a_forbidden_block_is_refused(address: IPv4Address | IPv6Address) -> None:
    assert why_forbidden(address, [])


@given(forbidden_v4, embedding)
def test_every_way_to_write_a_forbidden_address_into_ipv6_is_refused(address: IPv4Address, way: str) -> None:
    assert why_forbidden(IPv6Address(EMBEDDINGS[way](int(address))), [])


@given(never, embedding)
def test_nothing_that_is_allowed_opens_the_metadata_services(address: IPv4Address | IPv6Address, way: str) -> None:
    assert why_forbidden(address, EVERYTHING)
    if address.version == 4:
        assert why_forbidden(IPv6Address(EMBEDDINGS[way](int(address))), EVERYTHING)


@given(st.ip_addresses(v=4) | st.ip_addresses(network="2000::/3"))
def test_every_ordinary_public_address_may_be_called(address: IPv4Address | IPv6Address) -> None:
    assume(not any(address in network for network in FORBIDDEN))
    if address.version == 6:
        assume(int(address) >> 32 & 0xFDFFFFFF != 0x5EFE)
    assert why_forbidden(address, []) is None


@given(st.ip_addresses(v=6))
def test_what_was_never_given_out_of_ipv6_is_refused(address: IPv6Address) -> None:
    assume(not any(address in IPv6Network(block) for block in ("2000::/3", "64:ff9b::/96")))
    assert why_forbidden(address, [])


@pytest.mark.slow
@many
@given(st.booleans().flatmap(lambda bad: forbidden_v4 if bad else st.ip_addresses(v=4)))
def test_nat64_is_judged_as_the_address_that_it_carries(address: IPv4Address) -> None:
    translated = IPv6Address(EMBEDDINGS["nat64"](int(address)))
    assert (why_forbidden(translated, []) is None) == (why_forbidden(address, []) is None)
    assert (why_forbidden(address, []) is None) == (not any(address in network for network in FORBIDDEN))


@many
@given(within("64:ff9b::/32", "64:ff9b:1::/48", "64:ff9b::1:0:0/96"))
def test_the_rest_of_the_translators_block_is_refused(address: IPv6Address) -> None:
    assume(address not in IPv6Network("64:ff9b::/96"))
    assert why_forbidden(address, [])


@many
@given(within("2002::/16", "2002:808:808::/48"))
def test_all_of_6to4_is_refused_whatever_it_carries(address: IPv6Address) -> None:
    assert why_forbidden(address, [])


@many
@given(within("::/8", "::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "::ffff:808:808/128", "64::/16"))
def test_all_of_the_first_block_of_ipv6_is_refused_but_nat64(address: IPv6Address) -> None:
    assume(address not in IPv6Network("64:ff9b::/96"))
    assert why_forbidden(address, [])


@pytest.mark.parametrize("block", sorted(map(str, FORBIDDEN)))
def test_a_block_is_refused_from_its_first_address_to_its_last_and_no_further(block: str) -> None:
    network = ip_network(block)
    first, last = network[0], network[-1]
    assert why_forbidden(first, []) and why_forbidden(last, [])
    for number in (int(first) - 1, int(last) + 1):
        if 0 <= number < 2**network.max_prefixlen:
            neighbour = type(first)(number)
            expected = any(neighbour in other for other in FORBIDDEN)
            outside = neighbour.version == 6 and neighbour not in IPv6Network("2000::/3")
            assert bool(why_forbidden(neighbour, [])) == (expected or outside)


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        "127.255.255.254",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "192.0.0.192",
        "192.88.99.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "0.0.0.0",  # noqa: S104
        "0.1.2.3",
        "168.63.129.16",
        "198.18.0.1",
        "::1",
        "::",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:8.8.8.8",
        "::7f00:1",
        "::ffff:0:7f00:1",
        "::5efe:7f00:1",
        "64:ff9b:0:1::1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "fc00::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
        "100::1",
        "5f00::1",
        "3fff::1",
    ],
)
def test_the_addresses_that_other_guards_let_through_are_refused(text: str) -> None:
    assert why_forbidden(ip_address(text), [])


@pytest.mark.parametrize(
    "text", ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "64:ff9b::101:101"]
)
def test_well_known_public_addresses_are_not_refused(text: str) -> None:
    assert why_forbidden(ip_address(text), []) is None


def test_the_operator_opens_networks_of_his_own_and_nothing_beside_them() -> None:
    allowed = [ip_network("10.20.0.0/16"), ip_network("127.0.0.0/8"), ip_network("fd12:3456::/32")]
    for text in ("10.20.0.1", "127.0.0.1", "fd12:3456::1", "1.1.1.1"):
        assert why_forbidden(ip_address(text), allowed) is None, text
    for text in ("10.21.0.1", "192.168.0.1", "::1", "::ffff:10.20.0.1", "64:ff9b::a15:1", "fd12:3457::1"):
        assert why_forbidden(ip_address(text), allowed), text
