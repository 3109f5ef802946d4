"""Findings that were made before: what each check found, kept under all that it depends on.

A killed run goes on from here, and a changed policy or threshold runs only the checks that it changes.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1distill.data.errors import R1DistillError
from r1distill.data.verify.check import Finding

FILE = "findings.sqlite"
KEY_BYTES = 16
_KEYS_PER_QUERY = 500


def content_key(*parts: str | None) -> bytes:
    """The hash of what is judged."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        text = (part or "").encode("utf-8", "surrogatepass")
        digest.update(b"-" if part is None else b"%d:" % len(text))
        digest.update(text)
    return digest.digest()


def rule_key(*rule: Any) -> bytes:
    """The hash of a rule: check, version and thresholds, in JSON values."""
    return hashlib.blake2b(json.dumps(rule, sort_keys=True).encode(), digest_size=KEY_BYTES).digest()


def finding_key(content: bytes, rule: bytes) -> bytes:
    """The hash of a content and the rule that it is judged by."""
    return hashlib.blake2b(content + rule, digest_size=KEY_BYTES).digest()


class Findings:
    """``folder``'s findings; a context manager. They can be made again, so a crash may cost the last few of them."""

    def __init__(self, folder: Path):
        self.file = folder / FILE
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.file, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS findings (key BLOB PRIMARY KEY, outcome TEXT NOT NULL, "
                "reason TEXT NOT NULL, detail TEXT NOT NULL) WITHOUT ROWID"
            )

    def __enter__(self) -> Findings:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def known(self, keys: Iterable[bytes]) -> dict[bytes, Finding]:
        """Those of the keys that have a finding."""
        wanted = list(keys)
        found: dict[bytes, Finding] = {}
        with self._explained():
            for start in range(0, len(wanted), _KEYS_PER_QUERY):
                some = wanted[start : start + _KEYS_PER_QUERY]
                marks = ", ".join("?" * len(some))
                query = f"SELECT key, outcome, reason, detail FROM findings WHERE key IN ({marks})"
                found |= {key: Finding(*finding) for key, *finding in self._db.execute(query, some)}
        return found

    def add(self, findings: Mapping[bytes, Finding]) -> None:
        """Keep findings, all or none of them; one that is there already stays."""
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            rows = ((key, *finding) for key, finding in findings.items())
            self._db.executemany("INSERT OR IGNORE INTO findings VALUES (?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise R1DistillError(
                f"the findings {self.file} can't be used: {error}. Free some disk if there is none left; if the file "
                "is damaged, delete it: every check is then run again."
            ) from error
