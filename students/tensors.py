"""The heads of weight files: names, shapes and places of the tensors, without a byte of the tensors themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit


def head(file: Path) -> tuple[int, dict[str, Any]]:
    """The length of a file's header in bytes, and its tensors ({name: {dtype, shape, data_offsets}}).

    Raises ValueError where it has none that can be read: it is cut off or damaged.
    """
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("no header")
        found = json.loads(handle.read(length))
    if not isinstance(found, dict):
        raise ValueError("a header that is no mapping")
    return length, {name: entry for name, entry in found.items() if name != "__metadata__"}


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a folder's files. Raises ValueError, with the file, as ``head`` does."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            found |= {name: tuple(entry["shape"]) for name, entry in head(file)[1].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from None
    return found


def gguf(file: Path) -> Any:
    """The gguf library's reader of a file; it reads the head at once, with a large vocabulary for seconds.

    Its hundreds of thousands of slices are of a plain array over the mapped file, which are cheaper than np.memmap's.
    """
    import numpy as np
    from gguf import GGUFReader

    class Reader(GGUFReader):
        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = mapped.view(np.ndarray)

    return Reader(file)
