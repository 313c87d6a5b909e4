"""Read the numbers of a cell, and make the table over cells: results.jsonl → results.md.

results.jsonl has one row per finished attempt at a cell; the last row of a cell counts. `last` and `best` are held-out numbers
of the last checkpoint and of the one that was best on validation; None and an absent key mean "not known", never 0.
"""

import json
import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pidistill.commands.sweep.cells import OF_THE_MACHINE
from pidistill.commands.sweep.groups import (
    PAIRED_COLUMNS,
    VIEWS,
    Group,
    Record,
    group_interval,
    groups_of,
    measured_view,
    paired_lines,
)
from pidistill.errors import escape_controls
from pidistill.jsonl import read_jsonl, write_jsonl

RESULTS = "results.jsonl"
ORDER = "arms.json"
KL_ROWS = 5  # the final KL is the mean over so many last steps, because a single step's is noisy
LEAKS = {"student": "leak_frac", "student greedy": "student_greedy_leak_frac"}  # view: its number in results.jsonl
OF_A_DOMAIN = "/student greedy"  # other rows of the evaluation (`domains`) are shown greedily
OF_A_KIND = "success/"  # results.json: success of the rows of one kind (`eval_kind_key`)


# ------------------------------------------------------------------------------------------- what a run left


def total(values: Sequence[float | None]) -> float | None:
    """Return the sum; None if there is nothing to add or if any part is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def run_numbers(folder: Path) -> Record:
    """Return steps, rounds, rollouts, tokens sampled and trained, and the final KL of one run, from its metrics.jsonl.

    Every step of a round repeats the round's numbers, so that those are counted once per round.
    """
    rows = read_jsonl(folder / "metrics.jsonl")
    rounds = {row["round"]: row for row in rows if "round" in row}
    rounds |= {("sampled", i): row for i, row in enumerate(rows) if "rollouts" in row and "round" not in row}
    tokens = total([_tokens_sampled(row) for row in rounds.values()])
    kls = [row["kl_teacher_student_nats"] for row in rows if "kl_teacher_student_nats" in row]
    return {
        "steps": max((row["step"] for row in rows), default=None),
        "rounds": len(rounds),
        "rollouts": total([row.get("rollouts") for row in rounds.values()]),
        "policy_tokens_sampled": None if tokens is None else round(tokens),
        # A run that only samples trains nothing.
        "policy_tokens_trained": sum(row["policy_tokens"] for row in rows if {"policy_tokens", "loss"} <= row.keys()),
        "kl_teacher_student_nats": statistics.fmean(kls[-KL_ROWS:]) if kls else None,
    }


def _tokens_sampled(row: Record) -> float | None:
    """Return the tokens sampled in one round. A row without a loss is of a run that only samples all its policy tokens."""
    if "sampled_tokens" in row:
        return row["sampled_tokens"]
    if "loss" not in row:
        return row.get("policy_tokens")
    if "rollouts" not in row or "completion_tokens_mean" not in row:
        return None
    return row["rollouts"] * row["completion_tokens_mean"]


def best_step(folder: Path, select: str) -> tuple[Record, int | None]:
    """Return ({metric, last, best, best_step} on validation, the step): the best among the steps that have a saved checkpoint.

    The latest is taken of several that are equally good.
    """
    values = [(row["step"], row[select]) for row in read_jsonl(folder / "metrics.jsonl") if select in row]
    saved = [(value, step) for step, value in values if (folder / f"step_{step}").is_dir()]
    best, step = max(saved, default=(None, None))
    return {"metric": select, "last": values[-1][1] if values else None, "best": best, "best_step": step}, step


def evaluation_numbers(folder: Path) -> Record:
    """Return held-out numbers from an evaluation's results.json; a view that was not sampled is absent."""
    views = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    numbers = {name: views[view]["success"] for view, name in VIEWS.items() if "success" in views.get(view, {})}
    numbers |= {
        f"{name}/{key.removeprefix(OF_A_KIND)}": value
        for view, name in VIEWS.items()
        for key, value in views.get(view, {}).items()
        if key.startswith(OF_A_KIND) and not (key.endswith("_interval") and isinstance(value, list))
    }
    numbers |= {name: views[view]["leak_frac"] for view, name in LEAKS.items() if "leak_frac" in views.get(view, {})}
    return numbers | {name: view["success"] for name, view in views.items() if name.endswith(OF_A_DOMAIN) and "success" in view}


def read_results(output_dir: Path) -> dict[str, Record]:
    """Return the last row of each cell, in the order of the sweep's arms."""
    rows = {row["cell"]: row for row in read_jsonl(output_dir / RESULTS)}
    path = output_dir / ORDER
    names = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    place = {name: i for i, name in enumerate(names)}
    return {row["cell"]: row for row in sorted(rows.values(), key=lambda row: place.get(row["arm"], len(names)))}


def write_order(output_dir: Path, names: Sequence[str]) -> None:
    (output_dir / ORDER).write_text(json.dumps(list(names), indent=1, ensure_ascii=False), encoding="utf-8")


