"""Which addresses are public: those that routers of the whole Internet know, for one host.

Our own lists, since `ipaddress.is_global` has changed within Python 3.11 to 3.13, and calls
multicast, transition addresses and 168.63.129.16 global.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address

# IANA's registry of special-purpose IPv4 addresses, and what is beyond unicast.
_NOT_PUBLIC_V4 = [
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT; Alibaba's metadata is 100.100.100.200
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, and the metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocols; Oracle's metadata is 192.0.0.192
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "168.63.129.16/32",  # public by its number, but Azure's host answers there
    )
]
_UNICAST_V6 = IPv6Network("2000::/3")  # all that IANA gives to networks; the rest is special
_NOT_PUBLIC_V6 = [
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocols: Teredo (which wraps an IPv4 address), ORCHID, benchmarks
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: wraps an IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
]
# IPv4 in IPv6, where the host that we would reach is the IPv4 one: mapped, and NAT64, by which all
# names resolve on a network without IPv4 (RFC 6052).
_WRAPPED_V4 = [IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96")]
_ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214: the interface of a tunnel, before an IPv4 address


def is_public(address: Address) -> bool:
    """Whether a stranger may have us ask this address."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        if any(address in network for network in _WRAPPED_V4):
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if int(address) >> 32 & 0xFFFFFFFF in _ISATAP:
            return False
        return address in _UNICAST_V6 and not any(address in net for net in _NOT_PUBLIC_V6)
    return not any(address in network for network in _NOT_PUBLIC_V4)
