"""Held-out questions: the outcome in a sentence, accuracy by kind, and every answer before and after."""

from __future__ import annotations

from collections.abc import Sequence

from unimrg.benchmarks.intervals import wilson
from unimrg.report.charts import difference_chart, interval_chart
from unimrg.report.comparison import FEW, Comparison, bracket, compare, compare_pairs
from unimrg.report.folder import Question, Run
from unimrg.report.markup import DASH, NBSP, Child, Html, count, el, folded, percent, plural, section, table

ROWS, MOST = 20, 2000  # questions shown at once, and questions kept in the page at all
_VERB = {"better": "rose", "worse": "fell", "open": "went"}
_COLOUR = {"better": "gain", "worse": "lost", "open": "open"}
_LEVEL = f"95{NBSP}%"


def outcome(run: Run) -> Html:
    """What the held-out questions say, in one sentence that claims no more than the interval allows."""
    result = compare(run.questions)
    if result is None:
        return el("p", _one_sided(run), class_="outcome open")
    sentence = (
        f"Accuracy on {plural(result.count, 'held-out question')} {_VERB[result.verdict]} from "
        f"{percent(result.before)} {bracket(result.before_interval)} to "
        f"{percent(result.after)} {bracket(result.after_interval)}: "
        f"{percent(result.difference, sign=True)} points, "
        f"{_LEVEL} interval {bracket(result.interval, sign=True)}"
    )
    ending = {
        "better": ".",
        "worse": ".",
        "open": "; whether the model got better or worse can\u2019t be told from this.",
    }[result.verdict]
    symbol = {"better": "\u25b2 ", "worse": "\u25bc ", "open": "\u25c6 "}[result.verdict]
    return el(
        "p", el("span", symbol, aria_hidden="true"), sentence + ending, class_=f"outcome {result.verdict}"
    )


def _one_sided(run: Run) -> str:
    """The outcome without a comparison: what is known, and what is missing."""
    for side, judged in (
        ("after", [q.right_after for q in run.questions if q.right_after is not None]),
        ("before", [q.right_before for q in run.questions if q.right_before is not None]),
    ):
        if judged:
            right, interval = sum(judged), wilson(sum(judged), len(judged))
            other = "before" if side == "after" else "after"
            return (
                f"Accuracy {side} training is {percent(right / len(judged))} {bracket(interval)} on "
                f"{plural(len(judged), 'held-out question')}; no answers from {other} it to compare with."
            )
    return "No held-out questions were scored, so this run says nothing about accuracy."


def accuracy(run: Run) -> Html | None:
    """Both accuracies as intervals, how answers moved, and the same by kind of question."""
    result = compare(run.questions)
    if result is None:
        return None
    rows = [
        ("before", result.before, result.before_interval, "open"),
        ("after", result.after, result.after_interval, "plain"),
    ]
    chart = el("figure", el("h3", f"Accuracy, {_LEVEL} intervals"), interval_chart(rows), class_="card")
    note = (
        "Brackets: 95\u00a0% intervals. Single accuracies: Wilson. Differences: paired bootstrap over pairs. "
        "p: exact McNemar test. A change counts as better or worse, and is coloured, only if interval and "
        "test agree at 5\u00a0%."
    )
    return section(
        "Accuracy",
        el("div", chart, _moved(run.questions, result), class_="charts"),
        _parts(run.questions, result),
        note=note,
        id_="accuracy",
    )


def _moved(questions: Sequence[Question], result: Comparison) -> Html:
    """How many answers became right, became wrong or stayed."""
    both = sum(bool(q.right_before and q.right_after) for q in questions)
    neither = result.count - both - result.test.gained - result.test.lost
    cells = [
        ("gain", "\u2717 \u2192 \u2713", "became right", result.test.gained),
        ("lost", "\u2713 \u2192 \u2717", "became wrong", result.test.lost),
        ("", "\u2713 \u2192 \u2713", "stayed right", both),
        ("", "\u2717 \u2192 \u2717", "stayed wrong", neither),
    ]
    boxes = [
        el("div", el("span", signs, class_=f"signs {colour}"), el("b", count(amount)), el("small", words))
        for colour, signs, words, amount in cells
    ]
    remarks = [
        f"p {_p(result.test.p, equals=True)} over {plural(result.groups, 'pair')} or single questions."
    ]
    if result.few:
        remarks.append(f"Fewer than {FEW}: the interval of the difference is too narrow, read it as a hint.")
    if unmatched := len(questions) - result.count:
        remarks.append(
            f"{plural(unmatched, 'question')} judged on one side only, left out of every comparison."
        )
    caption = el("figcaption", " ".join(remarks))
    return el(
        "figure", el("h3", "How answers moved"), el("div", boxes, class_="moved"), caption, class_="card"
    )


