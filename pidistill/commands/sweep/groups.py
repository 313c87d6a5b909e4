"""Group cells that differ by seed and base, and say how sure their success is: alone, and against another group."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pidistill.errors import escape_controls
from pidistill.training.evaluation import bootstrap_interval

BOOTSTRAP_SAMPLES = 4000
PAIRED_COLUMNS = ["arm", "difference", "95% interval over", "higher / lower in", "p, sign test"]
Record = dict[str, Any]
# The views of an evaluation that a table shows, and their numbers in results.jsonl.
VIEWS = {
    "student greedy": "student_greedy_success",
    "student": "student_success",
    "student + PI": "student_with_pi_success",
    "student + PI greedy": "student_with_pi_greedy_success",
}


@dataclass(frozen=True)
class Group:
    """Hold one line of the table: the cells of an arm with the same swept values, one per seed and base."""

    title: str
    arm: str
    settings: Mapping[str, str]
    rows: list[Record]  # those that ended well
    failed: int
    view: str = "student"  # of which intervals, comparisons and pictures are

    @property
    def success(self) -> list[float]:
        """Return the held-out success of each cell's last checkpoint in ``view``, of the cells that have it."""
        return self.values("last", VIEWS[self.view])

    def values(self, part: str, name: str) -> list[float]:
        """Return one number per cell that has it; ``part`` is last, best, validation, or "" for the row itself."""
        nodes = [(row.get(part) if part else row) or {} for row in self.rows]
        return [node[name] for node in nodes if node.get(name) is not None]

    def mean(self, part: str, name: str) -> float | None:
        """Return the mean over bases of their means over cells; None where no cell has the number."""
        means = [statistics.fmean(values) for base in self.by_base() if (values := base.values(part, name))]
        return statistics.fmean(means) if means else None

    @property
    def select(self) -> str:
        """Return the validation metric of the cells; several where they were run with several."""
        return " or ".join(dict.fromkeys(row["select"] for row in self.rows))

    def by_base(self) -> list["Group"]:
        """Return one group per base; this group alone where the sweep has one base."""
        bases = list(dict.fromkeys(row.get("base") for row in self.rows))
        return [replace(self, rows=[row for row in self.rows if row.get("base") == base]) for base in bases]


def groups_of(rows: Sequence[Record]) -> list[Group]:
    found: dict[str, list[Record]] = {}
    for row in name_arms(count_once(rows)):
        found.setdefault(json.dumps([row["arm"], row["settings"]], sort_keys=True), []).append(row)
    groups, view = [], measured_view(rows)
    for members in found.values():
        first, good = members[0], [row for row in members if row["status"] == "ok"]
        title = escape_controls(" ".join([first["title"], *(f"{key}={value}" for key, value in first["settings"].items())]))
        groups.append(Group(title, first["arm"], first["settings"], good, len(members) - len(good), view))
    return groups


def measured_view(rows: Sequence[Record]) -> str:
    """Return the view that arms are measured by: samples, or the greedy answers where the evaluations have no samples."""
    have = {view for row in rows for view, name in VIEWS.items() if (row.get("last") or {}).get(name) is not None}
    return "student greedy" if "student" not in have and "student greedy" in have else "student"


def count_once(rows: Sequence[Record]) -> list[Record]:
    """Return the rows without those of a lone base that is one of several in a later command on the folder: the same runs."""
    of_bases = {(row["arm"], row.get("fingerprint")) for row in rows if row.get("base")}
    return [row for row in rows if row.get("base") or (row["arm"], row.get("fingerprint")) not in of_bases]


def name_arms(rows: Sequence[Record]) -> list[Record]:
    """Return the rows with the arm's name behind each title that several arms have."""
    arms: dict[str, set[str]] = {}
    for row in rows:
        arms.setdefault(row["title"], set()).add(row["arm"])
    return [row | {"title": f"{row['title']} ({row['arm']})"} if len(arms[row["title"]]) > 1 else row for row in rows]


