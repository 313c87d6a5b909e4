"""Draw the pictures of a sweep from results.jsonl and the runs' metrics.jsonl: legible with two arms and with twenty-five."""

import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from pidistill.commands.sweep.groups import VIEWS, Group, Record, group_interval, groups_of, name_differences
from pidistill.commands.sweep.results import is_number
from pidistill.jsonl import read_jsonl

PANELS_FROM = 7  # from so many arms on, each gets a panel of its own
SHARE = re.compile(r"_(success|success_greedy|frac)$")  # a metric from 0 to 1
Curve = dict[int, float]


def draw(output_dir: Path, rows: Sequence[Record]) -> list[Path]:
    """Draw all pictures for which there are numbers; return their paths."""
    named = name_differences([group for group in groups_of(rows) if group.rows])
    groups = [replace(group, title=plain(group.title)) for group in named]
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


def plain(text: str) -> str:
    r"""Return text for a picture: matplotlib takes what stands between two `$` for a formula."""
    return text.replace("$", r"\$")


def selected(group: Group) -> str:
    return group.select


def label(groups: Sequence[Group], metric: Callable[[Group], str]) -> str:
    """Return the label of an axis: the groups' metrics, one in a line."""
    return plain("\nor ".join(dict.fromkeys(map(metric, groups))))


def titles(groups: Sequence[Group], metric: Callable[[Group], str]) -> list[str]:
    """Return the groups' titles, with their metrics where these differ."""
    several = len({metric(group) for group in groups}) > 1
    return [f"{group.title} ({plain(metric(group))})" if several else group.title for group in groups]


def are_shares(groups: Sequence[Group]) -> bool:
    """Return whether the validation metrics of all groups go from 0 to 1."""
    return all(SHARE.search(row["select"]) for group in groups for row in group.rows)


# ------------------------------------------------------------------------------------------- learning curves


