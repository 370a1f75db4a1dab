"""Which addresses a webhook may be sent to: a pure decision, made of an address and the operator's allow-list.

`ipaddress.is_global` is not asked: it calls multicast, 192.0.0.192 and most embedded forms global, and what it says
differs between patch levels of CPython (cpython#113171). The blocks stand here, from IANA's special-purpose address
registries (RFC 6890, state of 2025-10), so that the decision is the same everywhere.

IPv4 is judged by a list of what is forbidden: all else is ordinary. IPv6 is judged the other way round: only 2000::/3
is handed out to the public (RFC 4291, section 2.4), so whatever is outside is forbidden, known or not.
"""

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: Forbidden whatever the operator allows: machines hand out their credentials there, or nobody can be meant.
NEVER: tuple[tuple[Network, str], ...] = (
    (IPv4Network("0.0.0.0/8"), "of this host on this network (RFC 1122); Linux takes 0.0.0.0 for itself"),
    (IPv4Network("100.100.100.200/32"), "Alibaba Cloud's metadata service"),
    (IPv4Network("168.63.129.16/32"), "Azure's host agent"),
    (IPv4Network("169.254.0.0/16"), "link-local (RFC 3927); the metadata services of most clouds"),
    (IPv4Network("192.0.0.192/32"), "Oracle Cloud's old metadata service"),
    (IPv4Network("224.0.0.0/4"), "multicast (RFC 5771)"),
    (IPv4Network("255.255.255.255/32"), "broadcast (RFC 919)"),
    (IPv6Network("::/128"), "unspecified (RFC 4291); Linux takes it for itself"),
    (IPv6Network("fd00:c1::a9fe:a9fe/128"), "Oracle Cloud's metadata service"),
    (IPv6Network("fd00:42::42/128"), "Scaleway's metadata service"),
    (IPv6Network("fd00:ec2::/32"), "services of EC2: metadata is ::254, credentials of pods ::23"),
    (IPv6Network("fd20:ce::/64"), "Google Cloud's metadata service"),
    (IPv6Network("fe80::/10"), "link-local (RFC 4291); some clouds' metadata services"),
    (IPv6Network("ff00::/8"), "multicast (RFC 4291)"),
)

#: Forbidden unless the operator allows it.
SPECIAL: tuple[tuple[Network, str], ...] = (
    (IPv4Network("10.0.0.0/8"), "private (RFC 1918)"),
    (IPv4Network("100.64.0.0/10"), "a carrier's or a cloud's own (RFC 6598)"),
    (IPv4Network("127.0.0.0/8"), "loopback (RFC 1122)"),
    (IPv4Network("172.16.0.0/12"), "private (RFC 1918)"),
    (IPv4Network("192.0.0.0/24"), "of protocols (RFC 6890)"),
    (IPv4Network("192.0.2.0/24"), "for documentation (RFC 5737)"),
    (IPv4Network("192.31.196.0/24"), "of AS112 (RFC 7535)"),
    (IPv4Network("192.52.193.0/24"), "of multicast tunnels (RFC 7450)"),
    (IPv4Network("192.88.99.0/24"), "of old 6to4 relays (RFC 7526)"),
    (IPv4Network("192.168.0.0/16"), "private (RFC 1918)"),
    (IPv4Network("192.175.48.0/24"), "of AS112 (RFC 7534)"),
    (IPv4Network("198.18.0.0/15"), "for benchmarks (RFC 2544)"),
    (IPv4Network("198.51.100.0/24"), "for documentation (RFC 5737)"),
    (IPv4Network("203.0.113.0/24"), "for documentation (RFC 5737)"),
    (IPv4Network("240.0.0.0/4"), "reserved (RFC 1112)"),
    (IPv6Network("::1/128"), "loopback (RFC 4291)"),
    (IPv6Network("64:ff9b:1::/48"), "of a site's own translators (RFC 8215)"),
    (IPv6Network("2001::/23"), "of protocols (RFC 2928): Teredo, ORCHID, benchmarks"),
    (IPv6Network("2001:db8::/32"), "for documentation (RFC 3849)"),
    (IPv6Network("2002::/16"), "6to4 (RFC 3056)"),
    (IPv6Network("2620:4f:8000::/48"), "of AS112 (RFC 7534)"),
    (IPv6Network("3fff::/20"), "for documentation (RFC 9637)"),
    (IPv6Network("fc00::/7"), "private (RFC 4193)"),
    (IPv6Network("fec0::/10"), "site-local (RFC 3879)"),
)