def name_differences(groups: Sequence[Group]) -> list[Group]:
    """Return the groups with short titles, for pictures.

    Settings that all share are left out, keys are their last word where no other key ends with it, and the title of the arm is
    left out where there is one arm alone.
    """
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    shown = [key for key in keys if len({group.settings.get(key) for group in groups}) > 1]
    ends = [key.rpartition(".")[2] for key in shown]
    names = {key: end if ends.count(end) == 1 else key for key, end in zip(shown, ends, strict=True)}
    one_arm = len({group.arm for group in groups}) == 1 and bool(shown)
    titles = []
    for group in groups:
        settings = [f"{names[key]}={group.settings[key]}" for key in shown if key in group.settings]
        title = group.rows[0]["title"] if group.rows else group.arm
        titles.append(escape_controls(" ".join(settings if one_arm and settings else [title, *settings])))
    return [replace(group, title=title) for group, title in zip(groups, titles, strict=True)]


@dataclass(frozen=True)
class Evaluation:
    """Hold success in the view of a group, of one checkpoint: its mean and, where `rows.json` has them, that of each task."""

    mean: float
    tasks: Mapping[str, float]
    clusters: Mapping[str, str]  # of each task, where the evaluation has `eval_cluster_key`
    prompts: Mapping[str, str]  # a digest of what each task asks; evaluations of older versions have none


@dataclass(frozen=True)
class SharedTasks:
    """Hold the tasks that several evaluations have."""

    names: list[str]
    clusters: list[str] | None
    known: int  # tasks that any of the evaluations has

    def values(self, evaluations: Sequence[Evaluation]) -> list[list[float]]:
        """Return success, [evaluation][task]."""
        return [[one.tasks[name] for name in self.names] for one in evaluations]


def read_evaluations(output_dir: Path, group: Group) -> list[Evaluation]:
    name = VIEWS[group.view]
    found = []
    for row in group.rows:
        last = row.get("last") or {}
        if last.get(name) is not None:
            path = output_dir / last.get("folder", "") / "rows.json"
            file = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            found.append(Evaluation(last[name], file.get(group.view, {}), file.get("clusters", {}), file.get("prompts", {})))
    return found


def shared_tasks(evaluations: Sequence[Evaluation]) -> SharedTasks | None:
    """Return the tasks that all evaluations have; None if they are at most half of all tasks, or ask other things somewhere."""
    if not evaluations:
        return None
    first, known = evaluations[0], {name for one in evaluations for name in one.tasks}
    names = [name for name in first.tasks if all(name in one.tasks for one in evaluations)]
    asked = [{one.prompts[name] for one in evaluations if name in one.prompts} for name in names]
    if 2 * len(names) <= len(known) or any(len(prompts) > 1 for prompts in asked):
        return None
    return SharedTasks(names, [first.clusters[name] for name in names] if first.clusters else None, len(known))


def _evaluations_by_base(output_dir: Path, group: Group) -> dict[str | None, list[Evaluation]]:
    """Return the evaluations of each base that has any."""
    found = {part.rows[0].get("base"): read_evaluations(output_dir, part) for part in group.by_base()}
    return {base: evaluations for base, evaluations in found.items() if evaluations}


def group_interval(output_dir: Path, group: Group) -> tuple[tuple[float, float] | None, str]:
    """Return the interval of the last checkpoint's held-out success in the group's view, and what was resampled.

    Of several bases their means over seeds are resampled: seeds of one base are more alike than bases are.
    """
    bases = list(_evaluations_by_base(output_dir, group).values())
    across = len(bases) > 1
    shared = shared_tasks([one for base in bases for one in base])
    tables = [shared.values(base) if shared else [[one.mean] for one in base] for base in bases]
    units = [_column_means(table) for table in tables] if across else [row for table in tables for row in table]
    clusters = shared.clusters if shared else None
    has_tasks = bool(units) and len(set(clusters or range(len(units[0])))) > 1
    enough = len(units) > 1 or has_tasks  # one number has no spread to resample
    interval = bootstrap_interval(units, seed=0, resamples=BOOTSTRAP_SAMPLES, clusters=clusters) if enough else None
    return interval, _resampled(across, len(units) > 1 or not has_tasks, has_tasks, shared)


