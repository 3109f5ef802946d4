"""Licences of sources: which of them let us publish what was made from their questions.

A table of the Hub's identifiers, and what a name says of itself (nc, nd, sa). It is no legal advice: what it doesn't
know it leaves to the user, who says so in the configuration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from r1distill.data.errors import RequestError

# They allow to change and to pass on, for money too, if their notice is kept.
PERMISSIVE = {
    "afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0",
    "cc-by-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "ecl-2.0", "isc", "mit", "ms-pl", "ncsa",
    "odc-by", "pddl", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
SHARED_ALIKE = {"agpl-3.0", "cdla-sharing-1.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "odbl"}


def objection(licence: str | None) -> str:
    """Why rows under this licence aren't published unless the user says so; "" where nothing speaks against it."""
    name = (licence or "").strip().lower()
    if name in PERMISSIVE:
        return ""
    parts = name.split("-")
    if "nc" in parts:
        return "it allows no commercial use"
    if "nd" in parts:
        return "it allows no works made from it"
    if "sa" in parts or name in SHARED_ALIKE:
        return "what is made from it has to carry the same licence"
    return "it is not known" if name in ("", "other", "unknown", "none") else "it is not in the table of known ones"


def of_files(files: Iterable[Path]) -> Counter[tuple[str, str]]:
    """How many rows of Parquet files are of each (source, licence)."""
    import pyarrow.parquet as pq

    found: Counter[tuple[str, str]] = Counter()
    for file in files:
        table = pq.read_table(file, columns=["source", "license"])
        for row in table.group_by(["source", "license"]).aggregate([([], "count_all")]).to_pylist():
            found[row["source"] or "", row["license"] or ""] += row["count_all"]
    return found


def check(found: Counter[tuple[str, str]], accepted: Iterable[str]) -> None:
    """Raise RequestError where a source's licence forbids to publish it, unless it is among the ``accepted`` ones."""
    known = {name.lower() for name in accepted}
    against = [
        f"{source}: {count:,} rows under '{licence}': {why}"
        for (source, licence), count in sorted(found.items())
        if (why := objection(licence)) and licence.lower() not in known
    ]
    if against:
        names = ", ".join(sorted({repr(licence) for (_, licence) in found if objection(licence)}))
        raise RequestError(
            "licences of sources stand against publishing:\n" + "\n".join(against) + "\nTake these sources out of the "
            "prompts' file, or, where you may publish them, say so: "
            f'--set "student.publication.accept_licences=[{names}]"'
        )
