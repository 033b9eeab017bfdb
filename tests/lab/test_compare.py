from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from rich.text import Text

from nearfar import terminal
from nearfar.errors import NearfarError
from nearfar.lab.charts import line_chart
from nearfar.lab.compare import Comparison, compare_runs, find_runs
from nearfar.lab.report import write_comparison, write_report
from nearfar.lab.summary import describe_comparison
from nearfar.lab.table import comparison_tables, metrics_tables
from nearfar.training.run_folder import RunFolder
from run_files import copied
from toy_system import toy_config, train

pytestmark = pytest.mark.slow  # real runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two learning rates, one of them no training at all, on the same three seeds."""
    root = tmp_path_factory.mktemp("runs")
    for lr in (1e-2, 1e-12):
        for seed in range(3):
            train(root / f"lr={lr:g},seed={seed}", toy_config(lr=lr, seed=seed, epochs=12))
    return root


def test_arms_pairs_and_verdict(runs: Path) -> None:
    comparison = compare_runs([runs], baseline="lr=1e-12")
    assert {arm.label for arm in comparison.arms} == {"lr=0.01", "lr=1e-12"}
    assert comparison.seeds == [0, 1, 2]
    difference = comparison.differences["lr=0.01"]["MRR"]
    by_hand = [
        json.loads((runs / f"lr=0.01,seed={s}" / "metrics.json").read_text())["splits"]["val"]["MRR"]["value"]
        - json.loads((runs / f"lr=1e-12,seed={s}" / "metrics.json").read_text())["splits"]["val"]["MRR"][
            "value"
        ]
        for s in range(3)
    ]
    assert difference.value == pytest.approx(sum(by_hand) / 3, abs=1e-6)
    assert difference.per_seed == pytest.approx(by_hand, abs=1e-6)
    assert difference.verdict == "better"
    assert comparison_tables(comparison)


def test_numbers_of_different_questions_stand_in_no_table_together(runs: Path, tmp_path: Path) -> None:
    folders = [copied(runs / f"lr={lr},seed=0", tmp_path / lr) for lr in ("0.01", "1e-12")]
    for folder in folders:
        metrics, scores = folder.read_json("metrics.json"), dict(np.load(folder.path / "per_item.npz"))
        content = metrics["splits"]["val"]
        content["pair/R@1"] = content["MRR"] | {
            "protocol": content["MRR"]["protocol"] | {"question": "which pair"}
        }
        np.savez(folder.path / "per_item.npz", **scores, **{"val/pair/R@1": scores["val/MRR"]})
        folder.write_json("metrics.json", metrics)
    comparison = compare_runs([tmp_path], baseline="lr=1e-12")
    assert comparison.by_question(["MRR", "pair/R@1"]) == {"": ["MRR"], "which pair": ["pair/R@1"]}
    rows = {str(table.title): list(table.columns[0].cells) for table in comparison_tables(comparison)}
    assert rows["arms · val"] == rows["lr=0.01 − lr=1e-12"] == ["MRR"]
    assert rows["arms · val · which pair"] == rows["lr=0.01 − lr=1e-12 · which pair"] == ["pair R@1"]
    page = write_comparison(comparison, tmp_path / "page.html").read_text()
    assert "<h2>lr=0.01 − lr=1e-12 · which pair</h2>" in page


def test_controls_are_shown_apart_and_not_counted_by_holm(runs: Path, tmp_path: Path) -> None:
    """A metric that an estimate marks as a control leaves the verdicts on results as they are without it."""

    def with_metrics(place: Path, **marks: bool) -> Comparison:
        for source in sorted(path.parent for path in runs.glob("*/metrics.json")):
            folder = copied(source, place / source.name)
            metrics, scores = folder.read_json("metrics.json"), dict(np.load(folder.path / "per_item.npz"))
            split = metrics["splits"]["val"]
            for name, control in marks.items():
                split[f"{name}/MRR"] = split["MRR"] | {"control": control}
                scores[f"val/{name}/MRR"] = scores["val/MRR"]
            np.savez(folder.path / "per_item.npz", **scores)
            folder.write_json("metrics.json", metrics)
        return compare_runs([place], baseline="lr=1e-12")

    without = with_metrics(tmp_path / "without", other=False)
    comparison = with_metrics(tmp_path / "with", untrained=True, other=False)
    assert without.controls == frozenset()
    assert comparison.controls == {"untrained/MRR"}
    assert "untrained/MRR" in comparison.differences["lr=0.01"]
    assert comparison.together == without.together
    assert comparison.judged_together == without.judged_together == 2
    (table,) = [t for t in comparison_tables(comparison) if str(t.title) == "lr=0.01 − lr=1e-12"]
    names = [str(cell) for cell in table.columns[0].cells]
    assert names[-2:] == ["controls", "untrained MRR"]
    assert list(table.columns[-1].cells)[-1] == "–"
    text = describe_comparison(comparison)[0]
    assert "all 2 differences" in text
    assert "Controls are not counted (1): untrained MRR differs by the interval alone." in text
    page = write_comparison(comparison, tmp_path / "page.html")
    assert page.read_text().count(">controls</th>") == 2  # arms, differences
    assert json.loads((tmp_path / "comparison.json").read_text())["controls"] == ["untrained/MRR"]


