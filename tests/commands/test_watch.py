"""`pidistill watch`: what the terminal shows of a run, and what the served page answers."""

import http.client
import json
import threading

import pytest
from rich.console import Console

from pidistill.commands.report.read import read_metrics
from pidistill.commands.watch import complete, curve, main, make_server, seconds_left, version_of, view
from pidistill.errors import InputError
from tests.support.reported_runs import metrics_rows, write_rows, write_run


def shown(run):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view(run))
    return console.export_text()


def test_the_terminal_shows_step_numbers_alarms_and_the_end(tmp_path):
    run = read_metrics(write_run(tmp_path / "run"), "run")
    text = shown(run)
    assert "step 6 of 6 · complete" in text and complete(run)
    assert "reward_mean" in text and "0.6" in text and "truncated: step 3: all are cut" in text


def test_the_time_left_is_steps_left_times_seconds_of_a_step(tmp_path):
    rows = [row | {"time_score_s": 1.0, "time_update_s": 2.0, "time_rollout_s": 4.0} for row in metrics_rows(3)[1:]]
    write_rows(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "config.yaml").write_text("max_steps: 13\n")
    run = read_metrics(tmp_path, "run")
    assert seconds_left(run) == pytest.approx(70.0) and not complete(run)
    assert "step 3 of 13 · about 0:01:10 left" in shown(run)


def test_the_time_left_of_more_than_a_day_names_the_days(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [{"step": step, "time_update_s": 60.0} for step in range(1, 101)])
    (tmp_path / "config.yaml").write_text("max_steps: 2000\n")
    assert "about 1 day, 7:40:00 left" in shown(read_metrics(tmp_path, "run"))


def test_a_run_without_a_step_is_shown(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [])
    assert "no step yet" in shown(read_metrics(tmp_path, "run"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0], "▁"), ([1.0, 1.0], "▁▁"), ([0.0, 7.0], "▁█"), ([0, 0, 7, 7], "▁▁██"), ([3, 2, 1, 0], "█▆▃▁")],
)
def test_a_curve_runs_from_the_least_to_the_most(values, expected):
    assert curve(values) == expected


def test_a_long_curve_shows_means_of_equal_stretches():
    assert curve([0.0] * 50 + [1.0] * 50, width=4) == "▁▁██"


def test_once_prints_and_ends(tmp_path, capsys):
    main([str(write_run(tmp_path / "run")), "--once"])
    assert "reward_mean" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["absent"], ["absent", "--serve"], ["absent", "--every", "0"]])
def test_a_wrong_folder_or_interval_is_one_sentence(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")


@pytest.fixture
def ask(tmp_path):
    folder = write_run(tmp_path / "run")
    server = make_server(folder, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def get(path, host="localhost"):
        connection = http.client.HTTPConnection(*server.server_address, timeout=20)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    get.folder, get.address = folder, server.server_address[0]
    yield get
    server.shutdown()
    server.server_close()


def test_the_served_page_knows_its_version_and_a_new_row_changes_it(ask):
    assert ask.address == "127.0.0.1"
    _, before = ask("/version")
    status, page = ask("/")
    assert status == 200 and f'"live":{json.dumps(before)}' in page
    with (ask.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0.125}\n')
    _, after = ask("/version")
    assert after != before and "0.125" in ask("/")[1]


@pytest.mark.parametrize("name", ["results.json", "test/results.json"])
def test_an_evaluation_changes_the_version(name, ask):
    _, before = ask("/version")
    (ask.folder / name).parent.mkdir(exist_ok=True)
    (ask.folder / name).write_text('{"student": {"success": 0.375}}')
    assert ask("/version")[1] != before and "0.375" in ask("/")[1]


def test_a_finished_cell_changes_the_version_of_a_sweep(tmp_path):
    rows = [{"cell": name, "title": name, "stages": [{"folder": name}]} for name in ("first", "second")]
    for row in rows:
        write_run(tmp_path / row["cell"])
    write_rows(tmp_path / "results.jsonl", rows[:1])
    before = version_of(tmp_path)
    write_rows(tmp_path / "results.jsonl", rows)
    assert version_of(tmp_path) != before


def test_another_path_and_another_host_get_nothing(ask):
    assert ask("/config.yaml")[0] == ask("/../run/config.yaml")[0] == 404
    assert ask("/", host="evil.example:80")[0] == 403


def test_a_port_that_is_taken_is_said_in_one_sentence(tmp_path):
    folder = write_run(tmp_path / "run")
    with make_server(folder, 0) as server, pytest.raises(InputError, match="cannot be used .* another port"):
        make_server(folder, server.server_address[1])
