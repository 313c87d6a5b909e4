"""Test the tables, sentences and pictures of a sweep where arms differ in metric, title, number of runs or judged tasks."""

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from pidistill.commands.sweep.groups import group_interval, groups_of, name_differences, paired_difference
from pidistill.commands.sweep.pictures import draw, draw_curves, draw_heat_maps, draw_kl, draw_success, mean_curve
from pidistill.commands.sweep.results import best_on_validation, mean_and_sd, write_report
from pidistill.jsonl import write_jsonl
from pidistill.training.evaluation import bootstrap_interval

SUCCESS, REWARD = "eval_student_success", "eval_student_reward_mean"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def row(arm: str, seed: int = 0, validation: float | None = None, select: str = SUCCESS, **more) -> dict:
    made = {"cell": f"{arm} {seed} {more.get('settings')}", "arm": arm, "title": arm, "seed": seed, "settings": {}}
    made |= {"status": "ok", "select": select, "stages": [], "config": "c", "validation": {"last": validation}}
    return made | more


def held_out(success: float, **more) -> dict:
    return {"last": {"student_success": success, **more}}


def trained(output_dir: Path, arm: str, validation: float, select: str = SUCCESS, **more) -> dict:
    (output_dir / arm).mkdir(exist_ok=True)
    write_jsonl(output_dir / arm / "metrics.jsonl", [{"step": step, select: step * validation} for step in (0, 1)])
    return row(arm, validation=validation, select=select, stages=[{"folder": arm, "config": "c", "commit": "abc"}], **more)


def judged(output_dir: Path, arm: str, seed: int, tasks: Mapping[str, float], **more) -> dict:
    folder = output_dir / f"{arm}{seed}{more.get('base', '')}"
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps({"student": tasks}))
    return row(arm, seed, **held_out(sum(tasks.values()) / len(tasks), folder=folder.name), **more)


def written(output_dir: Path, rows: list[dict]) -> str:
    write_jsonl(output_dir / "results.jsonl", rows)
    write_report(output_dir)
    return (output_dir / "results.md").read_text()


# ------------------------------------------------------------------------------------------- metrics


def test_the_best_on_validation_is_said_of_each_metric_with_the_number_of_its_values():
    rows = [row("a", 0, 0.9), row("a", 1), row("b", 0, 0.7), row("b", 1, 0.8), row("r", 0, 7.5, REWARD)]
    first = f"Best on validation ({SUCCESS} at the last evaluation, 1 seed): a, 0.900"
    assert best_on_validation(groups_of(rows)) == [first], "one line with a reward is the best of nothing"
    rows += [row("s", 0, 8.0, REWARD), row("s", 1, 9.0, REWARD)]
    second = f"Best on validation ({REWARD} at the last evaluation, mean over 2 seeds): s, 8.500"
    assert best_on_validation(groups_of(rows)) == [first, second]


def test_the_table_says_what_the_column_with_pi_is_and_calls_it_no_ceiling(tmp_path):
    text = written(tmp_path, [row("a")])
    assert "`with PI` is the success of the same trained weights with the PI in the prompt, sampled or greedy as" in text
    assert "it can be lower than without PI where training made the model forget how to use it." in text
    assert "ceiling" not in text


def test_the_table_names_the_metric_of_each_arm_where_they_have_several(tmp_path):
    table = written(tmp_path, [row("a", 0, 0.9), row("r", 0, 7.5, REWARD)])
    assert f"| 0.900 ({SUCCESS}) |" in table and f"| 7.500 ({REWARD}) |" in table
    (tmp_path / "results.jsonl").unlink()
    assert "| 0.900 |" in written(tmp_path, [row("a", 0, 0.9)])


def test_pictures_name_the_metrics_of_arms_that_have_several(tmp_path):
    groups = groups_of([trained(tmp_path, "a", 0.5), trained(tmp_path, "r", -3.0, REWARD)])
    curves = draw_curves(tmp_path, groups)
    assert curves.get_supylabel() == f"{SUCCESS}\nor {REWARD} (validation)"
    legend = [text.get_text() for text in curves.axes[0].get_legend().get_texts()]
    assert legend == [f"a ({SUCCESS})", f"r ({REWARD})"]
    (bars,) = draw_success(tmp_path, groups).axes
    assert [label.get_text() for label in bars.get_yticklabels()] == legend