def test_the_monitored_metric_is_a_result_whatever_it_is_marked_as(runs: Path, tmp_path: Path) -> None:
    for lr in ("0.01", "1e-12"):
        folder = copied(runs / f"lr={lr},seed=0", tmp_path / lr)
        metrics = folder.read_json("metrics.json")
        for content in metrics["splits"]["val"].values():
            content["control"] = True
        folder.write_json("metrics.json", metrics)
    comparison = compare_runs([tmp_path], baseline="lr=1e-12")
    assert comparison.monitor not in comparison.controls
    assert list(comparison.together["lr=0.01"]) == [comparison.monitor]


def test_an_arm_against_itself_is_not_distinguishable(runs: Path, tmp_path: Path) -> None:
    for seed in range(3):
        source = runs / f"lr=0.01,seed={seed}"
        for copy, rate in (("a", 0.01), ("b", 0.02)):
            folder = RunFolder(tmp_path / f"{copy}{seed}")
            folder.path.mkdir()
            for name in ("metrics.json", "per_item.npz", "train_log.jsonl"):
                (folder.path / name).write_bytes((source / name).read_bytes())
            folder.write_text(
                "config.yaml", (source / "config.yaml").read_text().replace("lr: 0.01", f"lr: {rate}")
            )
    comparison = compare_runs([tmp_path], baseline="lr=0.01")
    assert comparison.differences["lr=0.02"]["MRR"].verdict == "not distinguishable"


def test_other_splits_are_refused_with_the_reason(runs: Path, tmp_path: Path) -> None:
    source = runs / "lr=0.01,seed=0"
    folder = RunFolder(tmp_path / "other")
    folder.path.mkdir()
    metrics = json.loads((source / "metrics.json").read_text())
    metrics["splits"]["val"]["MRR"]["protocol"]["split"] = "another"
    folder.write_json("metrics.json", metrics)
    (folder.path / "per_item.npz").write_bytes((source / "per_item.npz").read_bytes())
    folder.write_text("config.yaml", (source / "config.yaml").read_text().replace("lr: 0.01", "lr: 0.03"))
    comparison = compare_runs([source, folder.path], baseline="lr=0.01")
    assert "split differs" in comparison.refused["lr=0.03: MRR"]
    assert "MRR" not in comparison.differences["lr=0.03"]


def test_what_cannot_be_compared_says_why(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match="at least two runs"):
        compare_runs([runs / "lr=0.01,seed=0"])
    with pytest.raises(NearfarError, match="no such run"):
        find_runs([tmp_path / "nothing"])
    with pytest.raises(NearfarError, match="neither a run nor a folder of runs"):
        find_runs([tmp_path])
    with pytest.raises(NearfarError, match=r"did you mean 'lr=0\.01'"):
        compare_runs([runs], baseline="lr=0.1")
    unfinished = RunFolder(tmp_path / "unfinished")
    unfinished.write_text("config.yaml", "seed: 1")
    with pytest.raises(NearfarError, match=r"not finished: .*unfinished"):
        find_runs([runs, unfinished.path])
    with pytest.raises(NearfarError, match="same configuration and seed"):
        compare_runs([runs, runs / "lr=0.01,seed=0"])


def test_reports_stand_alone(runs: Path) -> None:
    comparison = compare_runs([runs])
    page = write_comparison(comparison).read_text()
    assert "not distinguishable" in page
    assert page.count("<svg") >= 2
    run = RunFolder(runs / "lr=0.01,seed=0")
    run.write_json("environment.json", {})
    page = write_report(run).read_text()
    for outside in ("http://", "https://", "<script", "src="):
        assert outside not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", ""), outside
    assert "Training loss" in page
    assert "Embeddings" in page
    assert metrics_tables(run)[0].row_count == 5


