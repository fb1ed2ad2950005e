"""leanserve.asgi.forwarded, for any header that a client may send through proxies whose habits are known."""

from __future__ import annotations

import ipaddress

from hypothesis import given, settings
from hypothesis import strategies as st

from leanserve.asgi.forwarded import TrustedProxies
from leanserve.protocol.events import Headers

TRUSTED = "10.0.0.0/8, fd00::/8, unix"
PROXIES = st.one_of(
    st.ip_addresses(network="10.0.0.0/8"), st.ip_addresses(network="fd00::/8"),
).map(str)  # fmt: skip
OUTSIDE = (
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
    .filter(lambda address: not TrustedProxies(TRUSTED).trusts((str(address), 0)))
    .map(str)
)
# What a client puts into its own request: anything, and often what looks like the real thing.
JUNK = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.sampled_from(
            ["10.0.0.9", "127.0.0.1", "1.2.3.4", "[::1]:80", "fe80::1%eth0", "unknown", ",", " ", "\t", "[",
             '"', "%", ":", "::ffff:10.0.0.1", "_x", "\x85", "for=", "1.2.3.4:99"]
        ),
        max_size=8,
    ).map(lambda parts: "".join(parts).encode("latin-1")),
)  # fmt: skip
NAMES = st.sampled_from([b"x-forwarded-for", b"x-forwarded-proto"])


@given(st.lists(st.tuples(NAMES, JUNK), max_size=5), st.sampled_from(["*", TRUSTED, "", "10.0.0.1"]), PROXIES)
@settings(max_examples=400)
def test_whatever_is_sent_an_address_comes_out(headers: Headers, trusted: str, peer: str) -> None:
    for client in ((peer, 1), None):
        found, scheme = TrustedProxies(trusted).resolve(headers, client, "http")
        assert scheme in ("http", "https")
        if found != client:
            assert found is not None
            assert str(ipaddress.ip_address(found[0])) == found[0]
            assert "%" not in found[0]


@given(
    st.lists(st.tuples(NAMES, JUNK), max_size=3), OUTSIDE, st.lists(PROXIES, min_size=1, max_size=4),
    st.data(),
)  # fmt: skip
@settings(max_examples=400)
def test_a_client_cannot_choose_its_address(
    headers: Headers, client: str, proxies: list[str], data: st.DataObject
) -> None:
    """Each proxy adds whom it sees, to the last line or in a line of its own, with or without a port."""
    seen = [*headers]
    for hop in [client, *proxies[:-1]]:
        text = hop.encode()
        if data.draw(st.booleans()):
            text = (b"[" + text + b"]" if b":" in text else text) + b":1234"
        if seen and seen[-1][0] == b"x-forwarded-for" and data.draw(st.booleans()):
            seen[-1] = (b"x-forwarded-for", seen[-1][1] + b", " + text)
        else:
            seen.append((b"x-forwarded-for", text))
    found, _ = TrustedProxies(TRUSTED).resolve(seen, (proxies[-1], 1), "http")
    assert found == (client, 0)


@given(st.lists(st.tuples(NAMES, JUNK), max_size=5), OUTSIDE)
def test_a_peer_that_is_not_trusted_is_not_read(headers: Headers, peer: str) -> None:
    assert TrustedProxies(TRUSTED).resolve(headers, (peer, 1), "http") == ((peer, 1), "http")


@given(st.lists(st.tuples(NAMES, JUNK), max_size=3), OUTSIDE, PROXIES)
def test_with_a_star_the_last_hop_counts(headers: Headers, client: str, peer: str) -> None:
    seen = [*headers, (b"x-forwarded-for", client.encode())]
    assert TrustedProxies("*").resolve(seen, (peer, 1), "http")[0] == (client, 0)
