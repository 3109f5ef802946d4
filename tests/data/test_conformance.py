"""Hard answer pairs with their labels: what the mathematics verifier accepts and rejects, next to plain math-verify.

conformance.jsonl was written by hand and labelled by mathematics: a group, a reference, a response (what follows the
thinking), a question where it matters, and "pass", "fail", or "unverifiable" where no answer is clear.
"""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

from r1distill.data.verify import pool
from r1distill.data.verify.math import examine

PAIRS = [json.loads(line) for line in Path(__file__).with_name("conformance.jsonl").read_text("utf-8").splitlines()]
FALSE_REJECTS = 10  # at most: right answers that are not passed


@pytest.fixture(scope="module")
def ours():
    pairs = ((pair["response"], pair["reference"], pair.get("question", "")) for pair in PAIRS)
    return [finding.outcome for _, finding in pool.ordered(examine, pairs, 2, 20)]


@pytest.fixture(scope="module")
def theirs():
    """What math-verify says of the whole response, the reference read as LaTeX and with its own time limits."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    golds = (f"${pair['reference']}$" for pair in PAIRS)
    right = [verify(parse(gold), parse(pair["response"])) for gold, pair in zip(golds, PAIRS, strict=True)]
    logging.disable(logging.NOTSET)
    return ["pass" if verdict else "fail" for verdict in right]


def accepted(outcomes, labels=("fail", "unverifiable")):
    """Pairs that are passed and should not be."""
    return {
        p["id"] for p, outcome in zip(PAIRS, outcomes, strict=True) if outcome == "pass" and p["expected"] in labels
    }


def rejected(outcomes):
    """Right answers that are not passed."""
    return {
        p["id"] for p, outcome in zip(PAIRS, outcomes, strict=True) if outcome != "pass" and p["expected"] == "pass"
    }


def test_the_set_is_large_and_covers_both_sides_of_every_group():
    assert len(PAIRS) >= 300 and len({pair["id"] for pair in PAIRS}) == len(PAIRS)
    groups = {pair["group"]: Counter(p["expected"] for p in PAIRS if p["group"] == pair["group"]) for pair in PAIRS}
    assert len(groups) >= 20
    assert all(counts["pass"] >= 4 and counts["fail"] >= 3 for counts in groups.values())


def test_no_wrong_answer_is_accepted_and_few_right_ones_are_lost(ours):
    assert accepted(ours) == set()
    assert len(rejected(ours)) <= FALSE_REJECTS, rejected(ours)


def test_what_has_no_clear_answer_is_never_decided(ours):
    decided = {p["id"] for p, outcome in zip(PAIRS, ours, strict=True) if p["expected"] == "unverifiable" != outcome}
    assert decided == set()


def test_plain_math_verify_is_worse_on_both_sides(ours, theirs):
    false_accepts, false_rejects = accepted(theirs, ("fail",)), rejected(theirs)
    print(f"\n{len(PAIRS)} pairs; false accepts, false rejects:")
    print(f"ours {len(accepted(ours))}, {len(rejected(ours))}")
    print(f"math-verify {len(false_accepts)}, {len(false_rejects)}")
    assert len(false_accepts) > len(accepted(ours))
    assert len(false_rejects) > len(rejected(ours))