def test_how_a_run_was_started_is_not_in_its_label(runs: Path, tmp_path: Path) -> None:
    source = runs / "lr=0.01,seed=0"
    other = {"lr: 0.01": "lr: 0.02", "resume_from: null": "resume_from: runs/first"}
    other |= {"start_epoch: null": "start_epoch: 3", "logger: null": "logger: tensorboard"}
    copied(source, tmp_path / "a")
    copied(source, tmp_path / "b", other)
    comparison = compare_runs([tmp_path])
    assert {arm.label for arm in comparison.arms} == {"lr=0.01", "lr=0.02"}


def test_arms_that_differ_in_the_batch_and_in_something_else_are_noted(runs: Path, tmp_path: Path) -> None:
    source = runs / "lr=0.01,seed=0"
    size = RunFolder(source).config().batch_size
    copied(source, tmp_path / "a")
    copied(source, tmp_path / "larger", {f"batch_size: {size}": f"batch_size: {2 * size}"})
    assert not [note for note in compare_runs([tmp_path]).notes if "larger batch" in note], (
        "the batch alone is a question"
    )
    copied(
        source, tmp_path / "both", {f"batch_size: {size}": f"batch_size: {2 * size}", "lr: 0.01": "lr: 0.02"}
    )
    (note,) = [
        note for note in compare_runs([tmp_path / "a", tmp_path / "both"]).notes if "larger batch" in note
    ]
    assert f"its batches have {2 * size} rows" in note or f"its batches have {size} rows" in note


def test_groups_and_lists_in_labels(runs: Path, tmp_path: Path) -> None:
    source = runs / "lr=0.01,seed=0"
    groups = {
        "a": "text_encoder: {kind: ngram, dims: 64, chars: [3, 5]}",
        "b": "text_encoder: {kind: ngram, dims: 128, chars: [3, 5]}",
        "c": "text_encoder: {kind: minilm}",
    }
    for name, group in groups.items():
        copied(source, tmp_path / name, {"logger: null": f"{group}\nkeys: [{name}, z]"})
    comparison = compare_runs([tmp_path], baseline="text_encoder=minilm")
    assert [arm.label for arm in comparison.arms] == [
        "keys=[a,z], text_encoder=ngram, text_encoder.dims=64",
        "keys=[b,z], text_encoder=ngram, text_encoder.dims=128",
        "keys=[c,z], text_encoder=minilm",
    ]
    assert comparison.baseline.label == "keys=[c,z], text_encoder=minilm"
    assert compare_runs([tmp_path], baseline="keys=['b', 'z']").baseline.parts[0] == "keys=[b,z]"
    with pytest.raises(NearfarError, match="fits several arms"):
        compare_runs([tmp_path], baseline="text_encoder=ngram")


def test_seeds_of_one_arm_on_other_items_are_an_error(runs: Path, tmp_path: Path) -> None:
    copied(runs / "lr=0.01,seed=0", tmp_path / "a0")
    other = copied(runs / "lr=0.01,seed=1", tmp_path / "a1")
    copied(runs / "lr=1e-12,seed=0", tmp_path / "b0")
    compare_runs([tmp_path])
    metrics = other.read_json("metrics.json")
    metrics["splits"]["val"]["MRR"]["protocol"]["split"] = "the same ids, other texts"
    other.write_json("metrics.json", metrics)
    with pytest.raises(NearfarError, match=r"a1 was evaluated on different items from .*a0"):
        compare_runs([tmp_path])
    other.path.joinpath("metrics.json").write_bytes((tmp_path / "a0" / "metrics.json").read_bytes())
    with np.load(other.path / "per_item.npz") as arrays:
        shorter = {name: arrays[name][:-1] for name in arrays.files}
    np.savez(other.path / "per_item.npz", **shorter)
    with pytest.raises(NearfarError, match=r"a1 was evaluated on different items from .*a0"):
        compare_runs([tmp_path])