def _resampled(across: bool, units: bool, tasks: bool, shared: SharedTasks | None) -> str:
    """Return what an interval resamples, such as `seeds × tasks`, and of how many tasks where evaluations lack some."""
    names = ["bases" if across else "seeds"] * units + ["clusters" if shared and shared.clusters else "tasks"] * tasks
    lacks = shared is not None and len(shared.names) < shared.known
    return " × ".join(names) + (f" ({len(shared.names)} of {shared.known} tasks)" if lacks else "")


def _column_means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


# ------------------------------------------------------------------------------------------- two arms on the same tasks


@dataclass(frozen=True)
class Difference:
    """Hold how much more success a group has than another one, on the same tasks in their view."""

    mean: float
    interval: tuple[float, float]
    resampled: str
    higher: int  # tasks, or clusters of tasks, in which the mean over seeds and bases is higher
    lower: int

    @property
    def sign_test(self) -> float:
        """Return the two-sided exact p of so uneven a split of ``higher`` and ``lower`` if both were equally likely."""
        n = self.higher + self.lower
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(self.higher, self.lower) + 1)) / 2**n)


def paired_difference(output_dir: Path, group: Group, other: Group) -> Difference | None:
    """Compare two groups on the tasks that all their evaluations have, of the bases that both have; None without such tasks."""
    own, others = _evaluations_by_base(output_dir, group), _evaluations_by_base(output_dir, other)
    bases = [base for base in own if base in others]
    shared = shared_tasks([one for base in bases for one in own[base] + others[base]])
    if shared is None or len(set(shared.clusters or shared.names)) < 2:
        return None
    pairs, across = [(shared.values(own[base]), shared.values(others[base])) for base in bases], len(bases) > 1
    differences = [_minus(_column_means(one), _column_means(two)) for one, two in pairs]
    values, minus = (differences, None) if across else pairs[0]
    interval = bootstrap_interval(values, 0, BOOTSTRAP_SAMPLES, clusters=shared.clusters, minus=minus)
    by_task, units = _column_means(differences), {}
    for cluster, value in zip(shared.clusters or shared.names, by_task, strict=True):
        units[cluster] = units.get(cluster, 0.0) + value
    signs = [round(value, 9) for value in units.values()]  # sums of the same shares in another order differ by rounding
    what = _resampled(across, across or any(len(table) > 1 for table in pairs[0]), True, shared)
    return Difference(statistics.fmean(by_task), interval, what, sum(v > 0 for v in signs), sum(v < 0 for v in signs))


def _minus(one: Sequence[float], two: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, two, strict=True)]


def paired_lines(output_dir: Path, groups: Sequence[Group], against: str | None) -> tuple[str, list[list[str]]]:
    """Return the title of the group that the others are compared with, and a line of `PAIRED_COLUMNS` for each other one.

    It is the first group of the arm ``against``, of any arm without one, of which the tasks are known.
    """
    named = [group for group in groups if group.arm == (against or group.arm)]
    known = [group for group in named if shared_tasks(read_evaluations(output_dir, group))]
    if not known:
        return "", []
    found = [(group.title, paired_difference(output_dir, group, known[0])) for group in groups if group is not known[0]]
    return known[0].title, [_paired_line(title, one) for title, one in found if one]


def _paired_line(title: str, found: Difference) -> list[str]:
    units = "clusters" if "clusters" in found.resampled else "tasks"
    interval = f"[{found.interval[0]:+.3f}, {found.interval[1]:+.3f}] {found.resampled}"
    return [title, f"{found.mean:+.3f}", interval, f"{found.higher} / {found.lower} {units}", f"{found.sign_test:.2g}"]
