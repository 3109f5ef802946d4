"""The mathematics verifier: what it must accept, what it must never accept, and where it must not decide."""

import random

import pytest

from r1distill.data.verify import quantities
from r1distill.data.verify.answers import final_answer
from r1distill.data.verify.math import examine, reference_of

EQUAL = [
    ("16", "016"),
    ("025", "25"),
    ("1450000", r"1{,}450{,}000"),
    ("10,\\!080", "10080"),
    ("1,000", "1000.00"),
    ("12000", r"12\,000"),
    ("140", r"\$140"),
    ("140", r"140 \text{ dollars}"),
    ("$18.90", r"\$18.9"),
    ("70", r"70\%"),
    ("0.7", r"70\%"),
    (r"20\%", "20"),
    ("-5", r"-5"),
    ("-5", "−5"),
    (r"\frac34", "0.75"),
    (r"\frac 34", r"\dfrac{3}{4}"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"137 \frac{1}{2}", "137.5"),
    (r"\frac{400}{11}", "36.36"),
    (r"90^\circ", "90"),
    ("1500000", "1.5 million"),
    ("1128", r"18\text{ hours and }48\text{ minutes}"),
    ("2", r"2:00\ \text{pm}"),
    ("5", "x = 5"),
    ("x=5", "5"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"864 \mbox{ inches}^2", r"864 \text{ in}^2"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    (r"\text{(B)}", "B"),
    (r"\text{(B)}", r"\text{(B) } 12"),
    (r"\text{east}", r"\text{East}"),
    (r"\text{Navin}", "Navin"),
    (r"2\sqrt{113}", r"\sqrt{452}"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{ -2, 1 - \sqrt{5}, 1 + \sqrt{5} \}"),
    ("-2,1", r"1 \text{ and } -2"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)"),
    (r"x \in [-2,7]", "[-2, 7]"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{bmatrix} -\frac{1}{3} \\[4pt] \frac{2}{3} \end{bmatrix}"),
    ("6 - 5i", "-5i+6"),
    ("2k+2", "2(k+1)"),
    ("y = 2x + 3", "2x+3"),
    ("4210_{5}", "4210_5"),
    ("4210_5", "4210"),
    ("1:4", r"\frac{1}{4}"),
    (r"\frac{20000}{\pi}", r"\dfrac{20000}{\pi}"),
]

UNEQUAL = [
    ("16", "61"),
    ("5", "-5"),
    ("18", r"18\text{ hours and }48\text{ minutes}"),
    ("106", "106.12"),
    (r"\frac{1}{3}", "0.33"),
    ("12.34", "12.342"),
    ("99077", "99076.92"),
    ("0.0000672", "0.000067"),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    ("5", r"5 \text{ or } 6"),
    ("1", r"\{1, 2\}"),
    ("128", r"86, 42"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", r"\{1,2\}"),
    ("[1,2)", "(1,2]"),
    ("40_9", "40_8"),
    (r"\text{A5}_{11}", r"\text{A5}_{81}"),
    (r"\begin{pmatrix} 6 & -5 \\ 0 & 2 \end{pmatrix}", r"\begin{pmatrix} 6 & -8 \\ 0 & 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 0 \\ 0 & 3 \end{pmatrix}", r"\begin{pmatrix} 1 & 8 \\ 0 & 3 \end{pmatrix}"),
    ("p - q", "p + q"),
    (r"\text{east}", r"\text{seat}"),
    (r"\text{(B)}", "C"),
    (r"\text{even}", r"\text{odd}"),
    (r"2\sqrt{113}", r"2\sqrt{185}"),
    ("2k+2", "2n+2"),
    ("x<5", "x>5"),
    ("4", r"x \geq 4"),
    ("12\\pi", "12"),
    ("65", r"\text{cannot be determined}"),
    ("1500000", "1.5"),
    (r"15\mbox{ cm}^2", r"15 \text{ cm}^3"),
    ("5 inches", "5 feet"),
]

OPEN = [
    ("5 apples", "5 oranges"),
    ("14", "14 million"),
    (r"\text{even}", r"\text{neither even nor odd}"),
]


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_equal_answers_pass(reference, answer):
    assert examine(f"So it is $\\boxed{{{answer}}}$.", reference).outcome == "pass"


@pytest.mark.parametrize(("reference", "answer"), UNEQUAL)
def test_unequal_answers_never_pass(reference, answer):
    assert examine(f"So it is $\\boxed{{{answer}}}$.", reference).outcome == "fail"


@pytest.mark.parametrize(("reference", "answer"), OPEN)
def test_what_only_a_unit_decides_stays_open(reference, answer):
    assert examine(f"So it is $\\boxed{{{answer}}}$.", reference).outcome == "unverifiable"


@pytest.mark.parametrize(
    ("response", "question", "answer"),
    [
        ("First \\boxed{3}.\n\nTherefore the total is \\boxed{12}.", "", "12"),
        ("He has \\boxed{86} glasses and \\boxed{42} plates.", "", "86, 42"),
        ("\\[\\boxed{\\{1, 2\\}}\\]", "", "\\{1, 2\\}"),
        ("\\boxed{\\boxed{5}}", "", "5"),
        ("$\\boxed 7$", "", "7"),
        ("**Answer:** Jordan would earn \\$140 in one week.", "", "\\$140"),
        ("It is $29.\n\n**Total Cost**: $20.00 + $4.00 (fee) + $5.00 (tip) = **$29.00**", "", "$29.00"),
        ("**Answer**: 3 loaves cost \\$4 more than 2 bagels.", "How much more do 3 loaves cost than 2 bagels?", "\\$4"),
        ("**Answer**: 3 loaves cost \\$4 more than 2 bagels.", "", None),  # any of the three could be meant
        ("Each friend received **5 lollipops**.", "", "5"),
        ("**Final Answer:** There are **100 people** on the train.", "", "100"),
        ("#### 1,218", "", "1,218"),
        ("The answer is 42.", "", "42"),
        ("The answer might be **4**, but this is speculative.", "", None),
        ("**Answer:** The problem does not provide enough information about the 3 boxes.", "", None),
        ("The answer would be **26**.\n\nIt can't be told from what is given.", "", None),
        ("He works 8 hours and 30 minutes.", "", None),
        ("The answer is \\boxed{14", "", None),  # cut off inside the box
        ("", "", None),
    ],
)
def test_final_answer(response, question, answer):
    assert final_answer(response, question) == answer


def test_what_has_no_dressing_is_tidied_as_if_it_had():
    """The short way of plain answers gives what the long one does."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abxRsINR0123456789 ,.:;=+/'<>-\n", k=draw.randrange(12))) for _ in range(5000)]
    plain = [text for text in texts if quantities._PLAIN.fullmatch(text)]
    assert 4000 < len(plain) < 5000
    assert [quantities.tidy(text) for text in plain] == [quantities._trimmed(quantities._undressed(t)) for t in plain]


def test_references_give_what_follows_their_mark():
    assert reference_of("48/2 = <<48/2=24>>24\n#### 1,072") == "1,072"
    assert reference_of("Thus $\\boxed{7}$.") == "7"
    assert reference_of("\\frac{4}{9}") == "\\frac{4}{9}"


def test_no_answer_is_not_a_wrong_answer():
    assert examine("", "5").outcome == "fail"  # cut off: a truncated answer is wrong
    assert examine("I am not sure.", "5").outcome != "pass"
    assert examine("\\boxed{5}", "").outcome == "unverifiable"
    assert examine("\\boxed{" + "x+" * 2000 + "1}", "5").outcome == "unverifiable"


@pytest.mark.parametrize(
    "damaged",
    ["\0" * 9, "{" * 10**6, "}" * 10**6, "\\boxed{" * 2000, "\\boxed{" * 400 + "5" + "}" * 400, "\n" * 10**6, "<answer>" * 10**5,
     "*" * 10**5, "x = 1 and " * 10**4, "\\boxed{" + ", " * 400 + "}", "\\boxed{" + "\\pm" * 300 + "1}", "\\boxed{1e999999999}"],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_damaged_responses_are_no_answer(damaged):
    for reference in ("5", "x^2+1", "yes", "[0, 1)"):
        assert examine(damaged, reference).outcome != "pass"