def test_a_config_inside_a_run_is_no_run(runs: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = copied(runs / f"lr=0.01,seed={seed}", tmp_path / "grid" / f"seed={seed}")
        (folder.path / "wandb" / "files").mkdir(parents=True)
        (folder.path / "wandb" / "files" / "config.yaml").write_text("wandb_version: 1\n")
    assert [run.name for run in find_runs([tmp_path])] == ["seed=0", "seed=1"]


def test_links_lead_from_the_report_to_the_runs(runs: Path, tmp_path: Path) -> None:
    copied(runs / "lr=0.01,seed=0", tmp_path / "a" / "lr=0.01, seed=0")
    copied(runs / "lr=1e-12,seed=0", tmp_path / "b" / "deep" / "run")
    for output in (None, tmp_path / "elsewhere" / "page.html"):
        path = write_comparison(compare_runs([tmp_path]), output)
        links = re.findall(r'<a href="([^"]+)/report.html"', path.read_text())
        assert len(links) == 2
        for link in links:
            assert (path.parent / unquote(link) / "config.yaml").exists(), link


def test_shares_of_hard_items_are_shown(runs: Path, tmp_path: Path) -> None:
    folder = copied(runs / "lr=0.01,seed=0", tmp_path / "run")
    folder.write_json("environment.json", {})
    folder.write_json("dataset_layout.json", {})
    plan = {"kind": "plan", "epoch": 1, "step": 0, "sampler": "hard", "hardness": [9.0] * 4}
    plan |= {"hardness_random": 1.0, "false_negatives": 0.0}
    folder.append(plan | {"nominal_hard": 0.625, "realised_hard": [0.62, 0.61, 0.6, 0.5925]})
    folder.append(plan | {"epoch": 2, "sampler": "random", "nominal_hard": None, "realised_hard": None})
    page = write_report(folder).read_text()
    for words in ("nominal hard share", "<td>0.625</td>", "0.620 0.610 0.600 0.593", "<td>–</td>"):
        assert words in page, words


@pytest.mark.parametrize(
    ("diagnosis", "rows", "words"),
    [
        (None, 9000, "has not judged the run"),
        ([], 9000, "The doctor found nothing wrong with them"),
        ([], 70, "few items: 70 training rows"),
        (
            ["hardness-depleted", "temperature-drift"],
            9000,
            "Hardness is used up (it fell to .7); try order=level.",
        ),
    ],
)
def test_hard_batches_that_did_not_help_are_read_with_the_doctor(
    runs: Path, tmp_path: Path, diagnosis: list[str] | None, rows: int, words: str
) -> None:
    for name, sampler in (("a", "random"), ("b", "hard")):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        for file in ("metrics.json", "per_item.npz", "train_log.jsonl"):
            (folder.path / file).write_bytes((runs / "lr=0.01,seed=0" / file).read_bytes())
        config = (runs / "lr=0.01,seed=0" / "config.yaml").read_text()
        folder.write_text("config.yaml", config + f"sampler:\n  name: {sampler}\n")
        folder.write_json("dataset_layout.json", {"splits": {"train": {"rows": rows}}})
        plan = {"kind": "plan", "hardness": [8.0, 7.0], "hardness_random": 2.0, "last_to_first": 0.7}
        folder.append(plan if sampler == "hard" else {"kind": "plan"})
        if diagnosis is not None:
            finding = {"severity": "warning", "title": "Hardness is used up.", "override": "order=level"}
            content = [finding | {"id": id, "evidence": "it fell to .7"} for id in diagnosis]
            folder.write_json("doctor.json", {"findings": content, "unjudged": []})
    text = " ".join(describe_comparison(compare_runs([tmp_path], baseline="sampler=random")))
    assert words in text
    assert text.count("Hardness is used up") == ("used up" in words)  # of the batches, nothing else


HOSTILE = "[red]x[/red] <script>alert(1)</script> $\\frac$ \x1b[2J\u202egnp"


def test_names_and_metrics_steer_neither_terminal_nor_page(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for lr in ("0.01", "1e-12"):
        folder = copied(runs / f"lr={lr},seed=0", tmp_path / lr)
        metrics, scores = folder.read_json("metrics.json"), dict(np.load(folder.path / "per_item.npz"))
        content = metrics["splits"]["val"]
        content[HOSTILE] = content["MRR"] | {"metric": HOSTILE}
        np.savez(folder.path / "per_item.npz", **scores, **{f"val/{HOSTILE}": scores["val/MRR"]})
        folder.write_json("metrics.json", metrics)
    comparison = compare_runs([tmp_path], baseline="lr=1e-12")
    console = terminal.console()
    for table in [*comparison_tables(comparison), *metrics_tables(folder)]:
        console.print(table)
    terminal.say(console, HOSTILE)
    shown = capsys.readouterr().out
    assert "[red]x[/red]" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "\\x1b[2J\\u202egnp" in shown
    page = write_comparison(comparison, tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "<script>alert" not in line_chart(HOSTILE, {HOSTILE: ([1, 2], [1, 2])}, HOSTILE, HOSTILE)


def test_rich_may_colour_what_a_text_may_not() -> None:
    console = terminal.console()
    styled = [s for s in console.render(Text("a\x1b[31m\rb\x9bc\td\n", "red")) if s.text.strip()]
    assert "".join(s.text for s in styled).startswith("a\\x1b[31m")
    assert all(str(s.style) == "red" for s in styled)
    assert not any(set("\x1b\r\x9b") & set(s.text) for s in styled)
