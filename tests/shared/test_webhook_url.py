"""What a webhook's URL must look like."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from urllib3.util import parse_url

from shared.webhook_url import LONGEST, BadUrl, check_url

GOOD = [
    "https://example.com/hook",
    "http://example.com",
    "https://example.com:8443/a/b?c=d&e=%20f",
    "https://xn--bcher-kva.example/",
    "http://10.0.0.1:9/",
    "http://[2001:db8::1]:8080/",
    "https://under_score.example./",
    "HTTPS://EXAMPLE.COM/",
]
BAD = [
    "",
    "example.com",
    "//example.com/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "https://",
    "https:///path",
    "https://user@example.com/",
    "https://user:secret@example.com/",
    "http://good\\@evil.example/",
    "http://good.example#@evil.example/",
    "https://example.com/#fragment",
    "https://example.com:0/",
    "https://example.com:/",
    "https://example.com:65536/",
    "https://example.com:http/",
    "https://example .com/",
    "https://example.com/a b",
    "https://example.com/\n",
    "https://example.com/\0",
    "\thttps://example.com/",
    "https://b\u00fccher.example/",
    "https://\uff11\uff12\uff17.0.0.1/",
    "https://exa%6dple.com/",
    "https://-example.com/",
    "https://example..com/",
    "https://.example.com/",
    "https://" + "a" * 64 + ".example/",
    "https://" + "a." * 127 + "example/",
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://0177.0.0.1/",
    "http://127.0.0.1./",
    "http://127.0.0.256/",
    "http://[::1/",
    "http://::1/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[v1.x]/",
    "https://example.com/" + "a" * LONGEST,
]


@pytest.mark.parametrize("url", GOOD)
def test_an_ordinary_url_is_taken(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize("url", BAD)
def test_what_two_readers_might_read_differently_is_refused_with_a_reason(url: str) -> None:
    with pytest.raises(BadUrl, match=r"^must "):
        check_url(url)


@given(st.text(alphabet=st.sampled_from("htps:/.@\\#?[]%0127ax-_ \u00fc\uff0e"), max_size=40).map("http://".__add__))
def test_whatever_is_taken_names_the_same_host_to_the_library_that_calls_it(url: str) -> None:
    try:
        check_url(url)
    except BadUrl:
        return
    from urllib.parse import urlsplit

    theirs = parse_url(url)
    assert (theirs.host or "").strip("[]") == urlsplit(url).hostname
    assert theirs.auth is None
