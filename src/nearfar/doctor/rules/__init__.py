"""All rules, one module per theme."""

from nearfar.doctor.rule import RuleBook
from nearfar.doctor.rules import (
    batches,
    course,
    curriculum,
    embeddings,
    evaluation,
    hardness,
    loss,
    machine,
    positives,
    significance,
    sparse_logs,
    sparse_metrics,
    temperature,
    weights,
)

__all__ = ["RULES"]

#: in the order in which findings of one severity are told
RULES = RuleBook(
    rule
    for theme in (
        course,
        weights,
        loss,
        sparse_logs,
        sparse_metrics,
        positives,
        curriculum,
        hardness,
        batches,
        temperature,
        embeddings,
        evaluation,
        significance,
        machine,
    )
    for rule in theme.RULES
)
