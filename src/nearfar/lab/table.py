"""Tables for the terminal: metrics, comparisons, sweeps, counterfactuals and trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.padding import PaddingDimensions
from rich.style import StyleType
from rich.table import Table as RichTable
from rich.text import Text

from nearfar.data.files import Json
from nearfar.metrics import Difference, Estimate
from nearfar.terminal import interval_words, metric_words, short_number

if TYPE_CHECKING:  # `nearfar score` and `nearfar verify sampler` need no extra, and these do
    from nearfar.batching import SamplerVerdict
    from nearfar.lab.compare import Comparison
    from nearfar.lab.counterfactuals import Effect, Mean
    from nearfar.lab.summary import Sweep
    from nearfar.lab.trial import Trial
    from nearfar.lab.what_if import WhatIf
    from nearfar.training.run_folder import RunFolder
    from nearfar.training.verify_ddp import DdpVerdict

__all__ = [
    "cluster_table",
    "comparison_tables",
    "ddp_table",
    "describe_trial",
    "describe_what_if",
    "differences_table",
    "estimates_table",
    "metric_words",
    "metrics_tables",
    "short_number",
    "sweep_table",
    "trial_table",
    "verdict_table",
    "what_if_table",
]


#: with more arms than this, a sweep's table takes the place of one table for each arm
FEW = 4


class Table(RichTable):
    """Rich's table without markup: names of runs, metrics, options and classes are shown as they are written.

    A cell that is to have a colour is a ``Text`` with a style.

    >>> table = Table("[red]name[/red]")
    >>> table.add_row("[bold]")
    >>> from rich.console import Console
    >>> Console(width=30).print(table.title, *table.columns[0].cells)
    [red]name[/red] [bold]
    """

    def __init__(
        self,
        title: str,
        caption: str | None = None,
        *,
        box: box.Box = box.HEAVY_HEAD,
        padding: PaddingDimensions = (0, 1),
    ) -> None:
        super().__init__(
            title=Text(title, style="table.title"),
            caption=None if caption is None else Text(caption, style="table.caption"),
            title_justify="left",
            caption_justify="left",
            box=box,
            padding=padding,
        )

    def add_column(self, header: RenderableType = "", *rest: Any, **options: Any) -> None:
        """A column below a header that is no markup."""
        super().add_column(escape(header) if isinstance(header, str) else header, *rest, **options)

    def add_row(
        self, *cells: RenderableType | None, style: StyleType | None = None, end_section: bool = False
    ) -> None:
        """A row whose words are no markup."""
        plain = (escape(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*plain, style=style, end_section=end_section)


def estimates_table(title: str, estimates: Mapping[str, Estimate]) -> Table:
    """Value, interval and chance of each, and the gallery where one of them has any."""
    galleries = any("gallery" in estimate.protocol for estimate in estimates.values())
    table = Table(title)
    for column in ("metric", "value", "95 % interval", "chance", *(["gallery"] if galleries else []), "n"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for name, estimate in estimates.items():
        table.add_row(
            metric_words(name),
            short_number(estimate.value),
            interval_words(estimate.low, estimate.high),
            _chance(estimate),
            *([str(estimate.protocol.get("gallery", ""))] if galleries else []),
            str(estimate.n) + (" (trivial)" if estimate.trivial else ""),
        )
    return table


def _chance(estimate: Estimate) -> str:
    """The chance level, a dash where it is unknown."""
    return "–" if math.isnan(estimate.chance) else short_number(estimate.chance)


def differences_table(title: str, rows: Sequence[Json]) -> Table:
    """Rows of ``pairs``, ``minus``, ``difference``, ``low``, ``high``, ``verdict``."""
    table = Table(title)
    for column in ("pairs", "minus", "difference", "95 % interval", "verdict"):
        table.add_column(column, justify="left", no_wrap=True)
    for row in rows:
        style = {"better": "green", "worse": "red"}.get(row["verdict"], "yellow")
        table.add_row(
            row["pairs"],
            row["minus"],
            f"{row['difference']:+.3f}",
            f"[{row['low']:+.3f}, {row['high']:+.3f}]",
            Text(str(row["verdict"]), style),
        )
    return table


def metrics_tables(folder: RunFolder) -> list[Table]:
    """The estimates of a run: value, interval, chance, gallery; one table for each question."""
    from nearfar.lab.groups import by_question

    metrics = folder.read_json("metrics.json")
    splits = metrics["splits"]
    split = "test" if "test" in splits else next(iter(splits))
    estimates = {name: Estimate.from_dict(content) for name, content in splits[split].items()}
    members = metrics.get("members")
    what = f"ensemble of {len(members)} runs" if members else f"best epoch, {metrics['best_epoch']}"
    title = f"{folder} · {split} · {what}"
    return [
        estimates_table(title + (f" · {question}" if question else ""), rows)
        for question, rows in by_question(estimates).items()
    ]


def _verdict_style(difference: Difference) -> str:
    return {"better": "green", "worse": "red"}.get(difference.verdict, "yellow")


def comparison_tables(comparison: Comparison) -> list[Table]:
    """The means of the arms, their paired differences from the baseline with verdicts, and what was not compared."""
    from nearfar.lab.summary import sweep_of

    arms = [
        _arms_table(comparison, question, metrics)
        for question, metrics in comparison.by_question(comparison.summary[comparison.arms[0].label]).items()
    ]
    sweep = sweep_of(comparison)
    few = sweep is None or len(comparison.arms) <= FEW
    tables = arms if few else []
    if sweep is not None:
        tables.append(sweep_table(comparison, sweep))
    for label, differences in comparison.differences.items():
        if not few and sweep is not None and (sweep.best is None or label != sweep.best.label):
            continue  # the sweep's table has a line for each; the best is shown in full
        for question, metrics in comparison.by_question(differences).items():
            tables.append(_differences_of(comparison, label, question, metrics))
    for label, by_metric in comparison.by_fold.items():
        for question, metrics in comparison.by_question(by_metric).items():
            tables.append(fold_table(comparison, label, question, metrics))
    for label, reason in comparison.refused.items():
        table = Table(f"{label}: not compared")
        table.add_column("why")
        table.add_row(reason)
        tables.append(table)
    return tables


def _arms_table(comparison: Comparison, question: str, metrics: Sequence[str]) -> Table:
    first = next(iter(comparison.arms[0].estimates.values()))
    title = " · ".join(part for part in ("arms", comparison.split, question) if part)
    table = Table(title)
    table.add_column("metric", no_wrap=True)
    table.add_column("chance", justify="right")
    table.add_column("gallery", justify="right")
    for arm in comparison.arms:
        seeds = f"\n{len(arm.runs)} seed" + "s" * (len(arm.runs) != 1)
        table.add_column(arm.label + seeds * bool(arm.config), justify="right")
    for name in metrics:
        _mark_controls(table, comparison, name, metrics)
        row = [metric_words(name)]
        estimate = first.get(name)
        row += [_chance(estimate), str(estimate.protocol.get("gallery", ""))] if estimate else ["", ""]
        for arm in comparison.arms:
            mean = comparison.summary[arm.label].get(name)
            row.append(f"{short_number(mean.value)} {interval_words(mean.low, mean.high)}" if mean else "–")
        table.add_row(*row)
    return table


def _mark_controls(table: Table, comparison: Comparison, name: str, metrics: Sequence[str]) -> None:
    """A line above the first control of a table, whose controls come last."""
    if name == next((metric for metric in metrics if metric in comparison.controls), None):
        table.add_section()
        table.add_row(Text("controls", "italic"))


def _differences_of(comparison: Comparison, label: str, question: str, metrics: Sequence[str]) -> Table:
    several = comparison.judged_together > 1
    title = f"{label} − {comparison.baseline.label}" + (f" · {question}" if question else "")
    table = Table(title)
    needed = comparison.needed.get(label)
    last = "per seed" if needed is None else "queries that\nwould tell it"
    for column in ("metric", "difference", "95 % interval", last, "verdict"):
        table.add_column(
            column, justify="right" if column in ("difference", "95 % interval") else "left", no_wrap=True
        )
    if several:
        table.add_column(f"all {comparison.judged_together} judged\ntogether (Holm)")
    for name in metrics:
        _mark_controls(table, comparison, name, metrics)
        d = comparison.differences[label][name]
        table.add_row(
            metric_words(name),
            f"{d.value:+.3f}",
            f"[{d.low:+.3f}, {d.high:+.3f}]",
            " ".join(f"{value:+.3f}" for value in d.per_seed)
            if needed is None
            else _queries(needed.get(name)),
            Text(d.verdict, _verdict_style(d)),
            *([comparison.together[label].get(name, "–")] if several else []),
        )
    return table


def _queries(number: int | None) -> str:
    return "–" if number is None else f"{number:,}" if number < 10**7 else "over 10 million"


def fold_table(comparison: Comparison, label: str, question: str, metrics: Sequence[str]) -> Table:
    """The difference of an arm from the baseline in every fold, and over folds, for each metric of a question."""
    by_metric = comparison.by_fold[label]
    first = next(iter(by_metric.values()))
    title = f"{label} − {comparison.baseline.label}, by {comparison.over}; interval over folds (t)"
    title += f" · {question}" if question else ""
    table = Table(title)
    table.add_column("metric", no_wrap=True)
    for column in (*first.folds, "mean of folds", "95 % interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for metric in metrics:
        _mark_controls(table, comparison, metric, metrics)
        mean = by_metric[metric]
        each = [
            Text(f"{d.value:+.3f}", _verdict_style(d))
            if d.verdict != "not distinguishable"
            else f"{d.value:+.3f}"
            for d in mean.folds.values()
        ]
        interval = f"[{mean.low:+.3f}, {mean.high:+.3f}]"
        table.add_row(metric_words(metric), *each, f"{mean.value:+.3f}", interval)
    return table


def sweep_table(comparison: Comparison, sweep: Sweep) -> Table:
    """One line for each arm: its values on the axes, its mean and its difference from the baseline by the monitor."""
    name = comparison.monitor
    title = f"sweep · {metric_words(name)} · {comparison.split} · against {comparison.baseline.label}"
    table = Table(title)
    for axis in sweep.axes:
        table.add_column(axis, justify="right")
    for column in ("seeds", "mean", "95 % interval", "difference", "95 % interval", "verdict"):
        table.add_column(column, justify="left" if column == "verdict" else "right", no_wrap=True)
    for cell in sweep.cells:
        mean = comparison.summary[cell.arm.label].get(name)
        row: list[RenderableType] = [*cell.values.values(), str(len(cell.arm.runs))]
        row += [short_number(mean.value), interval_words(mean.low, mean.high)] if mean else ["–", "–"]
        d = comparison.differences.get(cell.arm.label, {}).get(name)
        if d is not None:
            row += [
                f"{d.value:+.3f}",
                f"[{d.low:+.3f}, {d.high:+.3f}]",
                Text(d.verdict, _verdict_style(d)),
            ]
        else:
            row += ["", "", "baseline" if cell.arm is comparison.baseline else "not compared"]
        table.add_row(*row, style="bold" if cell.arm is sweep.best else None)
    return table


def verdict_table(verdict: SamplerVerdict) -> Table:
    """The sampler self-test: each sampler's batches, the check's verdict on them and the one it must give."""
    title = f"verify sampler: {'passed' if verdict.passed else 'FAILED'}"
    table = Table(title)
    for column in (
        "sampler",
        "largest cluster",
        "pairs of one cluster",
        "chance",
        "z",
        "harder",
        "must be",
        "once",
    ):
        table.add_column(column, justify="left" if column == "sampler" else "right")
    for row in verdict.rows:
        numbers = [f"{row.largest:.2f}", f"{row.same_pairs:.3f}", f"{row.chance:.3f}", f"{row.z:.1f}"]
        words = ["yes" if word else "no" for word in (row.harder, row.expected, row.once)]
        table.add_row(row.name, *numbers, *words, style=None if row.passed else "bold red")
    return table


def cluster_table(verdict: SamplerVerdict) -> Table:
    """Clusters in the first epoch's batches of random and of hard batches, side by side."""
    table = Table("items of each cluster, batch by batch, first epoch")
    table.add_column("batch", justify="right")
    for row in verdict.rows:
        table.add_column(row.name)
    for batch in range(max(len(row.clusters) for row in verdict.rows)):
        cells = [
            " ".join(map(str, row.clusters[batch])) if batch < len(row.clusters) else ""
            for row in verdict.rows
        ]
        table.add_row(str(batch + 1), *cells)
    return table


