"""Which addresses are public, by the registries of IANA, and what no setting opens."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from providers.addresses import IPAddress, is_never_opened, is_public, parse_host


def words(text: str) -> list[str]:
    return text.split()


PUBLIC = words("""
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255 169.255.0.0
172.15.255.255 172.32.0.0 192.0.1.0 192.0.3.0 192.88.98.255 192.88.100.0 192.167.255.255 192.169.0.0 198.17.255.255
198.20.0.0 198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0 223.255.255.255 168.63.129.15
2001:200:: 2001:4860:4860::8888 2001:db7:ffff:ffff:ffff:ffff:ffff:ffff 2001:db9:: 2003:: 2606:4700:4700::1111
2620:4f:7fff:ffff:ffff:ffff:ffff:ffff 2620:4f:8001:: 2a00:1450:4001:810::200e 3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff
""")

# The first and the last address of every range that the registries list, and what is in them that attacks have used.
NOT_PUBLIC = words("""
0.0.0.0 0.0.0.1 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 100.100.100.200 127.0.0.0 127.0.0.1
127.255.255.255 169.254.0.0 169.254.169.254 169.254.170.2 169.254.255.255 172.16.0.0 172.31.255.255 192.0.0.0 192.0.0.8
192.0.0.9 192.0.0.10 192.0.0.170 192.0.0.192 192.0.0.255 192.0.2.0 192.0.2.255 192.31.196.0 192.31.196.255 192.52.193.0
192.52.193.255 192.88.99.0 192.88.99.255 192.168.0.0 192.168.255.255 192.175.48.0 192.175.48.255 198.18.0.0
198.19.255.255 198.51.100.0 198.51.100.255 203.0.113.0 203.0.113.255 224.0.0.0 224.0.0.1 239.255.255.255 240.0.0.0
255.255.255.254 255.255.255.255 168.63.129.16
:: ::1 ::7f00:1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:169.254.169.254 ::ffff:0:127.0.0.1 64:ff9b::
64:ff9b::8.8.8.8 64:ff9b::127.0.0.1 64:ff9b:1:: 64:ff9b:1:7f00:0:100:: 64:ff9b:1:ffff:ffff:ffff:ffff:ffff 100::
100:0:0:1:: 1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2001:: 2001::1 2001:0:7f00:1:: 2001:1::1 2001:1::2 2001:2:: 2001:3::
2001:4:112:: 2001:10:: 2001:20:: 2001:30:: 2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff 2001:db8:: 2001:db8:ffff::1 2002::
2002:7f00:1:: 2002:a9fe:a9fe:: 2002:808:808::1 2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2620:4f:8000::
2620:4f:8000:ffff:: 3fff:: 3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff 4000:: 5f00:: fc00:: fd00:ec2::254 fd20:ce::254
fdff:ffff:: fe80:: fe80::1 fe80::1%eth0 fe80::1%1 febf:: fec0:: fec0::1 feff:: ff00:: ff02::1 ff0e::1
2606:4700:4700::1111%eth0
""")


@pytest.mark.parametrize("text", PUBLIC)
def test_what_lies_between_the_special_ranges_is_public(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_what_the_registries_list_is_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


# Said once more and otherwise: what Python takes for global, but for these.
GLOBAL_BY_MISTAKE: list[IPv4Network | IPv6Network] = [
    ip_network(text)
    for text in words("""
    168.63.129.16 192.0.0.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.175.48.0/24 224.0.0.0/4
    ::/3 2001::/23 2002::/16 2620:4f:8000::/48 3fff::/20 4000::/2 8000::/1
    """)
]


def by_python(address: IPAddress) -> bool:
    return address.is_global and not any(address in network for network in GLOBAL_BY_MISTAKE)


def near(network: IPv4Network | IPv6Network) -> st.SearchStrategy[IPAddress]:
    """Addresses in and around a range: most of the space is far from all of them.words("""
    kind = type(network[0])
    first, last = int(network[0]), int(network[-1])
    top = 2 ** network[0].max_prefixlen - 1
    return st.one_of(
        st.integers(max(0, first - 2), min(top, first + 2)),
        st.integers(max(0, last - 2), min(top, last + 2)),
        st.integers(first, last),
    ).map(kind)


RANGES = [*GLOBAL_BY_MISTAKE, *(ip_network(text) for text in NOT_PUBLIC if "%" not in text)]


@given(st.ip_addresses() | st.sampled_from(RANGES).flatmap(near))
@example(IPv4Address("0.0.0.0"))
@example(IPv6Address("::"))
def test_the_rule_is_what_python_calls_global_but_for_its_mistakes(address: IPAddress) -> None:
    assert is_public(address) is by_python(address)


@given(st.ip_addresses(v=4))
def test_no_way_to_write_an_ipv4_address_in_ipv6_is_public(address: IPv4Address) -> None:
    number = int(address)
    for text in ("::", "::ffff:0:0", "::ffff:0:0:0", "64:ff9b::", "64:ff9b:1::"):
        assert not is_public(IPv6Address(int(IPv6Address(text)) | number))
    assert not is_public(IPv6Address((0x2002 << 112) | (number << 80)))
    assert not is_public(IPv6Address((0x20010000 << 96) | (number ^ 0xFFFFFFFF)))


@given(st.ip_addresses() | st.sampled_from(RANGES).flatmap(near))
def test_what_is_public_can_be_opened(address: IPAddress) -> None:
    assert not (is_public(address) and is_never_opened(address))


@pytest.mark.parametrize("text", ["127.0.0.1", "10.0.0.1", "192.168.1.5", "100.64.0.1", "::1", "fd12::5", "8.8.8.8"])
def test_a_place_where_a_model_may_be_can_be_opened(text: str) -> None:
    assert not is_never_opened(ip_address(text))


@pytest.mark.parametrize(
    "text",
    words("""
    169.254.169.254 169.254.170.2 169.254.0.1 100.100.100.200 168.63.129.16 192.0.0.192 fe80::1 fe80::1%eth0
    fd00:ec2::254 fd00:ec2::23 fd20:ce::254 fd00:42::42 ::ffff:169.254.169.254 ::169.254.169.254
    64:ff9b::169.254.169.254 64:ff9b::100.100.100.200 64:ff9b:1::169.254.169.254 2002:a9fe:a9fe:: 0.0.0.0 ::
    255.255.255.255 224.0.0.1 ff02::1 ::ffff:127.0.0.1 fec0::1 fd12::5%eth0
    """),
)
def test_metadata_services_and_what_stands_for_other_addresses_are_never_opened(text: str) -> None:
    assert is_never_opened(ip_address(text))


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Models.Example", "models.example"),
        ("localhost", "localhost"),
        ("a_b.my-models.example", "a_b.my-models.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("1e100.example", "1e100.example"),
        ("127.0.0.1", IPv4Address("127.0.0.1")),
        ("::FFFF:7f00:1", IPv6Address("::ffff:127.0.0.1")),
        ("a" * 63 + ".b", "a" * 63 + ".b"),
    ],
)
def test_a_host_is_an_address_or_a_name_in_lower_case(text: str, host: object) -> None:
    assert parse_host(text) == host


@pytest.mark.parametrize(
    "text",
    [
        *words("""
        127.1 127.0.1 2130706433 017700000001 0x7f000001 0x7f.0.0.1 0177.0.0.1 127.0.0.01 127.0.0.256 1.2.3.4.5 a.1 a.0x
        a.0x7f 127.0.0.1. localhost. . .. a..b .a -a a- a.-b a%2eb １２７.0.0.1 127。0。0。1 ①②⑦.0.0.1 bücher.example
        loc\u0130l fe80::1%eth0 fe80::1%25eth0 [::1] ::1::2 v1.a:b a:b a/b a\\b a@b a?b a#b
        """),
        *("", " ", "a b", " a", "a ", "a\n", "a\0", "a" * 64, ".".join(["a" * 60] * 5), "127.0.0.1\n", "\u212a"),
    ],
)
def test_what_one_reader_takes_for_another_host_than_the_next_is_none(text: str) -> None:
    assert parse_host(text) is None
