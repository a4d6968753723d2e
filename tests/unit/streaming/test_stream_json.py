"""Values are read by a fast parser first; here the standard library says what they hold."""

import json
import math
import random
import struct
from collections.abc import Callable, Iterator

import pytest

from qarm_feast.errors import EventError
from streaming.messages import json_fields

# Spellings on which parsers differ from each other.
ODD = (
    *(b"NaN", b"-NaN", b"Infinity", b"-Infinity", b"Inf", b"nan", b"1e400", b"-1e400", b"1e-400"),
    *(b"-0", b"-0.0", b"0e5", b"01", b"1.", b".5", b"+1", b"1E+5", b"1e", b"-", b"1_0", b"0x10"),
    *(b"9" * 19, b"-" + b"9" * 19, b"9" * 4300, b"9" * 4301, b"9007199254740993.0", b"5e-324"),
    *(b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\xff"', b'"\xed\xa0\x80"', b'"\x01"', b'"\\x"'),
    *(b'"\\u0000"', b'"a\x00"', b"[1,]", b'{"a":1,}', b"{'a':1}", b"{1:2}", b"[1 2]", b"tru"),
    *(b"1 2", b"1}", b"", b" ", b"\x0b1", b"\xa01", b"1\x00", b"[" * 10_000),
    *(b"[" * depth + b"]" * depth for depth in (100, 199, 200, 201, 255, 256, 900, 10_000)),
)


def _plain(value: bytes) -> object:
    try:
        fields = json.loads(value)
    except (ValueError, RecursionError) as error:
        return ("undecodable", f"not JSON: {error}")
    return fields if isinstance(fields, dict) else ("wrong_type", type(fields))


def _ours(value: bytes) -> object:
    try:
        return json_fields(value)
    except EventError as error:
        if error.reason == "undecodable":
            return ("undecodable", str(error).removeprefix("undecodable: "))
        return (str(error.reason), type(json.loads(value)))


def _same(value: bytes) -> bool:
    # Of a dict, repr tells the order, a float's bits, and a float from an int.
    return repr(_ours(value)) == repr(_plain(value))


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd[:20]))
def test_odd_spellings_are_read_or_refused_as_the_standard_library_does(odd: bytes) -> None:
    assert _same(odd)
    assert _same(b'{"a":' + odd + b"}")
    assert _same(b'{"a":1,"b":2,"a":' + odd + b"}")


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_read_as_the_standard_library_does(codec: str) -> None:
    value = '{"title": "Größe 🙂"}'.encode(codec)

    assert _same(value)
    assert isinstance(_ours(value), dict)


def _decimals(rng: random.Random) -> Iterator[str]:
    for _ in range(20_000):
        number: float = struct.unpack("d", rng.randbytes(8))[0]
        yield json.dumps(number)
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 40)))
        yield f"{rng.randint(-(10**20), 10**20)}.{digits}e{rng.randint(-340, 340)}"
        if math.isfinite(number) and 1e-20 < abs(number) < 1e20:
            # Close to the middle between two neighbours, where rounding is hardest.
            above = math.nextafter(number, math.inf)
            yield f"{number + (above - number) / 2:.60f}"


def test_numbers_have_the_bits_that_the_standard_library_gives_them() -> None:
    texts = list(_decimals(random.Random(0)))
    value = ('{"embedding":[' + ",".join(texts) + "]}").encode()

    ours = json_fields(value)["embedding"]

    assert len(texts) > 40_000
    assert list(map(repr, ours)) == list(map(repr, json.loads(value)["embedding"]))


def _cut(text: bytearray, place: int, rng: random.Random) -> None:
    del text[place : place + rng.randint(1, 8)]


def _flip(text: bytearray, place: int, rng: random.Random) -> None:
    text[place] ^= 1 << rng.randrange(8)


def _copy(text: bytearray, place: int, rng: random.Random) -> None:
    start = rng.randrange(len(text))
    text[place:place] = text[start : start + rng.randint(1, 12)]


def _write(text: bytearray, place: int, rng: random.Random) -> None:
    text[place : place + 1] = rng.choice(ODD)[:30]


CHANGES: tuple[Callable[[bytearray, int, random.Random], None], ...] = (_cut, _flip, _copy, _write)


def test_mutated_texts_are_read_or_refused_as_the_standard_library_does() -> None:
    rng = random.Random(1)
    good = json.dumps(
        {
            "item_id": 42,
            "event_timestamp": 1_700_000_000_000_000,
            "title": "Mug \u00e9 \U0001f642",
            "price": 9.5,
            "nested": {"list": [1, -2.5e-3, True, None, "x"]},
            "embedding": [0.38189810514450073, -1.0, 0.0],
        }
    ).encode()
    num_read = 0

    for _ in range(20_000):
        text = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            rng.choice(CHANGES)(text, rng.randrange(len(text)), rng)
        assert _same(bytes(text)), bytes(text)
        num_read += isinstance(_ours(bytes(text)), dict)

    # Both kinds were there.
    assert 1_000 < num_read < 19_000
