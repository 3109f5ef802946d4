"""LiveCodeBench's tests: unpacked, and as the code verifier takes them.

The private tests are JSON inside a pickle inside zlib inside base64. A pickle is a program, and none is ever run here:
its bytes are read as what this data set's are, one string and nothing else, and anything else is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import Any

MOST_BYTES = 1 << 30  # of one problem's unpacked tests

# What a pickle that holds one string is made of: an opcode, and how many bytes follow it.
_PROTOCOL, _FRAME, _MEMOIZE, _PUT, _LONG_PUT, _STOP = b"\x80", b"\x95", b"\x94", b"q", b"r", b"."
_SKIPPED = {_PROTOCOL: 1, _FRAME: 8, _MEMOIZE: 0, _PUT: 1, _LONG_PUT: 4}
_TEXT = {b"\x8c": 1, b"X": 4, b"\x8d": 8}  # bytes of the length, which is little-endian

# What LiveCodeBench lets a program use without importing it: answers to starter code often leave the imports out.
_MODULES = ["string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"]
_MODULES += ["itertools", "functools", "operator", "io", "sys", "json", "typing"]
PRELUDE = "\n".join(
    [
        *(f"from {name} import *" for name in _MODULES),
        f"import {', '.join(_MODULES)}",
        "from builtins import *",
        "sys.setrecursionlimit(50000)",
    ]
)


def arguments(packed: dict[str, Any]) -> dict[str, Any] | str:
    """The ``stdin`` or ``call`` arguments of {"public", "private", "function"} as the data set has them, or why not.

    Its own rules: 1 and 1.0 are the same output, and every test has to pass.
    """
    try:
        tests = [*_tests(packed.get("public")), *_tests(packed.get("private"))]
        inputs, outputs = [one["input"] for one in tests], [one["output"] for one in tests]
        kinds = {one["testtype"] for one in tests}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"the tests can't be unpacked: {error!r}"
    function = packed.get("function")
    if kinds == {"functional"} and isinstance(function, str) and function.isidentifier():
        return {"kind": "call", "function": function, "inputs": inputs, "outputs": outputs, "setup": PRELUDE}
    if kinds == {"stdin"}:
        return {"kind": "stdin", "inputs": inputs, "outputs": outputs, "tolerance": 0.0, "setup": PRELUDE}
    return f"tests of kind {', '.join(sorted(map(str, kinds))) or 'none'}, function {function!r}"


def _tests(text: Any) -> list[dict[str, Any]]:
    """A list of {"input", "output", "testtype"}: from JSON, or packed; none of None. Raises ValueError or TypeError."""
    if not text:
        return []
    found = json.loads(text if text.lstrip().startswith("[") else only_string(_inflated(text)))
    if not isinstance(found, list):
        raise ValueError(f"a {type(found).__name__} where a list of tests belongs")
    return found


def _inflated(text: str) -> bytes:
    try:
        inflating = zlib.decompressobj()
        data = inflating.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"neither JSON nor packed ({error})") from None
    if inflating.unconsumed_tail or not inflating.eof:
        raise ValueError(f"cut off, or more than {MOST_BYTES:,} bytes")
    return data


def only_string(pickled: bytes) -> str:
    """The text of a pickle that holds one string and nothing else. Raises ValueError for any other; loads none."""
    place, texts = 0, []
    while (code := pickled[place : place + 1]) not in (b"", _STOP):
        place += 1
        if code in _SKIPPED:
            place += _SKIPPED[code]
        elif code in _TEXT:
            start = place + _TEXT[code]
            end = start + int.from_bytes(pickled[place:start], "little")
            if end > len(pickled):
                raise ValueError("a string that is cut off")
            texts.append(pickled[start:end].decode("utf-8", "surrogatepass"))
            place = end
        else:
            raise ValueError(f"a pickle with more than a string in it (opcode {code!r} at byte {place - 1})")
    if len(texts) != 1 or place + 1 != len(pickled):
        raise ValueError(f"a pickle of {len(texts)} strings, or one with bytes behind its end")
    return texts[0]
