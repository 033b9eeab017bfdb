"""Counterfactuals and trials for the terminal: tables, and what they say in sentences."""

from __future__ import annotations

from rich import box
from rich.text import Text

from nearfar.lab.effects import Effect, Mean
from nearfar.lab.table import Table, metric_words, short_number
from nearfar.lab.trial import Trial
from nearfar.lab.what_if import WhatIf

__all__ = ["read_trial", "read_what_if", "trial_table", "what_if_table"]


def what_if_table(found: WhatIf) -> Table:
    """The run and each counterfactual: loss and what guessing costs, changes, and the gradient beside the run's."""
    every = [found.baseline, *found.effects]
    floors = any(effect.floor is not None and effect.floor.value > 0 for effect in every)
    title = (
        f"{found.run} · what if · {found.checkpoint}, step {found.step} · "
        f"{found.batches} batches of {found.rows} rows, epoch {found.epoch}"
    )
    table = Table(title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("what if", no_wrap=True)
    columns = ["loss", "guessing", *["floor"] * floors, "Δ loss", "Δ (loss −\nguessing)"]
    columns += ["cosine\nweights", "cosine\nembedd.", "norm\n×", "p(+)", "hard-\nest"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for effect in every:
        own = effect is found.baseline
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


def read_what_if(found: WhatIf) -> list[str]:
    """What the table does not say by itself."""
    lines = []
    how = "dropout as in training, the same masks for all" if found.training else "without dropout"
    over = "95 % intervals over these batches" if found.batches > 1 else "one batch: no interval"
    lines.append(f"{over}, under the weights of this one checkpoint; {how}. Nothing was trained.")
    by_name = {effect.counterfactual.name: effect for effect in found.effects}
    other = by_name.get("other rows")
    if other is not None and other.gradient_cosine is not None:
        lines.append(
            f"Gradients of two batches of one kind have the cosine {other.gradient_cosine.value:.2f} here (other "
            "rows): where a change draws other rows, read its cosine against that."
        )
    apart = [effect for effect in found.effects if effect.not_comparable]
    if apart:
        reasons = "; ".join(f"{effect.counterfactual.name}: {effect.not_comparable}" for effect in apart)
        lines.append(f"Not comparable as losses: {reasons}.")
    inert = [effect.counterfactual.name for effect in found.effects if effect.inert]
    if inert:
        lines.append(f"No effect on these batches, to the last bit: {', '.join(inert)}.")
    lines += [f"Not asked, {each.name}: {each.reason}" for each in found.refused]
    lines.append(
        "A lower loss on frozen weights is no better model. Whether a change helps, N steps say: --try N."
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


def read_trial(trial: Trial) -> list[str]:
    """The verdict and what its interval speaks of, in sentences."""
    d = trial.differences[trial.monitor]
    what = " ".join(trial.overrides)
    verdict = f"{what} is {d.verdict}" + (" than" if d.verdict in ("better", "worse") else " from")
    lines = [
        f"{verdict} the run as it is by {metric_words(trial.monitor)}, after {trial.steps} steps: {d.value:+.4f} "
        f"[{d.low:+.4f}, {d.high:+.4f}]."
    ]
    if len(trial.seeds) == 1:
        lines.append(
            f"The interval is over {d.n} validation items of one seed: it says how far other items would agree on "
            "these two models. Another draw of batches alone can carry N steps further apart; --seeds 3 shows it."
        )
    else:
        lines.append(
            f"The interval is over {d.n} validation items and {len(trial.seeds)} draws of batches, all from one "
            "checkpoint. It does not say what a training from the start would give."
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
        place += ", moved back, since the run had too few steps left; both arms may lose at first by that"
    lines.append(f"{place}.")
    lines += [f"Not compared, {metric_words(name)}: {reason}" for name, reason in trial.refused.items()]
    return lines
