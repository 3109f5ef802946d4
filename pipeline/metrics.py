"""What a set of answers comes to: pure functions over rows of answers, in shares from 0 to 1.

A row is one answer: prompt_id, correct, reason, loops, vote, completion_tokens (see ``evaluation.ANSWER``). A figure is
a mean over questions, each of which counts alike however often it was asked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BOOTSTRAPS = 2000
Z = 1.959964  # of the normal 95% interval

Answers = Sequence[Mapping[str, Any]]


def summary(answers: Answers) -> dict[str, Any]:
    """All metrics of one model's answers to one benchmark.

    accuracy is pass@1: the mean over k samples, with its bootstrap 95% interval over questions (low, high). A truncated
    answer is wrong, and its share shown; a looping one repeats itself, right or wrong. cons is null where answers can't
    be counted (programs); tokens are null where the server counts none.
    """
    by_question = _by_question(answers)
    means = [_mean(row["correct"] for row in rows) for rows in by_question.values()]
    low, high = interval(means)
    k = min(len(rows) for rows in by_question.values())
    cons, ties = consensus(by_question.values())
    counts = [row["completion_tokens"] for row in answers if row["completion_tokens"] is not None]
    correct = sum(row["correct"] for row in answers)
    known = len(counts) == len(answers)
    return {
        "accuracy": _mean(means),
        "low": low,
        "high": high,
        "questions": len(means),
        "k": k,
        "pass_at": {str(n): _mean(pass_at(len(r), _correct(r), n) for r in by_question.values()) for n in _powers(k)},
        "cons": cons,
        "cons_ties": ties,
        "truncated": _mean(row["reason"] == "truncated" for row in answers),
        "looped": _mean(bool(row.get("loops")) for row in answers),
        "mean_tokens": _mean(counts) if counts else None,
        "tokens_per_correct": sum(counts) / correct if known and correct else None,
    }


def question_means(answers: Answers) -> dict[str, float]:
    """The share of right answers to each question."""
    return {key: _mean(row["correct"] for row in rows) for key, rows in _by_question(answers).items()}


def interval(means: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the mean when questions are drawn with replacement."""
    import numpy as np

    low, high = np.percentile(_resampled(np.asarray([means], dtype=float), seed), [2.5, 97.5])
    return float(low), float(high)


def paired(ours: Mapping[str, float], theirs: Mapping[str, float], seed: int = 0) -> dict[str, Any]:
    """The mean difference over the questions that both were asked, with its bootstrap 95% interval.

    Both models' answers to a question are drawn together, so how hard it is drops out. ``verdict`` is better or worse
    where the interval leaves out zero, else open.
    """
    return paired_runs([ours], [theirs], seed)


def over_runs(runs: Sequence[Mapping[str, float]], seed: int = 0) -> dict[str, Any]:
    """The mean over several runs' means over the questions that all were asked, with its bootstrap 95% interval (see
    ``_resampled``)."""
    import numpy as np

    values = _table(runs, sorted(set.intersection(*(set(run) for run in runs))))
    low, high = np.percentile(_resampled(values, seed), [2.5, 97.5])
    return {"accuracy": float(values.mean()), "low": float(low), "high": float(high), "questions": values.shape[1]}


def paired_runs(
    ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], seed: int = 0
) -> dict[str, Any]:
    """``paired`` of several runs each; the n-th of ours and of theirs, which had one seed, are drawn together."""
    import numpy as np

    both = sorted(set.intersection(*(set(run) for run in (*ours, *theirs))))
    if not both:
        return {"difference": None, "low": None, "high": None, "questions": 0, "verdict": "open"}
    differences = _table(ours, both) - _table(theirs, both)
    low, high = (float(value) for value in np.percentile(_resampled(differences, seed), [2.5, 97.5]))
    verdict = "better" if low > 0 else "worse" if high < 0 else "open"
    return {
        "difference": float(differences.mean()),
        "low": low,
        "high": high,
        "questions": len(both),
        "verdict": verdict,
    }


def pass_at(n: int, correct: int, k: int) -> float:
    """The chance that one of k answers is right, drawn without replacement from n of which ``correct`` are: the
    unbiased estimator 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374, section 2.1). ``k`` is at most ``n``."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def consensus(questions: Iterable[Answers]) -> tuple[float | None, int]:
    """(cons@k, questions with a tie): the share of questions whose most frequent answer is right.

    Answers vote by ``vote``: those with one number say the same, None does not vote. A tie counts the share of its
    answers that are right, which is what drawing one of them would give on average. None where no answer votes at all.
    """
    scores, ties, any_vote = [], 0, False
    for rows in questions:
        votes = Counter(row["vote"] for row in rows if row.get("vote") is not None)
        any_vote |= bool(votes)
        most = max(votes.values(), default=0)
        first = [vote for vote, count in votes.items() if count == most]
        ties += len(first) > 1
        right = Counter(row["vote"] for row in rows if row["correct"])
        # Answers that say the same are judged alike, but where the verifier leaves some open: the majority of them.
        scores.append(_mean(2 * right[vote] > most for vote in first) if first else 0.0)
    return (_mean(scores) if any_vote else None), ties


def _by_question(answers: Answers) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in answers:
        found.setdefault(row["prompt_id"], []).append(row)
    return found


def _correct(rows: Answers) -> int:
    return sum(bool(row["correct"]) for row in rows)


def _powers(k: int) -> list[int]:
    """1, 2, 4 … and k itself."""
    return sorted({2**power for power in range(k.bit_length()) if 2**power <= k} | {k})


def _table(runs: Sequence[Mapping[str, float]], questions: Sequence[str]) -> Any:
    """(runs, questions) values."""
    import numpy as np

    return np.asarray([[run[key] for key in questions] for run in runs], dtype=float)


def _resampled(values: Any, seed: int) -> Any:
    """Means of BOOTSTRAPS draws with replacement from (runs, questions): as many questions and, drawn by themselves, as
    many runs (the pigeonhole bootstrap, arXiv 0712.1111). Of a single run only the questions are drawn."""
    import numpy as np

    draw, (runs, questions) = np.random.default_rng(seed), values.shape
    columns = draw.integers(0, questions, (BOOTSTRAPS, questions))
    often = draw.multinomial(runs, np.full(runs, 1 / runs), BOOTSTRAPS)  # each run is drawn
    return np.take_along_axis(often @ values / runs, columns, axis=1).mean(axis=1)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