def ddp_table(verdict: DdpVerdict) -> Table:
    """The self-test of distributed training: each loss and option against one process, and what it promises."""
    title = f"verify ddp, {verdict.processes} processes: {'passed' if verdict.passed else 'FAILED'}"
    caption = "ratio, cosine: gradient of the encoder to that of one process. A wrong setup must be detected."
    table = Table(title, caption=caption)
    for column in ("loss, option", "ratio", "cosine", "scale\nratio", "loss\ndifference", "verdict"):
        left = column in ("loss, option", "verdict")
        table.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    words = {"exact": "exact", "by definition": "by definition: ", "wrong": "detected: "}
    for k, row in enumerate(verdict.rows):
        if not k or row.loss != verdict.rows[k - 1].loss:
            table.add_section()
            table.add_row(row.loss, style="bold")
        scale = "" if row.scale_ratio is None else f"{row.scale_ratio:.3f}"
        numbers = [f"{row.ratio:.3f}", f"{row.cosine:.4f}", scale, f"{row.loss_difference:.1e}"]
        text = (words[row.promise] if row.passed else f"FAILED, {row.promise}: ") + row.reason
        table.add_row(f"  {row.option}", *numbers, text, style=None if row.passed else "bold red")
    return table


def what_if_table(result: WhatIf) -> Table:
    """The run and each counterfactual: loss, loss of guessing, changes, and the gradient beside the run's."""
    every = [result.baseline, *result.effects]
    floors = any(effect.floor is not None and effect.floor.value > 0 for effect in every)
    title = (
        f"{result.run} · what if · {result.checkpoint}, step {result.step} · "
        f"{result.batches} batches of {result.rows} rows, epoch {result.epoch}"
    )
    table = Table(title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("what if", no_wrap=True)
    columns = ["loss", "guessing", *["floor"] * floors, "Δ loss", "Δ (loss −\nguessing)"]
    columns += ["cosine\nweights", "cosine\nembedd.", "norm\n×", "p(+)", "hard-\nest"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for effect in every:
        own = effect is result.baseline
        name = effect.counterfactual.name + "".join(f"\n {o}" for o in effect.counterfactual.overrides)
        cells = [name, _plain(effect.loss), _plain(effect.uniform_level)]
        cells += [_plain(effect.floor)] * floors
        cells += ["", ""] if own else _changes(effect)
        gradients = (effect.gradient_cosine, effect.embedding_cosine, effect.gradient_ratio)
        cells += ["", "", ""] if own else [_fixed(each) for each in gradients]
        cells += [_fixed(effect.p_positive, 3), _fixed(effect.hardest_share, 3)]
        table.add_row(*cells, style="bold" if own else None, end_section=own)
    return table


def _plain(mean: Mean | None) -> str:
    return "–" if mean is None else short_number(mean.value)


def _fixed(mean: Mean | None, digits: int = 2) -> str:
    return "–" if mean is None else f"{mean.value:.{digits}f}"


def _signed(mean: Mean | None) -> str:
    if mean is None:
        return "–"
    text = f"{mean.value:+.4f}"
    return text if mean.high is None else f"{text} ±{mean.high - mean.value:.4f}"


def _changes(effect: Effect) -> list[str]:
    if effect.inert:
        return ["no effect", "no effect"]
    first = "not\ncomparable" if effect.not_comparable else _signed(effect.change)
    return [first, _signed(effect.above_guessing_change)]


def describe_what_if(result: WhatIf) -> list[str]:
    """How the table was measured, and which counterfactuals have no numbers in it."""
    lines = []
    how = "dropout as in training, the same masks for all" if result.training else "without dropout"
    over = "95 % intervals over these batches" if result.batches > 1 else "one batch: no interval"
    lines.append(f"{over}, under the weights of this one checkpoint; {how}. Nothing was trained.")
    by_name = {effect.counterfactual.name: effect for effect in result.effects}
    other = by_name.get("other rows")
    if other is not None and other.gradient_cosine is not None:
        lines.append(
            f"Gradients of two batches of the same kind have the cosine {other.gradient_cosine.value:.2f} here (other "
            "rows). Compare the cosine of a change that draws other rows with it."
        )
    apart = [effect for effect in result.effects if effect.not_comparable]
    if apart:
        reasons = "; ".join(f"{effect.counterfactual.name}: {effect.not_comparable}" for effect in apart)
        lines.append(f"Not comparable as losses: {reasons}.")
    inert = [effect.counterfactual.name for effect in result.effects if effect.inert]
    if inert:
        lines.append(f"No effect on these batches, to the last bit: {', '.join(inert)}.")
    lines += [f"Not evaluated, {each.name}: {each.reason}" for each in result.refused]
    lines.append(
        "A lower loss on frozen weights does not make a better model. To see whether a change helps: --try N."
    )
    return lines


def trial_table(trial: Trial) -> Table:
    """Validation metrics before, without and with the prescription, and the paired difference of the arms."""
    title = (
        f"{trial.run} · {' '.join(trial.overrides)} · {trial.steps} steps from step {trial.start_step} · val"
    )
    table = Table(title)
    for column in ("metric", "before", "unchanged", "changed", "difference", "95 % interval", "verdict"):
        left = column in ("metric", "verdict")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    order = sorted(trial.differences, key=lambda name: name != trial.monitor)
    for name in order:
        d = trial.differences[name]
        values = (trial.before, trial.unchanged, trial.changed)
        colour = {"better": "green", "worse": "red"}.get(d.verdict, "yellow")
        table.add_row(
            metric_words(name),
            *(short_number(value[name]) if name in value else "–" for value in values),
            f"{d.value:+.4f}",
            f"[{d.low:+.4f}, {d.high:+.4f}]",
            Text(d.verdict, colour),
            end_section=name == trial.monitor,
        )
    return table


def describe_trial(trial: Trial) -> list[str]:
    """The verdict and what its interval is over, in sentences."""
    d = trial.differences[trial.monitor]
    what = " ".join(trial.overrides)
    verdict = f"{what} is {d.verdict}" + (" than" if d.verdict in ("better", "worse") else " from")
    lines = [
        f"{verdict} the run as it is by {metric_words(trial.monitor)}, after {trial.steps} steps: {d.value:+.4f} "
        f"[{d.low:+.4f}, {d.high:+.4f}]."
    ]
    if len(trial.seeds) == 1:
        lines.append(
            f"The interval is over {d.n} validation items of one seed: it holds for other items and these two models. "
            "A different draw of batches alone can move N steps further apart; --seeds 3 shows how far."
        )
    else:
        lines.append(
            f"The interval is over {d.n} validation items and {len(trial.seeds)} draws of batches, all from one "
            "checkpoint. It does not hold for a training from the start."
        )
    others = [name for name in trial.differences if name != trial.monitor]
    apart = [name for name in others if trial.differences[name].verdict != "not distinguishable"]
    if apart:
        differ = "differs by its own interval" if len(apart) == 1 else "differ by their own intervals"
        lines.append(
            f"{len(apart)} of the {len(others)} other metrics {differ}; one in twenty does so by "
            "chance, and they are not independent."
        )
    first, last = trial.learning_rates
    place = f"The schedules stood at epoch {trial.epoch} (learning rate {first:.2g} to {last:.2g})"
    if trial.moved_back:
        place += ", moved back, since the run had too few steps left; both arms may get worse at first for that reason"
    lines.append(f"{place}.")
    lines += [f"Not compared, {metric_words(name)}: {reason}" for name, reason in trial.refused.items()]
    return lines
