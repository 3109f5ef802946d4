"""`r1distill verify`: a row of verdicts for each row of a file, however damaged; a damaged file is one clear error."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1distill.data import schema, verdict_file
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.settings import VerdictSettings
from r1distill.data.verdict_file import verify

RIGHT = "Two and two make four.\n</think>\n\nIt is \\boxed{4}."
WRONG = "Two and two make five.\n</think>\n\nIt is \\boxed{5}."
COLUMNS = {"prompt": "prompt", "completion": "text", "reference_answer": "gold"}


def row(text=RIGHT, **changes):
    return {"prompt": "What is 2 + 2?", "text": text, "gold": "4", **changes}


def verified(file, out, columns=COLUMNS):
    totals = verify(file, out, columns, "math", VerdictSettings(workers=1, timeout_seconds=5))
    table = pq.read_table(out / "verdicts.parquet")
    assert table.schema.equals(verdict_file.VERIFIED)
    assert table["row"].to_pylist() == list(range(totals["rows"]))
    return totals, table.to_pylist()


def write_lines(file, rows):
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    (gzip.open if file.suffix == ".gz" else open)(file, "wt", encoding="utf-8").write("\n".join(lines) + "\n")
    return file


def write_parquet(file, rows):
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.parquet", "folder"])
def test_every_kind_of_file(tmp_path, name):
    file, rows = tmp_path / name, [row(), row(WRONG), row(gold=None), row("Two and")]
    if name == "folder":
        kinds = pa.schema([(column, pa.string()) for column in row()])
        schema.write(file, kinds, rows)
    else:
        (write_parquet if name.endswith("parquet") else write_lines)(file, rows)
    totals, found = verified(file, tmp_path / "out")
    assert [one["outcome"] for one in found] == ["pass", "fail", "unverifiable", "fail"]
    assert [one["correctness"] for one in found] == ["pass", "fail", "unverifiable", "fail"]
    assert found[3]["format"] == found[3]["truncation"] == "fail"
    assert totals["rows"] == 4
    assert totals["checks"]["correctness"] == {"pass": 1, "fail": 2, "unverifiable": 1}
    assert totals["reasons"]["correctness: wrong answer"] == 1


def test_damaged_rows_keep_their_place(tmp_path):
    lines = [
        row(),
        json.dumps(row())[:40],  # half a line
        row(WRONG),
        "[1, 2]",
        row(text=None),
        row(text=7),
        row(prompt=["a"]),
        row(gold={"a": 1}),
        row(gold=4),
        row(gold=4.0),
        row(gold=float("nan")),
        {"prompt": "only"},
        "[" * 100_000,
        row(text="\ud800" + RIGHT),  # a lone surrogate
        row(gold="\\sqrt{2}", text="Hm.</think>\\boxed{9^{9^{9^{9}}}}"),
        row(),
    ]
    totals, found = verified(write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out")
    outcomes = [one["outcome"] for one in found]
    lost = "unverifiable"
    assert outcomes == ["pass", lost, "fail", *[lost] * 5, "pass", "pass", *[lost] * 3, "pass", lost, "pass"]
    assert found[1]["reason"] == "format: unreadable: not JSON"
    assert found[5]["reason"] == "format: completion is int, expected text"
    assert found[14]["reason"] == "correctness: the verifier ran out of time"
    assert totals["rows"] == len(lines)


def test_a_half_line_at_the_end_is_a_row(tmp_path):
    file = write_lines(tmp_path / "in.jsonl", [row(), row()])
    file.write_bytes(file.read_bytes()[:-30])
    assert [one["outcome"] for one in verified(file, tmp_path / "out")[1]] == ["pass", "unverifiable"]


def test_a_gzip_that_breaks_off_gives_what_it_had(tmp_path):
    rows = [row(prompt=f"What is {n} + {n * n}?" * 20, gold=str(n)) for n in range(300)]
    file = write_lines(tmp_path / "in.jsonl.gz", rows)
    file.write_bytes(file.read_bytes()[:-200])
    _, found = verified(file, tmp_path / "out")
    assert 1 < len(found) <= 300
    assert "damaged" in found[-1]["reason"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated parquet", "can't be read as Parquet"),
        ("empty jsonl", "no rows"),
        ("empty parquet", "no rows"),
        ("blank lines", "no rows"),
        ("missing file", "is not there"),
        ("missing column", "has no column 'text'"),
        ("no text at all", "has no column 'completion'"),
        ("unknown name", "Did you mean 'completion'"),
        ("other suffix", "should end in"),
    ],
)
def test_a_damaged_file_is_one_clear_error_and_leaves_nothing(tmp_path, damage, message):
    file, columns = tmp_path / "in.jsonl", COLUMNS
    if damage == "truncated parquet":
        file = write_parquet(tmp_path / "in.parquet", [row()] * 50)
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "empty parquet":
        file = tmp_path / "in.parquet"
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    elif damage in ("empty jsonl", "blank lines"):
        file.write_text("" if damage == "empty jsonl" else "\n\n  \n")
    elif damage == "missing column":
        write_lines(file, [{"prompt": "a", "gold": "4", "completion": RIGHT}])
    elif damage == "no text at all":
        write_lines(file, [{"prompt": "a", "gold": "4"}])
        columns = {}
    elif damage == "unknown name":
        write_lines(file, [row()])
        columns = {"completon": "text"}
    elif damage == "other suffix":
        file = tmp_path / "in.csv"
        file.write_text("prompt,text\n")
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        verify(file, tmp_path / "out", columns, "math", VerdictSettings())
    assert not (tmp_path / "out" / "verdicts.parquet").exists()


def test_parts_that_a_server_took_apart(tmp_path):
    parts = {"reasoning": "Two and two make four.", "response": "It is \\boxed{4}.", "reference_answer": "4"}
    rows = [{**parts, "finish_reason": reason} for reason in ("stop", "length", None)]
    _, found = verified(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out", {})
    assert [one["outcome"] for one in found] == ["pass", "fail", "pass"]
    assert found[1]["reason"] == "truncation: the token limit was reached"


def test_a_row_may_name_its_verifier(tmp_path):
    rows = [row(verifier="math"), row(verifier="astrology"), row(verifier=None)]
    _, found = verified(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out")
    assert [one["correctness"] for one in found] == ["pass", "unverifiable", "pass"]


def test_a_verifier_that_there_is_not_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(RequestError, match="--verifier mth.*Did you mean 'math'"):
        verify(write_lines(tmp_path / "in.jsonl", [row()]), tmp_path / "out", COLUMNS, "mth", VerdictSettings())
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_should_be_is_one_clear_error(tmp_path):
    file = write_lines(tmp_path / "in.jsonl", [row()])
    with pytest.raises(R1DistillError, match="verdicts.parquet can't be written"):
        verify(file, file, COLUMNS, "math", VerdictSettings())
