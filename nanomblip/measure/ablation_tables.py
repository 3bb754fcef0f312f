"""From the records of ablations to the tables and the plot of the README."""

import math
import os
import statistics
from pathlib import Path

from nanomblip.measure.ablation_suites import BEGIN, END, Config, Suite, find_record, read_records, resolved
from nanomblip.weights.files import write_atomic


def values_of(row: str, suite: Suite, cfg: Config, records: list[dict]) -> tuple[list[float], list[dict]]:
    """The measure of a row for each seed that has a record, and these records."""
    task, group, metric = suite.measure
    experiment, _, mask = row.partition("+")
    found = []
    for seed in range(cfg.seeds):
        try:
            record = find_record(experiment, seed, cfg, records)
        except ValueError:
            break
        what = f"{task}+mask" if mask else task
        if record is not None and metric in record["measures"].get(what, {}).get(group, {}):
            found.append((record["measures"][what][group][metric], record))
    return [value for value, _ in found], [record for _, record in found]


def verdict(base: list[float], other: list[float], expect: str) -> str:
    """Does a difference agree with "lower", "higher" or "same"? One is seen when it exceeds two standard errors of it.

    The standard error is from the deviation over seeds on both sides; with a single seed on either side nothing is concluded.
    """
    if len(base) < 2 or len(other) < 2:
        return "one seed: open"
    difference = statistics.mean(other) - statistics.mean(base)
    error = math.sqrt(statistics.variance(base) / len(base) + statistics.variance(other) / len(other))
    seen = "same" if abs(difference) <= 2 * error else "lower" if difference < 0 else "higher"
    return "agrees" if seen == expect else "no difference seen" if seen == "same" else "disagrees"


def suite_table(name: str, suite: Suite, cfg: Config, records: list[dict]) -> list[str]:
    """The lines of one suite's markdown table."""
    task, group, metric = suite.measure
    lines = [f"**{suite.title}.** Measured: {metric.replace('_', ' ')} of {task}s in percent, {group}. Paper: {suite.claim}.", "",
             "| experiment | trained parameters | seconds | seeds | measure | difference | nano and the paper |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    base, _ = values_of(suite.rows[0], suite, cfg, records)
    for row in suite.rows:
        values, of = values_of(row, suite, cfg, records)
        if not values:
            lines.append(f"| {row} | - | - | 0 | not run | - | - |")
            continue
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else " (single seed)"
        first = row == suite.rows[0]
        difference = "-" if first or not base else f"{100 * (statistics.mean(values) - statistics.mean(base)):+.1f}"
        judged = "reference" if first else verdict(base, values, suite.expect) if base else "-"
        cost = f"{of[0]['trained_parameters']:,} | {statistics.mean(r['seconds'] for r in of):.0f}"
        lines.append(
            f"| {row} | {cost} | {len(values)} | {100 * statistics.mean(values):.1f}{spread} | {difference} | {judged} |"
        )
    return [*lines, ""]


def tables(cfg: Config, records: list[dict]) -> str:
    """All tables as markdown, a function of the records alone."""
    steps = cfg.steps or resolved([])["steps"]
    head = (f"At nano scale ({steps:,} steps, {cfg.limit} held-out pictures a language, mean and deviation over seeds; chrf is a "
            f"character F-score). A difference is called one when it exceeds twice its standard error over seeds.")  # fmt: skip
    return "\n".join(
        [head, "", *(line for name, suite in cfg.suites().items() for line in suite_table(name, suite, cfg, records))]
    )


def plot(cfg: Config, records: list[dict], path: Path) -> bool:
    """Every row's difference to its reference, a point a seed; False when there is nothing to show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = []
    for suite in cfg.suites().values():
        base, _ = values_of(suite.rows[0], suite, cfg, records)
        for row in suite.rows[1:]:
            values, _ = values_of(row, suite, cfg, records)
            if base and values:
                label = f"{row} ({', '.join(suite.measure).replace('_', ' ')})"
                rows.append((label, [100 * (v - statistics.mean(base)) for v in values]))
    if not rows:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.3 * len(rows)))
    for y, (_, values) in enumerate(rows):
        axes.plot(values, [y] * len(values), "o", color="0.6", markersize=4)
        axes.plot([statistics.mean(values)], [y], "D", color="C0", markersize=6)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("difference to the reference in points; grey: single seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return True


def write_tables(cfg: Config) -> int:
    """Put the tables between the markers of --readme, and the plot beside the records."""
    records, readme = read_records(Path(cfg.records)), Path(cfg.readme)
    text = readme.read_text(encoding="utf-8")
    start, end = text.find(BEGIN), text.find(END)
    if not 0 <= start < end or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"--readme {readme}: needs the lines {BEGIN} and {END}, once each, in this order")
    content = tables(cfg, records)
    picture = Path(cfg.records) / "ablations.png"
    if plot(cfg, records, picture):
        content += f"\n![Differences to the reference of each suite]({os.path.relpath(picture, readme.parent)})\n"
    whole = f"{text[:start]}{BEGIN}\n{content}\n{text[end:]}"
    write_atomic(readme, lambda path: path.write_text(whole, encoding="utf-8"))
    print(content)
    return 0