#: Only this is handed out to the public, and not all of it.
PUBLIC_V6 = IPv6Network("2000::/3")

_MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291, 2.5.5.2: the kernel sends these by IPv4
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052
_COMPATIBLE = IPv6Network("::/96")  # RFC 4291, 2.5.5.1
_TRANSLATED = IPv6Network("::ffff:0:0:0/96")  # SIIT, RFC 2765
_LOCAL_NAT64 = IPv6Network("64:ff9b:1::/48")  # RFC 8215
_6TO4 = IPv6Network("2002::/16")
_TEREDO = IPv6Network("2001::/32")  # RFC 4380
_ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214: the upper half of the interface id, in any network


def why_forbidden(address: Address, allowed: Sequence[Network]) -> str | None:
    """What is wrong with sending to this address, or None. `allowed`: the operator's exceptions; they open no metadata.

    The reason is for the operator's log: said to a client, it would tell about the network behind a name.
    """
    if isinstance(address, IPv4Address):
        return _why_v4(address, allowed)
    if reason := _find(address, NEVER):
        return reason
    for inner in _embedded(address):
        if reason := _why_v4(inner, allowed):
            return f"a disguise of an IPv4 address that is {reason}"
    if any(address in network for network in allowed):
        return None
    if reason := _find(address, SPECIAL):
        return reason
    # NAT64: all that a network without IPv4 has of the IPv4 internet; what stands behind it was judged above.
    return None if address in PUBLIC_V6 or address in _NAT64 else "not of the public part of IPv6 (RFC 4291)"


def _why_v4(address: IPv4Address, allowed: Sequence[Network]) -> str | None:
    if reason := _find(address, NEVER):
        return reason
    if any(address in network for network in allowed):
        return None
    return _find(address, SPECIAL)


def _find(address: Address, blocks: Sequence[tuple[Network, str]]) -> str | None:
    return next((reason for network, reason in blocks if address in network), None)


def _embedded(address: IPv6Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses that the kernel, a translator or a tunnel could send this on to."""
    value = int(address)
    if any(address in block for block in (_MAPPED, _TRANSLATED, _NAT64)):
        yield _low(address)
    if address in _COMPATIBLE and value > 1:  # :: and ::1 mean what they say
        yield _low(address)
    if address in _6TO4:
        yield IPv4Address(value >> 80 & 0xFFFFFFFF)
    if address in _TEREDO:
        yield IPv4Address(value >> 64 & 0xFFFFFFFF)  # the server's
        yield IPv4Address(~value & 0xFFFFFFFF)  # the client's
    if value >> 32 & 0xFFFFFFFF in _ISATAP:
        yield _low(address)
    if address in _LOCAL_NAT64:
        yield from _by_rfc6052(value)


def _by_rfc6052(value: int) -> Iterator[IPv4Address]:
    """What a translator reads for prefixes of /48, /56, /64 and /96 (RFC 6052, 2.2); which one a site has is not known.

    Bits 64 to 71 are left out by all but the last. What one of them reads as padding, 0.x.x.x, is never allowed: so
    this block stays shut, which is what hides least.
    """
    without = (value >> 64) << 56 | value & (1 << 56) - 1
    for found in (without >> 40, without >> 32, without >> 24, value):
        yield IPv4Address(found & 0xFFFFFFFF)


def _low(address: IPv6Address) -> IPv4Address:
    return IPv4Address(int(address) & 0xFFFFFFFF)
