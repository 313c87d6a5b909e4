"""`pidistill report`: what a page holds, that model text is text, that it is small, and which folders are refused."""

import base64
import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from pidistill.commands.main import main as pidistill
from pidistill.commands.report.command import write_report
from pidistill.errors import InputError
from tests.support.reported_runs import HOSTILE, VALUES, rollout_row, write_evaluation, write_rows, write_run


def page_of(*folders, **settings):
    return write_report([*folders], folders[0].parent / "page.html", **settings).read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def blob_of(page):
    return re.search(r'<script type="text/plain" id="blob">(.*?)</script>', page, re.DOTALL)[1]


def numbers_of(page, row):
    """Decode the tokens and columns of a rollout as the page does."""
    rollouts = data_of(page)["rollouts"]
    data = base64.b64decode(blob_of(page)[row["at"] : row["at"] + row["chars"]])
    size = rollouts["bits"] // 8
    ids = np.frombuffer(data[: row["count"] * size], dtype=f"<u{size}")
    rest = np.frombuffer(data[row["count"] * size :], dtype="<i2").reshape(len(row["names"]), row["logged"])
    return [rollouts["tokens"][i] for i in ids], dict(zip(row["names"], rest, strict=True))


def test_the_page_holds_the_numbers_of_the_run(tmp_path):
    data = data_of(page_of(write_run(tmp_path / "run")))
    (run,) = data["runs"]
    assert run["metrics"]["step"] == [0, 1, 2, 3, 4, 5, 6]
    assert run["metrics"]["reward_mean"] == [None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert run["alarms"] == [[3, "truncated", "step 3: all are cut"]]
    assert run["evaluations"]["student"]["success_interval"] == [0.1, 0.4] and run["evaluations"]["student"]["pass@2"] is None
    assert run["config"]["objective.beta"] == "1.0"
    assert [row["text"] for row in data["texts"]] == ["student says word", "teacher says word"]


def test_tokens_and_their_numbers_come_back_from_the_page(tmp_path):
    folder = write_run(tmp_path / "run")
    page = page_of(folder)
    for i, row in enumerate(data_of(page)["rollouts"]["rows"]):
        source = rollout_row(i % 6 + 1, i)
        tokens, columns = numbers_of(page, row)
        assert tokens == source["tokens"]
        # The sampled log-probs are not those of the view that sampled, so that they stay; the constant advantage is one number.
        assert set(columns) == set(VALUES) and row["advantage"] == 0.5
        for name in VALUES:
            assert columns[name] / 1000 == pytest.approx(source["values"][name], abs=5.1e-4)
        assert row["runs"] == [3, 2, 3] and row["success"] == source["success"]
        texts = data_of(page)["rollouts"]["texts"]
        assert (texts[row["student"]], texts[row["pi"]]) == (source["student_prompt"], source["privileged"])


def test_what_the_teacher_reads_at_a_turn_is_in_the_page_with_its_place(tmp_path):
    reads = [{"at": 3, "text": "word3 \x1b the hint word4 "}]
    write_rows(tmp_path / "run" / "training_rollouts.jsonl", [rollout_row(1, 0) | {"teacher_reads": reads}, rollout_row(1, 1)])
    write_rows(tmp_path / "run" / "metrics.jsonl", [{"step": 1}])
    rollouts = data_of(page_of(tmp_path / "run"))["rollouts"]
    ((at, text),), none = (row["reads"] for row in rollouts["rows"])
    assert at == rollouts["rows"][0]["runs"][0] and rollouts["texts"][text] == "word3 \\x1b the hint word4 " and none == []


def test_values_that_are_missing_or_too_large_are_told_apart(tmp_path):
    row = rollout_row(1, 0)
    row["values"] = {"teacher_logprobs": [None, -99.0, 99.0, 0.0, -1.0, -2.0]}
    write_rows(tmp_path / "run" / "training_rollouts.jsonl", [row])
    write_rows(tmp_path / "run" / "metrics.jsonl", [{"step": 1}])
    page = page_of(tmp_path / "run")
    _, columns = numbers_of(page, data_of(page)["rollouts"]["rows"][0])
    assert columns["teacher_logprobs"].tolist() == [-32768, -32767, 32767, 0, -1000, -2000]


def test_the_log_prob_when_sampled_is_left_out_where_the_trainer_says_the_same(tmp_path):
    row = rollout_row(1, 0)
    row["values"]["sampled_logprobs"] = [value - 0.0004 for value in row["values"]["student_logprobs"]]
    write_rows(tmp_path / "run" / "training_rollouts.jsonl", [row])
    write_rows(tmp_path / "run" / "metrics.jsonl", [{"step": 1}])
    (kept,) = data_of(page_of(tmp_path / "run"))["rollouts"]["rows"]
    assert "sampled_logprobs" not in kept["names"] and "student_logprobs" in kept["names"]


def test_hostile_texts_are_shown_as_text(tmp_path):
    page = page_of(write_run(tmp_path / "run", text=HOSTILE))
    assert "<img" not in page and "alert(1)>" not in page
    assert page.count("</script>") == 4 and not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", page)
    tokens, _ = numbers_of(page, data_of(page)["rollouts"]["rows"][0])
    assert tokens[0].startswith(
        "</script><img src=x onerror=alert(1)> \\x1b[31m \\u202egnp.exe \\ud800 \\x00 &lt; {{ 7*7 }} 漢字"
    )


def test_a_folder_with_a_hostile_name_is_named_as_text(tmp_path):
    folder = write_run(tmp_path / "<b>run<")
    page = page_of(folder)
    assert "<b>run" not in page and "&lt;b&gt;run&lt;" in page


def test_the_page_asks_no_other_machine_for_anything(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert "default-src 'none'" in page
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:,"}
    assert not re.search(r"@import|url\(\s*['\"]?http", page)


def test_several_runs_show_where_their_configs_differ(tmp_path):
    data = data_of(page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", beta=0.5)))
    assert data["difference"] == {"objective.beta": ["1.0", "0.5"], "output_dir": [str(tmp_path / "a"), str(tmp_path / "b")]}
    assert {row["run"] for row in data["rollouts"]["rows"]} == {0, 1}


def test_an_evaluation_joins_the_run_whose_checkpoint_it_evaluated(tmp_path):
    run, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    evaluation = tmp_path / "evaluate"
    write_evaluation(evaluation, {"student greedy": {"success": 0.75}}, "../b/step_6", f"{other}/latest")
    first, second = data_of(page_of(run, other, evaluation))["runs"]
    assert "student greedy" not in first["evaluations"] and second["evaluations"]["student greedy"] == {"success": 0.75}


def test_evaluations_of_several_checkpoints_of_a_run_stand_side_by_side(tmp_path):
    run, folders = write_run(tmp_path / "a"), []
    for name, checkpoint, success in (("x", "step_6", 0.75), ("y", "step_2", 0.25), ("z", "step_6", 0.5)):
        folders.append(tmp_path / name)
        write_evaluation(folders[-1], {"student greedy": {"success": success}}, f"../a/{checkpoint}", f"{run}/latest")
    (only,) = data_of(page_of(run, *folders))["runs"]
    found = {view: row["success"] for view, row in only["evaluations"].items()}
    assert found == {"student": 0.25, "student greedy": 0.75, "student greedy, step_2": 0.25, "student greedy, z": 0.5}


def test_an_evaluation_of_other_weights_or_of_an_unknown_step_of_latest_is_named_so(tmp_path):
    run = write_run(tmp_path / "a")
    write_evaluation(run / "base_test", {"student": {"success": 0.125}}, "../../base/step_400")
    write_evaluation(run / "old", {"student": {"success": 0.5}}, config=f"{run}/latest")
    (only,) = data_of(page_of(run))["runs"]
    found = {view: row["success"] for view, row in only["evaluations"].items()}
    assert found == {"student": 0.25, "student, base/step_400": 0.125, "student, old, step not recorded": 0.5}


def test_a_sweep_stands_for_the_last_stages_of_its_cells(tmp_path):
    write_run(tmp_path / "cells" / "x")
    write_run(tmp_path / "cells" / "y")
    cell = {"title": "OPSD", "settings": {"objective.beta": "1"}}
    rows = [cell | {"cell": name, "seed": i, "stages": [{"folder": f"cells/{name}"}]} for i, name in enumerate("xy")]
    write_rows(tmp_path / "results.jsonl", [*rows, {"cell": "failed", "stages": []}])
    page = write_report([tmp_path])
    assert page == tmp_path / "report.html"
    names = [run["name"] for run in data_of(page.read_text())["runs"]]
    assert names == ["OPSD · objective.beta=1 · seed 0", "OPSD · objective.beta=1 · seed 1"]


def test_a_cell_of_a_sweep_is_named_with_its_base_and_that_it_failed(tmp_path):
    rows = []
    for base, status in (("one/latest", "ok"), ("two/latest", "failed")):
        folder = base.partition("/")[0]
        write_run(tmp_path / folder)
        stages = [{"folder": folder}]
        rows.append({"cell": folder, "title": "OPSD", "base": base, "seed": 0, "status": status, "stages": stages})
    write_rows(tmp_path / "results.jsonl", rows)
    names = [run["name"] for run in data_of(page_of(tmp_path))["runs"]]
    assert names == ["OPSD · base one/latest · seed 0", "OPSD · base two/latest · seed 0 · FAILED"]


def test_rollouts_beyond_the_limit_are_thinned_evenly(tmp_path):
    data = data_of(page_of(write_run(tmp_path / "run", rollouts=40), most_rollouts=10))
    assert [row["example"] for row in data["rollouts"]["rows"]] == [f"row {i}" for i in range(0, 40, 4)]
    assert data["logged"] == 40


def test_lines_that_are_being_written_or_damaged_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "training_rollouts.jsonl", "rollouts.jsonl"):
        with (folder / name).open("a") as file:
            file.write('[1]\nnot json\n{"step": 9, "rew')
    (folder / "config.yaml").write_text("a: [")
    data = data_of(page_of(folder))
    assert (
        data["runs"][0]["metrics"]["step"][-1] == 6 and len(data["rollouts"]["rows"]) == 8 and data["runs"][0]["config"] == {}
    )


def test_two_thousand_rollouts_of_five_hundred_tokens_would_stay_below_thirty_megabytes(tmp_path):
    """A fortieth of them; what the page holds besides is 0.1 MB."""
    page = page_of(write_run(tmp_path / "run", rollouts=50, tokens=500))
    assert len(data_of(page)["rollouts"]["rows"]) == 50 and len(page) < 30e6 / 40


def test_a_folder_that_holds_nothing_of_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"holds no metrics\.jsonl .* check the name"):
        write_report([tmp_path])
    with pytest.raises(InputError, match=r"holds no metrics\.jsonl"):
        write_report([tmp_path / "absent"])


def test_the_command_writes_the_page_into_the_folder_and_prints_its_path(tmp_path, capsys, monkeypatch):
    folder = write_run(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["pidistill", "report", str(folder)])
    pidistill()
    assert capsys.readouterr().out.strip() == str(folder / "report.html") and (folder / "report.html").is_file()


def test_a_full_disk_leaves_the_page_that_was_there(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run, page = write_run(tmp_path / "run"), tmp_path / "pages" / "page.html"
    page.parent.mkdir()
    page.write_text("the old page")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=r"page.html cannot be written \(No space left on device\)"):
        write_report([run], page)
    assert page.read_text() == "the old page" and os.listdir(page.parent) == ["page.html"]


def test_a_page_is_written_through_a_link_and_into_a_pipe(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "link.html").symlink_to("page.html")
    assert write_report([run], tmp_path / "link.html") == tmp_path / "link.html"
    assert (tmp_path / "link.html").is_symlink() and "<html" in (tmp_path / "page.html").read_text()
    assert write_report([run], Path("/dev/null")) == Path("/dev/null") and Path("/dev/null").is_char_device()


def test_a_page_that_cannot_be_written_is_said_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written .* --output"):
        write_report([write_run(tmp_path / "run")], tmp_path / "file" / "page.html")