def curve(output_dir: Path, row: Record) -> Curve:
    """Return the validation metric by optimiser step of a cell's last stage."""
    folder = output_dir / row["stages"][-1]["folder"]
    return {point["step"]: point[row["select"]] for point in read_jsonl(folder / "metrics.jsonl") if row["select"] in point}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean at the steps that all seeds have."""
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: statistics.fmean(one[step] for one in curves) for step in steps}


def curves_of_bases(output_dir: Path, group: Group) -> list[list[Curve]]:
    """Return the curves of each base that has any."""
    bases = [[curve(output_dir, row) for row in base.rows if row["stages"]] for base in group.by_base()]
    return [found for curves in bases if (found := [one for one in curves if one])]


def draw_curves(output_dir: Path, groups: Sequence[Group]):
    bases = [curves_of_bases(output_dir, group) for group in groups]
    groups, bases = [group for group, own in zip(groups, bases, strict=True) if own], [own for own in bases if own]
    if not groups:
        return None
    alone = len(groups) >= PANELS_FROM
    columns = min(5, len(groups)) if alone else 1
    lines = -(-len(groups) // columns) if alone else 1
    size = (3.0 * columns, 2.3 * lines) if alone else (7.5, 4.2)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=False, sharey=True, squeeze=False, layout="constrained")
    for i, (title, own) in enumerate(zip(titles(groups, selected), bases, strict=True)):
        axis, color = (axes.flat[i], "C0") if alone else (axes.flat[0], f"C{i}")
        for one in itertools.chain(*own):
            axis.plot(one.keys(), one.values(), color=color, alpha=0.3, linewidth=0.8)
        mean = mean_curve([mean_curve(curves) for curves in own])
        axis.plot(mean.keys(), mean.values(), color=color, linewidth=2, marker="o", markersize=3, label=title)
        if alone:
            axis.set_title(title, fontsize=8)
    for axis in axes.flat[len(groups) if alone else 1 :]:
        axis.set_visible(False)
    for axis in axes.flat:
        if are_shares(groups):
            axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    figure.supxlabel("optimiser step of the last stage", fontsize=9)
    figure.supylabel(f"{label(groups, selected)} (validation)", fontsize=9)
    if not alone:
        axes.flat[0].legend(fontsize=8)
    return figure


# ------------------------------------------------------------------------------------------- final numbers


def final_number(group: Group) -> tuple[str, str]:
    """Name the held-out success of the last checkpoints; where none was evaluated, the last value on validation."""
    return ("last", VIEWS[group.view]) if group.success else ("validation", "last")


def final_values(group: Group) -> list[float]:
    return group.values(*final_number(group))


def final_metric(group: Group) -> str:
    if not group.success:
        return f"{group.select} on validation, last evaluation"
    how = "sampled" if group.view == "student" else "greedy"
    return f"success without PI, {how}, held-out, last checkpoint"


def final_titles(groups: Sequence[Group]) -> list[str]:
    return titles(groups, lambda group: "held-out" if group.success else group.select)


def are_final_shares(groups: Sequence[Group]) -> bool:
    return are_shares([group for group in groups if not group.success])


def draw_success(output_dir: Path, groups: Sequence[Group]):
    """Draw horizontal bars with the 95% interval of the table, a dot per seed."""
    found = [group for group in groups if final_values(group)]
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.34 * len(found)), layout="constrained")
    for y, group in enumerate(found):
        values = final_values(group)
        axis.barh(y, group.mean(*final_number(group)), color="C0", alpha=0.55)
        axis.plot(values, [y] * len(values), "k.", markersize=4)
        interval, _ = group_interval(output_dir, group)
        if interval is not None:
            axis.plot(interval, [y, y], color="k", linewidth=1)
    axis.set_yticks(range(len(found)), final_titles(found), fontsize=8)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set_xlabel(label(found, final_metric), fontsize=9)
    if are_final_shares(found):
        axis.set_xlim(0, 1.02)
    axis.grid(alpha=0.3, axis="x")
    return figure


def kl_points(group: Group) -> list[tuple[float, float]]:
    """Return (final KL, final value) of each cell that has both."""
    cells = [replace(group, rows=[row]) for row in group.rows]
    numbers = [(cell.values("", "kl_teacher_student_nats"), cell.values(*final_number(group))) for cell in cells]
    return [(kl[0], value[0]) for kl, value in numbers if kl and value]


def draw_kl(groups: Sequence[Group]):
    """Draw one point per cell: what the teacher still tells the student, and what the student can do."""
    found = [group for group in groups if kl_points(group)]
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(8.5, max(4.0, 0.22 * len(found) + 1)), layout="constrained")
    for i, (group, title) in enumerate(zip(found, final_titles(found), strict=True)):
        marker = "osD^vPX*"[i // 10 % 8]  # ten colours are not enough for twenty-five arms
        axis.scatter(*zip(*kl_points(group), strict=True), color=f"C{i % 10}", marker=marker, label=title, s=28, alpha=0.85)
    if all(kl > 0 for group in found for kl, _ in kl_points(group)):
        axis.set_xscale("log")
    axis.set_xlabel("final kl(teacher||student), nats per token", fontsize=9)
    axis.set_ylabel(label(found, final_metric), fontsize=9)
    if are_final_shares(found):
        axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


# ------------------------------------------------------------------------------------------- two swept keys


def numeric_keys(groups: Sequence[Group]) -> list[str]:
    """Return the swept keys that all of these settings have as numbers, with at least two values."""
    keys = [key for key in groups[0].settings if all(is_number(group.settings.get(key, "")) for group in groups)]
    return [key for key in keys if len({float(group.settings[key]) for group in groups}) > 1]


def heat_table(groups: Sequence[Group], x: str, y: str) -> tuple[list[float], list[float], np.ndarray]:
    """Return (values of x, values of y, the mean [y, x] over groups of their means); NaN where there is no cell."""
    xs = sorted({float(group.settings[x]) for group in groups})
    ys = sorted({float(group.settings[y]) for group in groups})
    cells: dict[tuple[int, int], list[float]] = {}
    for group in groups:
        place = ys.index(float(group.settings[y])), xs.index(float(group.settings[x]))
        if (mean := group.mean(*final_number(group))) is not None:
            cells.setdefault(place, []).append(mean)
    table = np.full((len(ys), len(xs)), np.nan)
    for place, means in cells.items():
        table[place] = statistics.fmean(means)
    return xs, ys, table


def averaged(groups: Sequence[Group], x: str, y: str) -> str:
    """Name what a value of the heat map is a mean over: seeds, bases, and the other keys that were swept."""
    keys = [key for key in dict.fromkeys(key for group in groups for key in group.settings) if key not in (x, y)]
    swept = [key for key in keys if len({group.settings.get(key) for group in groups}) > 1]
    bases = {row.get("base") for group in groups for row in group.rows}
    return ", ".join(["seeds", *(["bases"] if len(bases) > 1 else []), *swept])


def draw_heat_maps(groups: Sequence[Group]):
    """Draw the first two swept numeric keys against each other, one map per arm."""
    arms: dict[str, list[Group]] = {}
    for group in groups:
        if group.settings and final_values(group):
            arms.setdefault(group.arm, []).append(group)
    arms = {arm: members for arm, members in arms.items() if len(numeric_keys(members)) >= 2}
    if not arms:
        return None
    figure, axes = plt.subplots(1, len(arms), figsize=(5.2 * len(arms), 4.2), squeeze=False, layout="constrained")
    for axis, (arm, members) in zip(axes.flat, arms.items(), strict=True):
        x, y = numeric_keys(members)[:2]
        xs, ys, table = heat_table(members, x, y)
        # A search over ranges has hardly two trials that share a value.
        draw_map = _scatter_map if np.isnan(table).mean() > 0.5 else _heat_map
        norm = Normalize(0, 1) if are_final_shares(members) else Normalize()
        figure.colorbar(draw_map(axis, xs, ys, table, norm), ax=axis)
        caption = f"{label(members, final_metric)},\nmean over {plain(averaged(members, x, y))}"
        axis.set(xlabel=plain(x), ylabel=plain(y))
        axis.set_title(f"{plain(arm)}\n{caption}", fontsize=8)
    return figure


def _scatter_map(axis: Axes, xs: Sequence[float], ys: Sequence[float], table: np.ndarray, norm: Normalize) -> ScalarMappable:
    rows, columns = np.nonzero(~np.isnan(table))
    return axis.scatter(np.asarray(xs)[columns], np.asarray(ys)[rows], c=table[rows, columns], norm=norm, s=45)


def _heat_map(axis: Axes, xs: Sequence[float], ys: Sequence[float], table: np.ndarray, norm: Normalize) -> ScalarMappable:
    image = axis.imshow(table, norm=norm, aspect="auto", origin="lower")
    axis.set_xticks(range(len(xs)), [f"{value:g}" for value in xs], rotation=45 if len(xs) > 8 else 0)
    axis.set_yticks(range(len(ys)), [f"{value:g}" for value in ys])
    if table.size <= 100:
        for (j, i), value in np.ndenumerate(table):
            if not np.isnan(value):
                color = "w" if norm(value) < 0.6 else "k"
                axis.text(i, j, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    return image