def append_result(output_dir: Path, row: Record) -> None:
    write_jsonl(output_dir / RESULTS, [row])


# ------------------------------------------------------------------------------------------- tables


def mean_and_sd(group: Group, part: str, name: str) -> str:
    """Return `mean ± sd` (n − 1) of a number (see `Group.values`); the mean alone for one value, a dash for none."""
    values, mean = group.values(part, name), group.mean(part, name)
    if mean is None:
        return "–"
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def count(group: Group, name: str) -> str:
    """Return the mean of a count in short form."""
    mean = group.mean("", name)
    if mean is None:
        return "–"
    return f"{mean / 1e6:.2f}M" if mean >= 1e6 else f"{mean:,.0f}"


def interval_text(output_dir: Path, group: Group) -> str:
    interval, what = group_interval(output_dir, group)
    return "–" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}] {what}"


def between_bases(group: Group) -> str:
    """Return the standard deviation between the bases' mean successes; a dash where fewer than two bases have one."""
    means = [statistics.fmean(values) for part in group.by_base() if (values := part.success)]
    return f"{statistics.stdev(means):.3f} of {len(means)}" if len(means) > 1 else "–"


def success_columns(
    output_dir: Path, rows: Sequence[Record], domains: Sequence[str], shown: str
) -> dict[str, Callable[[Group], str]]:
    several_bases = any(row.get("base") for row in rows)
    several_metrics = len({row["select"] for row in rows}) > 1
    return {
        "arm": lambda g: g.title,
        "seeds": lambda g: f"{len(g.rows)}" + (f" ({g.failed} failed)" if g.failed else ""),
        "greedy": lambda g: mean_and_sd(g, "last", "student_greedy_success"),
        "sampled, last": lambda g: mean_and_sd(g, "last", "student_success"),
        **({"between bases": between_bases} if several_bases else {}),
        f"{shown}, 95% interval over": lambda g: interval_text(output_dir, g),
        f"{shown}, best on validation": lambda g: mean_and_sd(g, "best", VIEWS[g.view]),
        "with PI": lambda g: mean_and_sd(g, "last", VIEWS["student + PI" + g.view.removeprefix("student")]),
        **{f"{name.removesuffix(OF_A_DOMAIN)}, greedy": partial(_last_values, name=name) for name in domains},
        "leak rate": lambda g: mean_and_sd(g, "last", LEAKS[g.view]),
        "validation, last": lambda g: (
            mean_and_sd(g, "validation", "last") + (f" ({g.select})" if several_metrics and g.rows else "")
        ),
    }


def kind_columns(groups: Sequence[Group]) -> dict[str, Callable[[Group], str]]:
    """Return a column per kind of row (`eval_kind_key`), of the view that arms are measured by; none without kinds."""
    found = {
        name: name.partition("/")[2]
        for group in groups
        for row in group.rows
        for name in row.get("last") or {}
        if name.startswith(f"{VIEWS[group.view]}/")
    }
    if not found:
        return {}
    columns = {"kind arm" if kind == "arm" else kind: partial(_last_values, name=name) for name, kind in found.items()}
    return {"arm": lambda g: g.title, **columns}


def _last_values(group: Group, name: str) -> str:
    found = len(group.values("last", name))
    return mean_and_sd(group, "last", name) + (f" ({found} of {len(group.rows)})" if 0 < found < len(group.rows) else "")


def cost_columns() -> dict[str, Callable[[Group], str]]:
    return {
        "arm": lambda g: g.title,
        "steps": lambda g: count(g, "steps"),
        "rollouts": lambda g: count(g, "rollouts"),
        "tokens sampled": lambda g: count(g, "policy_tokens_sampled"),
        "tokens trained": lambda g: count(g, "policy_tokens_trained"),
        "CPU-s": lambda g: count(g, "cpu_seconds"),
        "kl(T‖S), nats": lambda g: mean_and_sd(g, "", "kl_teacher_student_nats"),
        "config": lambda g: " → ".join(map(config_text, g.rows[0]["stages"])) if g.rows else "–",
    }


NOT_THE_METHOD = {
    *("output_dir", "seed", "save_every_steps", "rollout_log_steps", "dataset.source", "checkpointer.checkpoint_dir"),
    "teacher_checkpointer.checkpoint_dir",
    *OF_THE_MACHINE,
}


def config_text(stage: Record) -> str:
    """Return a stage's config with the overrides of its method; folders, seeds and logging are left out."""
    words = [word for word in shlex.split(stage.get("command", "")) if "=" in word]
    own = [word for word in words if word.partition("=")[0] not in NOT_THE_METHOD]
    return " ".join([stage["config"], *own])