def test_a_picture_of_rewards_is_labelled_so_and_shows_all_of_them(tmp_path):
    more = {"kl_teacher_student_nats": 0.1}
    rows = [trained(tmp_path, arm, value, REWARD, **more) for arm, value in (("a", -3.0), ("b", 5.0))]
    groups = groups_of(rows)
    figures = draw_curves(tmp_path, groups), draw_success(tmp_path, groups), draw_kl(groups)
    ends = figures[0].axes[0].get_ylim(), figures[1].axes[0].get_xlim(), figures[2].axes[0].get_ylim()
    labels = figures[0].get_supylabel(), figures[1].axes[0].get_xlabel(), figures[2].axes[0].get_ylabel()
    for (low, high), label in zip(ends, labels, strict=True):
        assert low < -3.0 and high > 5.0 and REWARD in label and "success" not in label


def test_a_picture_of_shares_goes_from_0_to_1(tmp_path):
    groups = groups_of([trained(tmp_path, "a", 0.25, kl_teacher_student_nats=0.1), row("b", 0, **held_out(0.5))])
    assert draw_curves(tmp_path, groups).axes[0].get_ylim() == draw_kl(groups).axes[0].get_ylim() == (-0.02, 1.02)
    (bars,) = draw_success(tmp_path, groups).axes
    assert bars.get_xlim() == (0.0, 1.02)
    assert (
        bars.get_xlabel()
        == f"{SUCCESS} on validation, last evaluation\nor success without PI, sampled, held-out, last checkpoint"
    )


# ------------------------------------------------------------------------------------------- heat maps


def heat_rows(select: str = SUCCESS, **more) -> list[dict]:
    settings = [{"x": x, "y": y, "mode": mode} for mode in "pq" for x in "01" for y in "01"]
    return [row("a", 0, -3.0 + i, select, settings=own, **more) for i, own in enumerate(settings)]


def test_a_heat_map_names_all_that_it_is_a_mean_over():
    title = draw_heat_maps(groups_of(heat_rows())).axes[0].get_title()
    assert title == f"a\n{SUCCESS} on validation, last evaluation,\nmean over seeds, mode"
    rows = [one for base in ("one", "two") for one in heat_rows(base=base)[:4]]
    assert draw_heat_maps(groups_of(rows)).axes[0].get_title().endswith("mean over seeds, bases")


def test_the_colours_of_a_heat_map_are_those_of_its_values_unless_they_are_shares():
    for select, expected in ((SUCCESS, (0.0, 1.0)), (REWARD, (-1.0, 2.0))):  # -3 and 1, ..., 0 and 4 are averaged
        (image,) = draw_heat_maps(groups_of(heat_rows(select))).axes[0].images
        assert image.get_clim() == expected


# ------------------------------------------------------------------------------------------- titles


def test_brackets_in_titles_of_arms_and_kinds_are_shown_as_they_are(tmp_path, capsys):
    names = {"student_success": 0.5, "student_success/[easy]": 0.5, "student_success/[/x]": 0.25}
    rows = [
        judged(tmp_path, arm, 0, {"t0": 0.0, "t1": 1.0}, title=f"PI [{title}]") for arm, title in (("a", "none"), ("b", "/y"))
    ]
    for one in rows:
        one["last"] |= names
    table = written(tmp_path, rows)
    printed = capsys.readouterr().out
    assert "| arm | [easy] | [/x] |" in table
    for text in ("[easy]", "[/x]", "PI [/y]", "against PI [none] on the same tasks"):
        assert text in printed


def test_arms_with_the_same_title_are_told_apart_by_their_names(tmp_path):
    more = {"kl_teacher_student_nats": 0.1, "title": "same"}
    rows = [judged(tmp_path, arm, 0, {"t0": 0.0, "t1": 1.0}, **more) for arm in "ab"]
    rows += [row("c", 0, **held_out(0.5), **more), row("d", 0, title="other", **held_out(0.5))]
    groups = groups_of(rows)
    expected = ["same (a)", "same (b)", "same (c)", "other"]
    assert [group.title for group in groups] == [group.title for group in name_differences(groups)] == expected
    (axis,) = draw_kl(groups).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == expected[:3]
    assert "evaluation of both on the same tasks: same (c), other\n" in written(tmp_path, rows)


