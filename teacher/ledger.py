"""The ledger: what was asked of a model and what came back, in one SQLite file that outlives every artifact.

An answer counts once it is on the disk: it is committed, and synced, as it arrives; those that arrive while the disk is
busy share the next commit. What the ledger keeps is the raw body; trace rows are read from it again and again. Only an
exchange that failed is ever asked again, so a completed one is never overwritten. Several machines write a part each,
and ``merge`` brings the parts together. What an exchange cost stays on the account when another takes its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from r1distill.data.errors import R1DistillError, RequestError

VERSION = 3  # 1 had bodies by zlib alone, 2 no table of what was replaced
READABLE = (0, 1, 2, VERSION)  # 0: a new file
FILE = "ledger.sqlite"
ZSTD = b"\x28\xb5\x2f\xfd"  # how its frames begin
ROWS_A_STATEMENT = 64  # the interpreter's lock changes hands once a statement, which is what a busy client waits for
ROWS_A_COMMIT = 1024
PAGES_IN_WAL = 16_384  # 64 MiB before it is copied into the file


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
REPLACE = f"ON CONFLICT (key) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in COLUMNS[1:])}"
PAID = ("key", "created_at", "scope", "cost_usd")  # of an exchange; the first two tell it from every other
# Whoever merges, and in whatever order: of two exchanges the answer wins, then the newer, then one of them for good.
RANK = "({0}.state != 'failed', {0}.created_at, ifnull({0}.body, x''), {0}.request)"


class Ledger:
    """Opens ``folder``'s ledger, or one ``part`` of it; a context manager, for one thread.

    A part is a file of its own, beside the whole where there is one: it is written to, and what the whole has is found
    as well. Any number of processes may have a file open. Raises R1DistillError where one is damaged or can't be
    written.
    """

    def __init__(self, folder: Path, part: str | None = None):
        self.file = folder / (FILE if part is None else FILE.replace(".", f"-{part}.", 1))
        self._waiting: queue.SimpleQueue[tuple[Exchange, Future[None]] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._writing = threading.Lock()
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
            # Two that make the file at once would find it locked, however long they are willing to wait.
            if part is not None and (folder / FILE).is_file():
                Ledger(folder).__exit__()  # brought to this version
            with FileLock(folder / f".{self.file.name}.lock"):
                self._db = self._connect()
                self._db.execute("PRAGMA journal_mode = WAL")
                self._prepare()
            # A connection of its own: a look at the ledger doesn't wait for the disk.
            self._readings = [self._connect()]
            if part is not None and (folder / FILE).is_file():
                self._readings.append(sqlite3.connect(folder / FILE, timeout=60, isolation_level=None))

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        """Commit what is still waiting, and close."""
        if self._writer is not None:
            self._waiting.put(None)
            self._writer.join()
        for db in [*self._readings, self._db]:
            db.close()

    def get(self, key: str) -> Exchange | None:
        """The exchange with this key, or None where it was never completed."""
        return self.fetch([key]).get(key)

    def fetch(self, keys: list[str]) -> dict[str, Exchange]:
        """The exchanges that are here, by key: as many as fit in memory."""
        with self._explained():
            query = f"SELECT {', '.join(COLUMNS)} FROM exchanges WHERE key IN (SELECT value FROM json_each(?))"
            found: dict[str, Exchange] = {}
            for one in (Exchange(*row) for db in self._readings for row in db.execute(query, (json.dumps(keys),))):
                if one.key not in found or found[one.key].state == "failed":
                    found[one.key] = replace(one, body=unpacked(one.body)) if one.body else one
            return found

    def states(self, keys: list[str]) -> dict[str, str]:
        """The states of the exchanges that are here, by key."""
        with self._explained():
            query = "SELECT key, state FROM exchanges WHERE key IN (SELECT value FROM json_each(?))"
            found: dict[str, str] = {}
            for key, state in (row for db in self._readings for row in db.execute(query, (json.dumps(keys),))):
                if found.get(key, "failed") == "failed":
                    found[key] = state
            return found

    def settled(self, key: str) -> bool:
        """Whether an answer is here; what failed may be asked again."""
        return self.states([key]).get(key, "failed") != "failed"

    def put(self, *exchanges: Exchange) -> None:
        """Commit exchanges, all of them or none; on return they are on the disk. Each replaces a failed one at most."""
        rows = [{**vars(one), "body": one.body and packed(one.body)} for one in exchanges]
        with self._explained(), self._writing, self._transaction():
            for start in range(0, len(rows), ROWS_A_STATEMENT):
                some = rows[start : start + ROWS_A_STATEMENT]
                row = f"({', '.join('?' * len(COLUMNS))})"
                self._db.execute(
                    f"INSERT INTO exchanges VALUES {', '.join([row] * len(some))} {REPLACE} "
                    "WHERE exchanges.state = 'failed'",
                    [value for one in some for value in one.values()],
                )
            paid = [{name: one[name] for name in PAID} for one in rows if one["cost_usd"] is not None]
            self._db.executemany(
                "INSERT OR IGNORE INTO replaced SELECT :key, :created_at, :scope, :cost_usd WHERE NOT EXISTS "
                "(SELECT 1 FROM exchanges WHERE key = :key AND created_at = :created_at)",
                paid,
            )

    def keep(self, exchange: Exchange) -> Future[None]:
        """``put`` in a thread of its own, with all that has come while the disk was busy; done once it is on the disk.

        The result holds the exception where it can't be written.
        """
        if self._writer is None:
            self._writer = threading.Thread(target=self._keep_on, name="ledger", daemon=True)
            self._writer.start()
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # whoever asked may go away; what came back is kept all the same
        self._waiting.put((exchange, done))
        return done

    def spent_usd(self, scope: str) -> Decimal:
        """What a model with its settings has cost so far, with what failed and was asked again."""
        query = " UNION ALL ".join(
            f"SELECT key, created_at, cost_usd FROM {table} WHERE scope = ?1 AND cost_usd IS NOT NULL"
            for table in ("exchanges", "replaced")
        )
        with self._explained():
            paid = (row for db in self._readings for row in db.execute(query, (scope,)))
            if len(self._readings) == 1:
                return sum((Decimal(cost) for _, _, cost in paid), Decimal(0))
            costs = {(key, created_at): cost for key, created_at, cost in paid}  # merged or not yet
            return sum(map(Decimal, costs.values()), Decimal(0))

    @contextmanager
    def asking(self, scope: str) -> Iterator[None]:
        """Hold the right to ask one model with its settings: two runs at once would pay for one answer twice."""
        part = self.file.stem.removeprefix("ledger")
        lock = FileLock(self.file.parent / f".{scope[:16]}{part}.lock")
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

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.file, timeout=60, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {PAGES_IN_WAL}")
        return db

    def _prepare(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in READABLE:
            raise R1DistillError(
                f"{self.file} has format {version}, this version of r1distill reads {VERSION}. "
                "Use the version that wrote it, or another R1DISTILL_HOME."
            )
        if version == VERSION:
            return
        with self._transaction():
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS exchanges (key TEXT PRIMARY KEY, scope TEXT NOT NULL, state TEXT NOT NULL, "
                "error TEXT, request TEXT NOT NULL, body BLOB, attempts INTEGER NOT NULL, seconds REAL NOT NULL, "
                "cost_usd TEXT, created_at TEXT NOT NULL)"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS costs ON exchanges (scope) WHERE cost_usd IS NOT NULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS replaced (key TEXT, created_at TEXT, scope TEXT NOT NULL, "
                "cost_usd TEXT NOT NULL, PRIMARY KEY (key, created_at)) WITHOUT ROWID"
            )
            self._db.execute(
                "CREATE TRIGGER IF NOT EXISTS costs_stay AFTER UPDATE ON exchanges "
                "WHEN old.cost_usd IS NOT NULL AND old.created_at != new.created_at BEGIN "
                f"INSERT OR IGNORE INTO replaced VALUES ({', '.join(f'old.{name}' for name in PAID)}); END"
            )
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One that waits for other processes at its beginning, where nothing is lost if it waits in vain."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # a full disk has rolled it back already
                self._db.execute("ROLLBACK")
            raise

    def _keep_on(self) -> None:
        """The writer's life: commit all that waits, tell who waited, again."""
        going = True
        while going:
            batch, going = self._next_batch()
            if not batch:
                continue
            try:
                self.put(*[exchange for exchange, _ in batch])
            except BaseException as error:
                for _, done in batch:
                    done.set_exception(error)
            else:
                for _, done in batch:
                    done.set_result(None)

    def _next_batch(self) -> tuple[list[tuple[Exchange, Future[None]]], bool]:
        """What has come, at least one; and whether more may come."""
        batch: list[tuple[Exchange, Future[None]]] = []
        while len(batch) < ROWS_A_COMMIT:
            try:
                one = self._waiting.get(block=not batch)
            except queue.Empty:
                break
            if one is None:
                return batch, False
            batch.append(one)
        return batch, True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, zlib.error, pa.ArrowException, OSError) as error:
            free = _free_bytes(self.file.parent)
            raise R1DistillError(
                f"the ledger {self.file} can't be used: {error} ({free} free on its disk). Nothing more is asked. Free "
                "some space if there is none; if the file is damaged, move it away to start a new one."
            ) from error