def notes(rows: Sequence[Record]) -> list[str]:
    """Return what a reader must know to read the tables."""
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    commits = sorted({str(stage["commit"]) for row in rows for stage in row["stages"]})
    selected = ", ".join(sorted({row["select"] for row in rows}))
    bases = list(dict.fromkeys(row["base"] for row in rows if row.get("base")))
    told = "`seeds` counts the runs from all of them, means are those of the bases' means, and the sd is that of all runs"
    of_bases = [f"Bases: {', '.join(bases)}; {told}."] if bases else []
    return [
        "Success without privileged information on the held-out split, greedy and sampled at the temperature of the "
        "evaluation's config; mean ± sd over seeds (no sd for one); `last` is the last checkpoint. "
        "`with PI` is the success of the same trained weights with the PI in the prompt, sampled or greedy as the intervals "
        "are; it can be lower than without PI where training made the model forget how to use it. "
        "`NAME, greedy` is of the rows that the evaluation's config names under `domains`; (n of m) runs have it.",
        f"Chosen on validation only: {selected}, among the checkpoints that the run saved. "
        "CPU-s: training, all stages, each with its start-up. An interval over few seeds is too narrow for what seeds do; "
        "one of tasks that are all right or all wrong has no width, and n alike still allow 3/n of the other; `clusters` are "
        "tasks that the evaluation's `eval_cluster_key` holds together. `(n of m tasks)`: evaluations lack some, such as "
        "lost rollouts; the interval or the comparison is of the n that all have, and means are of those that each has.",
        f"Seeds: {', '.join(map(str, seeds)) or 'as in the configs'}. Commits: {', '.join(commits) or '–'}.",
        *of_bases,
    ]


def best_on_validation(groups: Sequence[Group]) -> list[str]:
    """Return the sentence about the best last value of each validation metric that at least two lines have."""
    sentences = []
    for select in dict.fromkeys(row["select"] for group in groups for row in group.rows):
        own = [replace(group, rows=[row for row in group.rows if row["select"] == select]) for group in groups]
        scored = [(mean, group) for group in own if (mean := group.mean("validation", "last")) is not None]
        if len(scored) > 1:
            value, group = max(scored, key=lambda pair: pair[0])
            seeds = len(group.values("validation", "last"))
            over = f"mean over {seeds} seeds" if seeds > 1 else "1 seed"
            sentences.append(f"Best on validation ({select} at the last evaluation, {over}): {group.title}, {value:.3f}")
    return sentences


def not_compared(groups: Sequence[Group], reference: str, lines: Sequence[Sequence[str]], against: str | None) -> str | None:
    """Return the sentence about the arms that the comparison lacks; None where it lacks none, or where nobody asked for one."""
    missing = [group.title for group in groups if group.title not in {reference, *(line[0] for line in lines)}]
    if not missing or not (lines or against):
        return None
    return (
        f"Not compared with {reference or against}, for want of an evaluation of both on the same tasks: {', '.join(missing)}"
    )


def failures(rows: Sequence[Record]) -> list[str]:
    return [escape_controls(f"FAILED {row['cell']}: {row['error']}") for row in rows if row["status"] != "ok"]


def write_report(output_dir: Path, against: str | None = None) -> list[Record]:
    """Print the tables, write them to results.md, and return the rows behind them; ``against`` is an arm to compare with."""
    rows = list(read_results(output_dir).values())
    groups = groups_of(rows)
    domains = sorted({name for row in rows for name in row.get("last") or {} if name.endswith(OF_A_DOMAIN)})
    shown = "sampled" if measured_view(rows) == "student" else "greedy"
    columns = success_columns(output_dir, rows, domains, shown)
    kinds = kind_columns(groups)
    tables = {"Success": columns, **({f"Success by kind, {shown}": kinds} if kinds else {}), "Cost": cost_columns()}
    text = [f"# {output_dir.name}", ""]
    for title, columns in tables.items():
        cells = [[column(group) for column in columns.values()] for group in groups]
        _print(title, list(columns), cells)
        text += _markdown(list(columns), cells)
    reference, lines = paired_lines(output_dir, groups, against)
    if lines:
        title = f"Success {shown}, last, against {reference} on the same tasks"
        _print(title, PAIRED_COLUMNS, lines)
        text += [f"{title}:", "", *_markdown(PAIRED_COLUMNS, lines)]
    lacking = not_compared(groups, reference, lines, against)
    ending = [*best_on_validation(groups), *([lacking] if lacking else []), *failures(rows)]
    text += [line for note in [*notes(rows), *ending] for line in (note, "")]
    (output_dir / "results.md").write_text("\n".join(text), encoding="utf-8")
    for line in [*notes(rows)[2:], *ending]:
        print(line)
    return rows


def _print(title: str, headers: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    table = Table(title=Text(title, "table.title"))  # rich takes the [shuffled] of a str for markup
    for header in headers:
        table.add_column(Text(header), justify="left" if header in ("arm", "config") else "right", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console()
    # A pipe has no width; rich would take 80 columns, which break every cell in two.
    (console if console.is_terminal else Console(width=180)).print(table)


def _markdown(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [headers, *cells]]
    rule = "| " + " | ".join("---" if header in ("arm", "config") else "---:" for header in headers) + " |"
    return [lines[0], rule, *lines[1:], ""]


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
