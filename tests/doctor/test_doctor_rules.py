"""All rules against all synthetic runs: every fault is named, and nothing else is; healthy runs stay quiet."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from doctor_runs import FAULTS, HEALTHY, NAMED, NOTES, Run
from nearfar.doctor import CONTEXT, FIELDS, RULES, Diagnosis, Finding, diagnose
from nearfar.doctor.rule import SEVERITIES

SEEDS = range(5)
#: where an override is an option, if not of molecules with hard batches
AT_HOME = {
    "sampler=spatial": ["experiment=medium_spatial"],
    "loss.sum=outside": ["experiment=relations", "loss=supcon_inside"],
    "top_fraction=0.4 bottom_fraction=0.4": ["experiment=fair_detection"],
}
PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"


@cache
def healthy(name: str, seed: int) -> Diagnosis:
    run = HEALTHY[name](np.random.default_rng(seed))
    return diagnose(run.records, run.context)


@cache
def faulty(at: int, seed: int) -> Diagnosis:
    run: Run = FAULTS[at][0](np.random.default_rng(seed))
    return diagnose(run.records, run.context)


# -- the table -----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_stay_without_warnings_and_errors(name: str) -> None:
    for seed in SEEDS:
        found = healthy(name, seed)
        assert found.healthy, [str(finding) for finding in found]
        assert set(found.ids) == NOTES.get(name, set()), f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("at", range(len(FAULTS)), ids=[f"{f.__name__}" for f, _, _ in FAULTS])
def test_a_planted_fault_is_diagnosed_by_name_and_nothing_else(at: int) -> None:
    _, rule, companions = FAULTS[at]
    for seed in SEEDS:
        assert set(faulty(at, seed).ids) == {rule, *companions}, f"seed {seed}"


def test_every_rule_has_a_run_that_triggers_it_and_several_that_do_not() -> None:
    triggered = Counter(rule for _, rule, _ in FAULTS)
    quiet: Counter[str] = Counter()
    for name in HEALTHY:
        found = healthy(name, 0)
        silent = set(RULES.ids) - set(found.ids) - {rule.id for rule in found.unjudged}
        quiet.update(silent)
    for at in range(len(FAULTS)):
        found = faulty(at, 0)
        quiet.update(set(RULES.ids) - set(found.ids) - {rule.id for rule in found.unjudged})
    for rule in RULES:
        assert triggered[rule.id] >= 1, f"no run triggers {rule.id}"
        assert quiet[rule.id] >= 2, f"no two runs are judged by {rule.id} and found well"


def test_all_promised_rules_are_there() -> None:
    assert set(RULES.ids) >= NAMED
    assert len(set(RULES.ids)) == len(RULES)
    for rule in RULES:
        assert re.fullmatch(r"[a-z-]+", rule.id)
        assert rule.severity in SEVERITIES
        for text in (rule.title, rule.cause, rule.looks_at, rule.threshold, rule.source):
            assert text.strip()


def test_needs_are_documented_fields() -> None:
    known = set(CONTEXT) | {name for table in FIELDS.values() for name in table}
    for rule in RULES:
        for fields in rule.needs:
            assert set(fields) <= known, (rule.id, fields)


# -- what a finding says -------------------------------------------------------------------------------------
def findings() -> list[Finding]:
    return [finding for at in range(len(FAULTS)) for finding in faulty(at, 0)]


def test_findings_are_complete_sentences_with_numbers_and_a_remedy() -> None:
    for finding in findings():
        assert finding.title.endswith("."), finding.id
        assert re.search(r"\d", finding.evidence["text"]) or finding.id == "metric-trivial", finding.id
        assert finding.evidence["text"].endswith("."), finding.id
        assert len(finding.evidence) > 1, finding.id
        assert finding.override or finding.advice, finding.id
        data = finding.to_dict()
        assert data["id"] == finding.id
        assert set(data) >= {"severity", "evidence", "cause", "override", "source"}


def test_the_gravest_come_first() -> None:
    for at in range(len(FAULTS)):
        order = [SEVERITIES.index(finding.severity) for finding in faulty(at, 0)]
        assert order == sorted(order, reverse=True)


@pytest.mark.slow
def test_overrides_are_options_of_nearfar_train() -> None:
    pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    from nearfar.config.compose import compose_config
    from nearfar.systems import check_config

    seen = {text for f in findings() for text in (f.override, *f.then) if text}
    assert len(seen) >= 10
    for text in seen | set(AT_HOME):
        if text in AT_HOME:
            base = AT_HOME[text]
        elif any(part.startswith("sampler=") for part in text.split()):
            base = ["experiment=molecules"]
        else:
            base = ["experiment=molecules", "sampler=hard"]
        config = compose_config([*base, *text.split()])
        for part in text.split():
            key, value = part.split("=")
            found = OmegaConf.select(config, "sampler.name" if key == "sampler" else key)
            assert found == OmegaConf.create(f"x: {value}").x, text
        check_config(config)


@pytest.mark.slow
def test_remedies_are_computed_from_the_run() -> None:
    run = FAULTS[[rule for _, rule, _ in FAULTS].index("curriculum-diverging")][0](np.random.default_rng(0))
    (finding,) = [f for f in diagnose(run.records, run.context) if f.id == "curriculum-diverging"]
    assert finding.override == "hard_ratio=0.4"
    assert finding.then == ("hardness_k=100", "lr=0.00033", "curriculum_epoch=10")
    later = diagnose(run.records, run.context | {"curriculum_epoch": 5, "lr": 3e-4})
    assert next(f for f in later if f.id == "curriculum-diverging").then[1] == "lr=0.0001"


@pytest.mark.parametrize(
    ("context", "override"),
    [
        ({"lr": 3e-3}, "lr=0.001"),
        ({"lr": 1e-9}, "lr=0.001"),
        ({"lr": 1e-3, "temperature": 5.0}, "temperature=0.07"),
        ({}, ""),
    ],
)
def test_what_to_try_at_chance_depends_on_the_options(context: dict[str, float], override: str) -> None:
    (finding,) = diagnose({"loss": [3.47] * 20, "candidates": 32}, context)
    assert finding.override == override
    assert finding.advice


def test_what_could_not_be_judged_is_said() -> None:
    found = diagnose({"loss": [4.0 - 0.1 * i for i in range(30)], "candidates": 64})
    assert found.healthy
    lacking = {rule.id: rule for rule in found.unjudged}
    assert lacking["target-inert"].lacks == ("rows_with_neighbors",)
    assert "loss-at-chance" not in lacking
    assert found.judged + len(found.unjudged) == len(RULES)
    assert f"{found.judged} of {len(RULES)}" in found.verdict
    short = {rule.id: rule.reason for rule in diagnose({"loss": [4.0, 3.9], "candidates": 64}).unjudged}
    assert "2 logged values" in short["loss-at-chance"]


@pytest.mark.slow
def test_nothing_heavy_is_loaded() -> None:
    code = "import sys, nearfar.doctor as d; d.diagnose({'loss': [1.0] * 20, 'candidates': 8});"
    code += "print(sorted({'torch', 'pandas', 'yaml', 'rich'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# -- the page ------------------------------------------------------------------------------------------------
def cells(text: str) -> str:
    return text.replace("|", "\\|")


def test_the_page_has_every_rule_as_it_is() -> None:
    page = PAGE.read_text()
    for rule in RULES:
        row = f"| `{rule.id}` | {rule.severity} | {cells(rule.looks_at)} | {cells(rule.threshold)} |"
        assert row in page, row


def test_the_page_has_every_field_as_it_is() -> None:
    page = PAGE.read_text()
    for table in (*FIELDS.values(), CONTEXT):
        for name, words in table.items():
            assert f"| `{name}` | {cells(words)} |" in page, name
