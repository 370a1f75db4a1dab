"""What a webhook's URL may look like: one rule, held when a client gives it and again when we send to it.

It is stricter than any standard, on purpose. Where libraries read a URL differently (`http://good\\@evil`, 0177.1,
full-width digits), the one that judges and the one that connects may mean different hosts. So what can be read in two
ways is refused, and what is left is read here alone; `urllib.parse` is not asked, because what it drops and refuses
differs between patch levels of CPython. Where the URL leads to is judged elsewhere, at every delivery.
"""

import re
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import NamedTuple

LONGEST = 2048  # characters

_SHAPE = re.compile(r"(https?)://([^/?]*)(.*)", re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)  # `_`: names of containers have it
#: A host that ends in such a label is an IPv4 address to some readers, with octal and hexadecimal parts (WHATWG URL).
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)


class BadUrl(ValueError):
    """No webhook can go there. The message says what to change, and repeats nothing of the URL: it may hold secrets."""


class Target(NamedTuple):
    """A URL in parts. `host` is a lower-case name or a numeric address without brackets, `path` has the query on it."""

    scheme: str
    host: str
    port: int
    path: str


def check_url(url: str) -> None:
    """Raises BadUrl for what `read_url` can't read."""
    read_url(url)


def read_url(url: str) -> Target:
    """The parts of a URL. Raises BadUrl."""
    if len(url) > LONGEST:
        raise BadUrl(f"must have {LONGEST} characters at most")
    if not re.fullmatch(r"[\x21-\x7e]*", url):
        raise BadUrl("must be of visible ASCII characters; write others with %, and an international name as xn--")
    if "\\" in url:
        raise BadUrl("must hold no backslash")
    if "#" in url:
        raise BadUrl("must have no fragment (#): it is never sent")
    shape = _SHAPE.fullmatch(url)
    if shape is None:
        raise BadUrl("must start with http:// or https://")
    scheme, authority, path = shape.groups()
    if "@" in authority:
        raise BadUrl("must hold no user name or password; webhooks are signed instead")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise BadUrl("must have a host and port that can be read; an IPv6 address stands in brackets")
    host, port = parts.groups()
    scheme = scheme.lower()
    number = int(port) if port is not None else {"http": 80, "https": 443}[scheme]
    if not 1 <= number <= 65535:
        raise BadUrl("must have a port between 1 and 65535")
    return Target(scheme, _host(host), number, path if path.startswith("/") else "/" + path)


def _host(host: str) -> str:
    if host.startswith("["):
        return _ipv6(host[1:-1])
    if not host:
        raise BadUrl("must name a host")
    labels = host.removesuffix(".").split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(host))
        except AddressValueError:
            raise BadUrl("must write an IPv4 address as four decimal numbers, such as 192.0.2.1") from None
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise BadUrl("must name a host by labels of letters, digits, - and _, separated by dots")
    return host.lower()


def _ipv6(host: str) -> str:
    if "%" in host:
        raise BadUrl("must have no zone in its IPv6 address: it means something on one machine only")
    try:
        return str(IPv6Address(host))
    except AddressValueError:
        raise BadUrl("must have an IPv6 address in its brackets") from None
