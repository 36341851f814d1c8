"""Fit the rows, try every fleet, say which one to run: regressions, recommendation, report and command.

``advise(store, gpus=8)`` is an Answer: ``answer.recommendation.sentence`` says it, ``.candidates`` are all splits with their
intervals, ``.as_json()`` is what the command prints.
"""

from typing import TYPE_CHECKING

from traces._public import publish

if TYPE_CHECKING:
    from advisor.advise import Answer as Answer
    from advisor.advise import advise as advise
    from advisor.doctor import examine as examine
    from advisor.features import RunData as RunData
    from advisor.recommend import Candidate as Candidate
    from advisor.recommend import Recommendation as Recommendation
    from advisor.recommend import recommend as recommend
    from advisor.report import render as render
    from advisor.report import write_report as write_report

__all__ = publish(
    __name__,
    {
        "advisor.advise": ("Answer", "advise"),
        "advisor.doctor": ("examine",),
        "advisor.features": ("RunData",),
        "advisor.recommend": ("Candidate", "Recommendation", "recommend"),
        "advisor.report": ("render", "write_report"),
    },
)
