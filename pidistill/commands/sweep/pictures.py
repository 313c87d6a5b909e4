"""Draw the pictures of a sweep from results.jsonl and the runs' metrics.jsonl: legible with two arms and with twenty-five."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from pidistill.commands.sweep.groups import Group, Record, group_interval, groups_of, name_differences
from pidistill.commands.sweep.results import is_number
from pidistill.jsonl import read_jsonl

PANELS_FROM = 7  # from so many arms on, each gets a panel of its own
Curve = dict[int, float]


def draw(output_dir: Path, rows: Sequence[Record]) -> list[Path]:
    """Draw all pictures for which there are numbers; return their paths."""
    groups = name_differences([group for group in groups_of(rows) if group.rows])
    figures = {
        "curves.png": draw_curves(output_dir, groups),
        "success.png": draw_success(output_dir, groups),
        "kl_success.png": draw_kl(groups),
        "heatmap.png": draw_heat_maps(groups),
    }
    paths = []
    for name, figure in figures.items():
        (output_dir / name).unlink(missing_ok=True)  # one of an earlier report would be of other rows
        if figure is not None:
            figure.savefig(output_dir / name, dpi=130)
            plt.close(figure)
            paths.append(output_dir / name)
    return paths


# ------------------------------------------------------------------------------------------- learning curves


def curve(output_dir: Path, row: Record) -> Curve:
    """Return validation success by optimiser step of a cell's last stage."""
    folder = output_dir / row["stages"][-1]["folder"]
    return {point["step"]: point[row["select"]] for point in read_jsonl(folder / "metrics.jsonl") if row["select"] in point}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean at the steps that all seeds have."""
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: statistics.fmean(one[step] for one in curves) for step in steps}


def draw_curves(output_dir: Path, groups: Sequence[Group]):
    found = [(group, [c for row in group.rows if row["stages"] and (c := curve(output_dir, row))]) for group in groups]
    found = [(group, curves) for group, curves in found if curves]
    if not found:
        return None
    alone = len(found) >= PANELS_FROM
    columns = min(5, len(found)) if alone else 1
    lines = -(-len(found) // columns) if alone else 1
    size = (3.0 * columns, 2.3 * lines) if alone else (7.5, 4.2)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=False, sharey=True, squeeze=False, layout="constrained")
    for i, (group, curves) in enumerate(found):
        axis, color = (axes.flat[i], "C0") if alone else (axes.flat[0], f"C{i}")
        for one in curves:
            axis.plot(one.keys(), one.values(), color=color, alpha=0.3, linewidth=0.8)
        mean = mean_curve(curves)
        axis.plot(mean.keys(), mean.values(), color=color, linewidth=2, marker="o", markersize=3, label=group.title)
        if alone:
            axis.set_title(group.title, fontsize=8)
    for axis in axes.flat[len(found) if alone else 1 :]:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    figure.supxlabel("optimiser step of the last stage", fontsize=9)
    figure.supylabel(f"{found[0][0].rows[0]['select']} (validation)", fontsize=9)
    if not alone:
        axes.flat[0].legend(fontsize=8)
    return figure


# ------------------------------------------------------------------------------------------- final numbers


def final_values(group: Group) -> list[float]:
    """Return the held-out success of the last checkpoints; where none was evaluated, the last one on validation."""
    return group.success or group.values("validation", "last")


def final_label(groups: Sequence[Group]) -> str:
    held_out = [bool(group.success) for group in groups]
    if all(held_out):
        how = "sampled" if groups[0].view == "student" else "greedy"
        return f"success without PI, {how}, held-out, last checkpoint"
    return "success without PI, last checkpoint (" + ("some " if any(held_out) else "") + "on validation)"


def draw_success(output_dir: Path, groups: Sequence[Group]):
    """Draw horizontal bars with the 95% interval of the table, a dot per seed."""
    found = [group for group in groups if final_values(group)]
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.34 * len(found)), layout="constrained")
    for y, group in enumerate(found):
        values = final_values(group)
        mean = statistics.fmean(values)
        axis.barh(y, mean, color="C0", alpha=0.55)
        axis.plot(values, [y] * len(values), "k.", markersize=4)
        interval, _ = group_interval(output_dir, group)
        if interval is not None:
            axis.plot(interval, [y, y], color="k", linewidth=1)
    axis.set_yticks(range(len(found)), [group.title for group in found], fontsize=8)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.02), xlabel=final_label(found))
    axis.grid(alpha=0.3, axis="x")
    return figure


def draw_kl(groups: Sequence[Group]):
    """Draw one point per cell: what the teacher still tells the student, and what the student can do."""
    points = [
        (group.title, row["kl_teacher_student_nats"], success[0])
        for group in groups
        for row in group.rows
        if row.get("kl_teacher_student_nats") is not None and (success := final_values(replace(group, rows=[row])))
    ]
    if not points:
        return None
    titles = list(dict.fromkeys(title for title, _, _ in points))
    figure, axis = plt.subplots(figsize=(8.5, max(4.0, 0.22 * len(titles) + 1)), layout="constrained")
    for i, title in enumerate(titles):
        own = [(kl, success) for name, kl, success in points if name == title]
        marker = "osD^vPX*"[i // 10 % 8]  # ten colours are not enough for twenty-five arms
        axis.scatter(*zip(*own, strict=True), color=f"C{i % 10}", marker=marker, label=title, s=28, alpha=0.85)
    if all(kl > 0 for _, kl, _ in points):
        axis.set_xscale("log")
    axis.set(xlabel="final kl(teacher||student), nats per token", ylabel=final_label(groups), ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


# ------------------------------------------------------------------------------------------- two swept keys


def numeric_keys(groups: Sequence[Group]) -> list[str]:
    """Return the swept keys that all of these settings have as numbers, with at least two values."""
    keys = [key for key in groups[0].settings if all(is_number(group.settings.get(key, "")) for group in groups)]
    return [key for key in keys if len({float(group.settings[key]) for group in groups}) > 1]


def heat_table(groups: Sequence[Group], x: str, y: str) -> tuple[list[float], list[float], np.ndarray]:
    """Return (values of x, values of y, mean success [y, x]) over seeds and over any other key; NaN where there is no cell."""
    xs = sorted({float(group.settings[x]) for group in groups})
    ys = sorted({float(group.settings[y]) for group in groups})
    cells: dict[tuple[int, int], list[float]] = {}
    for group in groups:
        place = ys.index(float(group.settings[y])), xs.index(float(group.settings[x]))
        cells.setdefault(place, []).extend(final_values(group))
    table = np.full((len(ys), len(xs)), np.nan)
    for place, values in cells.items():
        if values:
            table[place] = statistics.fmean(values)
    return xs, ys, table


def draw_heat_maps(groups: Sequence[Group]):
    """Draw the first two swept numeric keys against each other, one map per arm."""
    arms: dict[str, list[Group]] = {}
    for group in groups:
        if group.settings:
            arms.setdefault(group.arm, []).append(group)
    arms = {arm: members for arm, members in arms.items() if len(numeric_keys(members)) >= 2}
    if not arms:
        return None
    figure, axes = plt.subplots(1, len(arms), figsize=(5.2 * len(arms), 4.2), squeeze=False, layout="constrained")
    for axis, (arm, members) in zip(axes.flat, arms.items(), strict=True):
        x, y = numeric_keys(members)[:2]
        xs, ys, table = heat_table(members, x, y)
        if np.isnan(table).mean() > 0.5:  # a search over ranges: hardly two trials share a value
            _scatter_map(axis, xs, ys, table)
        else:
            _heat_map(axis, xs, ys, table)
        axis.set(xlabel=x, ylabel=y, title=arm)
    figure.suptitle(f"{final_label(groups)}, mean over seeds", fontsize=9)
    return figure


def _scatter_map(axis: Axes, xs: Sequence[float], ys: Sequence[float], table: np.ndarray) -> None:
    rows, columns = np.nonzero(~np.isnan(table))
    values = table[rows, columns]
    points = axis.scatter(np.asarray(xs)[columns], np.asarray(ys)[rows], c=values, vmin=0, vmax=1, cmap="viridis", s=45)
    axis.figure.colorbar(points, ax=axis)


def _heat_map(axis: Axes, xs: Sequence[float], ys: Sequence[float], table: np.ndarray) -> None:
    axis.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    axis.set_xticks(range(len(xs)), [f"{value:g}" for value in xs], rotation=45 if len(xs) > 8 else 0)
    axis.set_yticks(range(len(ys)), [f"{value:g}" for value in ys])
    if table.size <= 100:
        for (j, i), value in np.ndenumerate(table):
            if not np.isnan(value):
                axis.text(i, j, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k", fontsize=8)
