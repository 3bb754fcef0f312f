"""From the records of ablations to their tables (the figure is made by notebooks/make_figures.py)."""

import math
import statistics
from pathlib import Path

from nanomblip.measure.ablation_suites import BEGIN, END, Config, Suite, find_record, read_records, settings_of
from nanomblip.weights.files import write_atomic


def values_of(row: str, suite: Suite, setting: str, records: list[dict]) -> tuple[list[float], list[dict]]:
    """The measure of a row for each seed that has a record, and these records."""
    task, group, metric = suite.measure
    experiment, _, mask = row.partition("+")
    found = []
    for seed in sorted({record["seed"] for record in records}):
        record = find_record(experiment, seed, setting, records)
        what = f"{task}+mask" if mask else task
        if record is not None and metric in record["measures"].get(what, {}).get(group, {}):
            found.append((record["measures"][what][group][metric], record))
    return [value for value, _ in found], [record for _, record in found]


def verdict(base: list[float], other: list[float], expect: str, smallest: float) -> str:
    """Does a difference agree with "lower", "higher" or "same"? One counts when it exceeds two standard errors of it
    and `smallest` percentage points.

    The standard error is from the standard deviation over seeds on both sides; with a single seed on either side
    nothing is concluded.
    """
    if len(base) < 2 or len(other) < 2:
        return "one seed: open"
    difference = statistics.mean(other) - statistics.mean(base)
    error = math.sqrt(statistics.variance(base) / len(base) + statistics.variance(other) / len(other))
    significant, large = abs(difference) > 2 * error, 100 * abs(difference) >= smallest
    if not (significant and large):
        return "agrees" if expect == "same" else f"below {smallest:g} points" if significant else "not significant"
    return "agrees" if expect == ("lower" if difference < 0 else "higher") else "disagrees"


def suite_table(suite: Suite, setting: str, records: list[dict]) -> list[str]:
    """The lines of one suite's markdown table; rows that were not run are said to be so."""
    task, group, metric = suite.measure
    measured = f"{metric.replace('_', ' ')} of {task}s in percent, {group.replace('all other', 'other languages')}"
    lines = [f"**{suite.title}.** Measured: {measured}. Paper: {suite.claim}.", "",
             "| experiment | trained parameters | seeds | measure | difference | nano and the paper |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    base, _ = values_of(suite.rows[0], suite, setting, records)
    for row in suite.rows:
        values, of = values_of(row, suite, setting, records)
        if not values:
            lines.append(f"| {row} | - | 0 | not run | - | - |")
            continue
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else " (single seed)"
        first = row == suite.rows[0]
        difference = "-" if first or not base else f"{100 * (statistics.mean(values) - statistics.mean(base)):+.1f}"
        judged = "reference" if first else verdict(base, values, suite.expect, suite.smallest) if base else "-"
        trained = f"{of[0]['trained_parameters']:,}"
        mean = f"{100 * statistics.mean(values):.1f}{spread}"
        lines.append(f"| {row} | {trained} | {len(values)} | {mean} | {difference} | {judged} |")
    return [*lines, "", *(group_table(suite, setting, records) if suite.by_group else [])]


def group_table(suite: Suite, setting: str, records: list[dict]) -> list[str]:
    """The lines of a table of a suite's metric in every group of languages, means over seeds."""
    task, _, metric = suite.measure
    of = {row: values_of(row, suite, setting, records)[1] for row in suite.rows}
    groups = list(dict.fromkeys(g for runs in of.values() for run in runs for g in run["measures"][task]))
    if not groups:
        return []
    lines = ["| experiment |" + "".join(f" {group} |" for group in groups), "|---" * (1 + len(groups)) + "|"]
    for row, runs in of.items():
        if runs:
            means = [statistics.mean(run["measures"][task][group][metric] for run in runs) for group in groups]
            lines.append(f"| {row} |" + "".join(f" {100 * mean:.1f} |" for mean in means))
    return [*lines, ""]


def tables(cfg: Config, setting: str, records: list[dict]) -> str:
    """All tables as markdown, a function of the records of one setting alone."""
    head = (
        f"At nano scale ({setting}; mean and standard deviation over seeds; chrf is a character F-score). A difference "
        "counts when it exceeds twice its standard error over seeds and a smallest difference worth speaking of: "
        "3 percentage points, or as the table says."
    )
    return "\n".join([head, "", *(line for s in cfg.suites().values() for line in suite_table(s, setting, records))])


def write_tables(cfg: Config) -> int:
    """Put the tables between the markers of --readme."""
    records, readme = read_records(Path(cfg.records)), Path(cfg.readme)
    text = readme.read_text(encoding="utf-8")
    start, end = text.find(BEGIN), text.find(END)
    if not 0 <= start < end or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"--readme {readme}: needs the lines {BEGIN} and {END}, once each, in this order")
    setting = cfg.setting or next(iter(settings_of(records)), "no record yet")
    content = tables(cfg, setting, records)
    whole = f"{text[:start]}{BEGIN}\n{content}\n{text[end:]}"
    write_atomic(readme, lambda path: path.write_text(whole, encoding="utf-8"))
    print(content)
    return 0