def test_dollar_signs_in_titles_and_settings_are_no_formula(tmp_path):
    settings = [{"x": str(x), "y$_{$": str(y)} for x in (0, 1) for y in (0, 1)]
    rows = [row("a $x_{$", i, 0.5, settings=own) for i, own in enumerate(settings)]
    rows += [
        trained(tmp_path, "b", 0.5, f"eval_reward/$_{{$ {i}", title="costs $x_{$", kl_teacher_student_nats=0.1) for i in (0, 1)
    ]
    assert [path.name for path in draw(tmp_path, rows)] == ["curves.png", "success.png", "kl_success.png", "heatmap.png"]


# ------------------------------------------------------------------------------------------- numbers of runs and tasks


def test_means_over_bases_with_unequal_numbers_of_runs_are_the_means_of_their_means(tmp_path):
    same = {f"t{i}": 0.5 for i in range(4)}
    rows = [judged(tmp_path, "a", seed, dict.fromkeys(same, 0.9), base="one") for seed in range(3)]
    rows += [judged(tmp_path, "a", 0, dict.fromkeys(same, 0.1), base="two")]
    rows += [judged(tmp_path, "b", 0, same, base=base) for base in ("one", "two")]
    arm, reference = groups_of(rows)
    assert mean_and_sd(arm, "last", "student_success") == "0.500 ± 0.400"
    assert paired_difference(tmp_path, arm, reference).mean == pytest.approx(0.0)
    assert "means are those of the bases' means" in written(tmp_path, rows)
    (bars,) = draw_success(tmp_path, [arm]).axes
    assert bars.patches[0].get_width() == pytest.approx(0.5)


def test_curves_over_bases_with_unequal_numbers_of_runs_are_the_means_of_their_means(tmp_path):
    runs = [("a0", 0.9, "one"), ("a1", 0.9, "one"), ("a2", 0.9, "one"), ("a3", 0.1, "two")]
    rows = [trained(tmp_path, folder, value, base=base) | {"arm": "a", "title": "a"} for folder, value, base in runs]
    *_, mean = draw_curves(tmp_path, groups_of(rows)).axes[0].lines
    assert list(mean.get_ydata()) == pytest.approx([0.0, 0.5])
    assert mean_curve([{0: 0.0}, {0: 1.0}]) == {0: 0.5}


TASKS = {f"t{i}": float(i % 2) for i in range(20)}
FEWER = {name: value for name, value in TASKS.items() if name != "t7"}


def test_an_evaluation_that_lost_a_task_leaves_the_others_of_its_arm_in_the_interval_and_the_comparison(tmp_path):
    rows = [judged(tmp_path, "a", seed, tasks) for seed, tasks in enumerate((TASKS, FEWER, TASKS))]
    rows += [judged(tmp_path, "b", 0, dict.fromkeys(TASKS, 0.0))]
    arm, reference = groups_of(rows)
    interval, what = group_interval(tmp_path, arm)
    assert interval == bootstrap_interval([list(FEWER.values())] * 3, 0, 4000) and what == "seeds × tasks (19 of 20 tasks)"
    found = paired_difference(tmp_path, arm, reference)
    assert (found.higher, found.lower, found.resampled) == (9, 0, what) and found.mean == pytest.approx(9 / 19)
    table = written(tmp_path, [*rows[3:], *rows[:3]])
    assert "seeds × tasks (19 of 20 tasks) | 9 / 0 tasks |" in table and "Not compared" not in table


def test_bases_of_which_each_lost_another_task_are_resampled_over_the_tasks_that_both_have(tmp_path):
    lost = {"one": "t1", "two": "t4"}
    kept = {base: {name: value for name, value in TASKS.items() if name != own} for base, own in lost.items()}
    rows = [judged(tmp_path, "a", 0, tasks, base=base) for base, tasks in kept.items()]
    interval, what = group_interval(tmp_path, groups_of(rows)[0])
    both = [value for name, value in TASKS.items() if name not in lost.values()]
    assert what == "bases × tasks (18 of 20 tasks)" and interval == bootstrap_interval([both, both], 0, 4000)


def test_evaluations_that_share_at_most_half_of_their_tasks_are_not_put_together(tmp_path):
    half = dict(list(TASKS.items())[:10])
    rows = [judged(tmp_path, arm, 0, tasks) for arm, tasks in (("a", TASKS), ("b", half))]
    assert paired_difference(tmp_path, *groups_of(rows)) is None
