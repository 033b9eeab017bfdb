"""Statements put to the test: a ledger of claims, experiments that can come out either way, and verdicts.

A claim is written down with the condition under which it is true and with a prediction, before its experiment runs.
``nearfar claims`` runs them and prints two answers: whether the claim is supported, and whether the prediction held.
"""

from __future__ import annotations

from nearfar.lab.claims.ledger import Claim, Condition, Prediction, choose, combine, read_ledger

__all__ = ["Claim", "Condition", "Prediction", "choose", "combine", "read_ledger"]
