"""Documents as somebody might forge them: any part of a JSON document replaced, removed or added, and any text."""

import copy
import json
import random
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 10**9, 2**53, 10**18, 2**63, 10**30),
    *(
        "",
        ".",
        "..",
        "../../secret",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "\x1b[2J[red]",
        "x" * 300,
        "inf",
        "NaN",
        "O",
        "V8",
    ),
    *("datetime64[s]", "float64", "stage_0", "stage_999999999", "uint32", ">f4", "|b1", "(2,)f4", "i4,f4"),
    *([], {}, [[]], [0], [1, 1, 1], [-1], [10**12, 10**12], [1.0], [True], ["1"], {"0": 1}, {"": None}),
]
TOKENS = [
    "Infinity",
    "-Infinity",
    "NaN",
    "1e999",
    "-1e999",
    "9" * 5000,
    "[" * 70 + "]" * 70,
    "[" * 200_000,
    '{"a":' * 900,
]


def forge(text: bytes, chance: random.Random) -> bytes:
    """The document with a few parts changed, or as any other text."""
    kind = chance.random()
    if kind < 0.1:
        return damaged(text, chance)
    document = json.loads(text)
    if kind < 0.3:  # what Python's JSON does not write
        mark = "a mark that is in no document"
        document = put(document, mark, chance)
        return json.dumps(document).replace(json.dumps(mark), chance.choice(TOKENS)).encode()
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        document = put(document, copy.deepcopy(chance.choice(VALUES)), chance)
    return json.dumps(document).encode()


def damaged(text: bytes, chance: random.Random) -> bytes:
    return chance.choice(
        [
            b"",
            b"\xef\xbb\xbf" + text,
            b"\xff" + text,
            text[: chance.randrange(len(text))],
            text + text,
            text.decode().encode("utf-16"),
            bytes(chance.randrange(256) for _ in range(200)),
            b'"text"',
            b"0",
        ]
    )


def put(document: Any, value: Any, chance: random.Random) -> Any:
    """Replaces a part by the value, removes it, or adds the value beside it."""
    places = list(_places(document))
    if not places or chance.random() < 0.02:
        return value
    container, key = chance.choice(places)
    how = chance.random()
    if how < 0.15:
        del container[key]
    elif how < 0.25 and isinstance(container, dict):
        container[str(value)[:50]] = container.pop(key)
    elif how < 0.3 and isinstance(container, list):
        container.insert(key, value)
    else:
        container[key] = value
    return document


def _places(value: Any) -> Any:
    if isinstance(value, dict):
        for key, inner in list(value.items()):
            yield value, key
            yield from _places(inner)
    elif isinstance(value, list):
        for key, inner in enumerate(value):
            yield value, key
            yield from _places(inner)