def merge(into: Ledger, parts: Iterable[Path]) -> int:
    """Bring the ledgers that are files into one; returns how many exchanges it got from them.

    Of two exchanges with one key the newer answer wins, and any answer over a failure, whatever the order of the parts:
    a merge can be cut off anywhere and done again. The parts are left as they are. Raises R1DistillError where one of
    them is no ledger.
    """
    got = 0
    for part in parts:
        if not part.is_file():
            raise R1DistillError(f"there is no ledger {part} to merge into {into.file}.")
        with into._explained(), closing(into._connect()) as db:
            db.execute("ATTACH ? AS part", (str(part),))
            if (version := db.execute("PRAGMA part.user_version").fetchone()[0]) not in READABLE[1:]:
                raise R1DistillError(f"{part} has format {version}, not a ledger's that can be merged ({VERSION}).")
            last = db.execute("SELECT ifnull(max(rowid), 0) FROM part.exchanges").fetchone()[0]
            paid = f"INSERT OR IGNORE INTO replaced SELECT {', '.join(PAID)} FROM part."
            for start in range(0, last, ROWS_A_COMMIT):
                query = (
                    f"INSERT INTO exchanges SELECT {', '.join(COLUMNS)} FROM part.exchanges AS new "
                    f"WHERE new.rowid > ? AND new.rowid <= ? {REPLACE} "
                    f"WHERE {RANK.format('excluded')} > {RANK.format('exchanges')}"
                )
                got += db.execute(query, (start, start + ROWS_A_COMMIT)).rowcount
                lost = (
                    f"{paid}exchanges AS new WHERE new.rowid > ? AND new.rowid <= ? AND cost_usd IS NOT NULL AND NOT "
                    "EXISTS (SELECT 1 FROM exchanges AS e WHERE e.key = new.key AND e.created_at = new.created_at)"
                )
                db.execute(lost, (start, start + ROWS_A_COMMIT))
            if version == VERSION:
                db.execute(f"{paid}replaced")
    return got


def packed(body: bytes) -> bytes:
    """A body as it is stored."""
    return bytes(pa.Codec("zstd", 1).compress(body, asbytes=True))


def unpacked(stored: bytes) -> bytes:
    """A body as it came; raises zlib.error, OSError or pa.ArrowException where it is damaged."""
    if not stored.startswith(ZSTD):
        return zlib.decompress(stored)
    with pa.input_stream(pa.BufferReader(stored), compression="zstd") as stream:
        return bytes(stream.read())


def _free_bytes(folder: Path) -> str:
    try:
        stat = os.statvfs(folder)
        return f"{stat.f_bavail * stat.f_frsize / 2**20:,.0f} MiB"
    except OSError:
        return "an unknown number of bytes"