def _p(value: float, equals: bool = False) -> str:
    return f"<{NBSP}0.001" if value < 0.001 else f"{'= ' if equals else ''}{value:.3f}"


def _parts(questions: Sequence[Question], whole: Comparison) -> Html:
    """The same comparison for pairs, the conflict subset and every kind of question."""
    kinds = sorted({q.family for q in questions if q.paired and q.family is not None})
    found: list[tuple[str, str, Comparison | None]] = [
        ("All questions", "", whole),
        ("Pairs", "both questions of a pair right", compare_pairs(questions)),
        ("Conflict subset", "cue and truth disagree", compare([q for q in questions if q.conflict])),
        *((kind, "", compare([q for q in questions if q.family == kind])) for kind in kinds),
    ]
    parts = [(name, words, result) for name, words, result in found if result is not None]
    reach = 1.05 * max(0.02, *(max(abs(r.interval.low), abs(r.interval.high)) for _, _, r in parts))
    head = [
        "Questions",
        "Count",
        "Before",
        "After",
        "Difference",
        "p",
        f"\u2212{100 * reach:.0f} to +{100 * reach:.0f}",
    ]
    rows = [_part(name, words, result, reach) for name, words, result in parts]
    remark = None
    if len(kinds) > 1:
        words = f"{len(kinds)} kinds are {len(kinds)} comparisons: one interval in twenty misses by chance."
        remark = el("p", words, class_="note")
    return el("div", table(head, rows, class_="numbers"), remark)


def _part(name: str, words: str, result: Comparison, reach: float) -> list[Child]:
    difference, interval = percent(result.difference, sign=True), bracket(result.interval, sign=True)
    return [
        [el("b", name), el("small", words) if words else None],
        count(result.count),
        [f"{percent(result.before)} ", el("small", bracket(result.before_interval))],
        [f"{percent(result.after)} ", el("small", bracket(result.after_interval))],
        [f"{difference} ", el("small", interval)],
        _p(result.test.p),
        difference_chart(
            result.difference, result.interval, reach, f"{difference} {interval}", _COLOUR[result.verdict]
        ),
    ]


def answers(run: Run) -> Html:
    """Every question with both answers; the rest is folded away after the first rows."""
    if not run.questions:
        return section("Held-out questions", el("p", "None was stored.", class_="empty"), id_="questions")
    head = ["Question", "Truth", "Before", "After"]
    rows: list[list[Child]] = [
        [
            [
                el("span", q.question, class_="said"),
                el("small", " \u00b7 ".join(filter(None, (q.id, q.family)))),
            ],
            el("span", q.answer, class_="said"),
            _answer(q.before, q.right_before),
            [_answer(q.after, q.right_after), _change(q)],
        ]
        for q in run.questions[:MOST]
    ]
    more = len(rows) - ROWS
    rest = (
        folded(f"{plural(more, 'more question')}", table(head, rows[ROWS:], class_="answers"))
        if more > 0
        else None
    )
    left_out = len(run.questions) - len(rows)
    note = "In stored order, not chosen." + (
        f" {plural(left_out, 'question')} not shown here." if left_out else ""
    )
    return section(
        "Held-out questions", table(head, rows[:ROWS], class_="answers"), rest, note=note, id_="questions"
    )


def _answer(said: str | None, right: bool | None) -> Html:
    """An answer with its mark: symbol and colour say the same."""
    if said is None:
        return el("span", DASH, title="not asked")
    symbol, words, colour = {
        True: ("\u2713", "right", "gain"),
        False: ("\u2717", "wrong", "lost"),
        None: ("?", "not judged", "open"),
    }[right]
    mark = el("span", symbol, class_=f"sign {colour}", role="img", aria_label=words, title=words)
    return el("span", mark, el("span", said or "(empty)", class_="said"), class_="reply")


def _change(question: Question) -> Html | None:
    if not question.paired or question.right_before == question.right_after:
        return None
    gained = question.right_after
    return el(
        "span", "became right" if gained else "became wrong", class_=f"tag {'gain' if gained else 'lost'}"
    )
