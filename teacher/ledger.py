"""The ledger: what was asked of a model and what came back, in one SQLite file that outlives every artifact.

An answer counts once it is on the disk: each is committed, and synced, as it arrives. What the ledger keeps is the raw
body; trace rows are read from it again and again. Only an exchange that failed is ever asked again, so a completed one
is never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from r1distill.data.errors import R1DistillError, RequestError

VERSION = 1
FILE = "ledger.sqlite"


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Exchange:
    """One request and what became of it. ``scope`` is the hash of the model and its settings, ``key`` of all of it."""

    key: str
    scope: str
    state: str  # done, truncated, refused, failed
    error: str | None
    request: str  # the body that was sent
    body: bytes | None  # the body that came back, of what did not fail
    attempts: int
    seconds: float  # of the last attempt
    cost_usd: str | None
    created_at: str  # ISO 8601, UTC


COLUMNS = [field.name for field in fields(Exchange)]
PUT = (
    f"INSERT INTO exchanges VALUES ({', '.join(f':{name}' for name in COLUMNS)}) ON CONFLICT (key) DO UPDATE SET "
    f"{', '.join(f'{name} = excluded.{name}' for name in COLUMNS[1:])} WHERE exchanges.state = 'failed'"
)


class Ledger:
    """Opens ``folder``'s ledger; a context manager. Raises R1DistillError where it is damaged or can't be written."""

    def __init__(self, folder: Path):
        self.file = folder / FILE
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.file, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise R1DistillError(
                    f"{self.file} has format {version}, this version of r1distill reads {VERSION}. "
                    "Use the version that wrote it, or another R1DISTILL_HOME."
                )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS exchanges (key TEXT PRIMARY KEY, scope TEXT NOT NULL, state TEXT NOT NULL, "
                "error TEXT, request TEXT NOT NULL, body BLOB, attempts INTEGER NOT NULL, seconds REAL NOT NULL, "
                "cost_usd TEXT, created_at TEXT NOT NULL)"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS costs ON exchanges (scope) WHERE cost_usd IS NOT NULL")
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def get(self, key: str) -> Exchange | None:
        """The exchange with this key, or None where it was never completed."""
        with self._explained():
            row = self._db.execute(f"SELECT {', '.join(COLUMNS)} FROM exchanges WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
            found = dict(zip(COLUMNS, row, strict=True))
            return Exchange(**{**found, "body": found["body"] and zlib.decompress(found["body"])})

    def settled(self, key: str) -> bool:
        """Whether an answer is here; what failed may be asked again."""
        with self._explained():
            query = "SELECT 1 FROM exchanges WHERE key = ? AND state != 'failed'"
            return self._db.execute(query, (key,)).fetchone() is not None

    def put(self, exchange: Exchange) -> None:
        """Commit one exchange; on return it is on the disk. It replaces a failed one and no other."""
        row = dict(zip(COLUMNS, astuple(exchange), strict=True))
        row["body"] = None if exchange.body is None else zlib.compress(exchange.body)
        with self._explained():
            self._db.execute(PUT, row)

    def spent_usd(self, scope: str) -> Decimal:
        """What a model with its settings has cost so far."""
        with self._explained():
            query = "SELECT cost_usd FROM exchanges WHERE scope = ? AND cost_usd IS NOT NULL"
            return sum((Decimal(cost) for (cost,) in self._db.execute(query, (scope,))), Decimal(0))

    @contextmanager
    def asking(self, scope: str) -> Iterator[None]:
        """Hold the right to ask one model with its settings: two runs at once would pay for one answer twice."""
        lock = FileLock(self.file.parent / f".{scope[:16]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RequestError(
                f"another run is asking the same model with the same settings (its lock is {lock.lock_file}). "
                "Wait for it to end; what it gets will be found in the ledger."
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, zlib.error, OSError) as error:
            free = _free_bytes(self.file.parent)
            raise R1DistillError(
                f"the ledger {self.file} can't be used: {error} ({free} free on its disk). Nothing more is asked. Free "
                "some space if there is none; if the file is damaged, move it away to start a new one."
            ) from error


def _free_bytes(folder: Path) -> str:
    try:
        stat = os.statvfs(folder)
        return f"{stat.f_bavail * stat.f_frsize / 2**20:,.0f} MiB"
    except OSError:
        return "an unknown number of bytes"
