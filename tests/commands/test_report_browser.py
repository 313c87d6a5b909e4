"""The page of `pidistill report` in a browser: it opens without errors, filters and keys work, and a large one is quick."""

import shutil

import pytest

from pidistill.commands.report.command import write_report
from tests.support.reported_runs import HOSTILE, metrics_rows, rollout_row, write_rows, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium; install Debian's package chromium"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install 'pidistill[browser]'")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as player:
        opened = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # root needs the flag
        yield opened
        opened.close()


@pytest.fixture
def show(browser):
    """Open a page file at one of its tabs; an error or a request to elsewhere fails the test."""
    wrong = []

    def open_page(path, tab):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on(
            "request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:")) else None
        )
        page.goto(f"{path.as_uri()}#{tab}")
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    assert wrong == []


def listed(page):
    return page.locator("#list button").count()


def test_the_health_panel_draws_its_curves_and_alarms(show, tmp_path):
    page = show(write_report([write_run(tmp_path / "a"), write_run(tmp_path / "b")], tmp_path / "page.html"), "Health")
    titles = page.locator(".chart h3").all_inner_texts()
    assert {"Reward and success", "KL between the views", "Entropy", "Tokens per second", "Time by phase"} <= set(titles)
    assert page.locator(".chart canvas").count() == len(titles)
    assert page.locator(".alarm").count() == 2 and "step 3: all are cut" in page.locator(".alarm").first.inner_text()
    page.locator("#runs input").first.uncheck()
    assert page.locator(".alarm").count() == 1


@pytest.mark.parametrize("tab", ["Evaluations", "Texts", "Configuration"])
def test_every_other_page_opens(show, tmp_path, tab):
    page = show(write_report([write_run(tmp_path / "a"), write_run(tmp_path / "b", beta=2)], tmp_path / "page.html"), tab)
    expected = {"Evaluations": "0.25 [0.1, 0.4]", "Texts": "teacher says word", "Configuration": "objective.beta"}
    assert expected[tab] in page.inner_text("main")


def test_the_texts_of_an_evaluation_stand_side_by_side(show, tmp_path):
    rows = [{"view": view, "row": 0, "example": "row 0", "reward": 1.0, "text": f"{view} speaks"}
            for view in ("student greedy", "student + PI")]  # fmt: skip
    write_rows(tmp_path / "rollouts.jsonl", rows)
    (tmp_path / "results.json").write_text('{"student greedy": {"success": 1.0}}')
    page = show(write_report([tmp_path]), "Texts")
    assert page.locator("main .card").count() == 2 and "student + PI speaks" in page.inner_text("main")


def test_filters_keep_the_rollouts_that_they_name(show, tmp_path):
    page = show(write_report([write_run(tmp_path / "run", rollouts=24)]), "Rollouts")
    assert listed(page) == 24
    page.select_option("#f-leak", "yes")
    assert listed(page) == 6
    page.select_option("#f-leak", "")
    page.select_option("#f-cut", "no")
    assert listed(page) == 16
    page.select_option("#f-cut", "")
    page.fill("#f-low", "0.5")
    assert listed(page) == 12
    page.fill("#f-low", "")
    page.fill("#f-from", "3")
    page.fill("#f-to", "4")
    assert listed(page) == 8
    page.fill("#f-from", "")
    page.fill("#f-to", "")
    page.fill("#f-words", "hint 17")
    assert listed(page) == 1 and "row 17" in page.inner_text("#rollout")
    page.fill("#f-words", "no such words")
    assert "No rollout matches" in page.inner_text("#rollout")


def test_keys_go_to_the_next_and_the_last_rollout(show, tmp_path):
    page = show(write_report([write_run(tmp_path / "run")]), "Rollouts")
    first = page.inner_text("#rollout .chips b")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#rollout .chips b") != first
    page.keyboard.press("k")
    assert page.inner_text("#rollout .chips b") == first
    page.keyboard.press("1")
    page.wait_for_selector(".chart")


def test_a_token_shows_its_numbers_and_its_colour(show, tmp_path):
    page = show(write_report([write_run(tmp_path / "run")]), "Rollouts")
    token = page.locator(".tokens span[data-index='1']").first
    token.hover()
    tip = page.inner_text("#tip")
    # Row 0, token 1: the student's log-prob is -0.001 · 2 · 2, the teacher's -0.001 · 2 · 3.
    assert "word1" in tip and "student's log-prob\t-0.004" in tip and "teacher − student\t-0.002" in tip
    red = token.evaluate("node => getComputedStyle(node).backgroundColor")
    page.select_option("#by", "student_entropy")
    other = page.locator(".tokens span[data-index='1']").first.evaluate("node => getComputedStyle(node).backgroundColor")
    assert red != other and "0.8" in red  # the diverging scale's red
    page.check("#pair")
    assert page.locator("#rollout .pair h3", has_text="thinks").count() == 2
    assert page.locator("details.turn").count() == 6 and "look({})" in page.locator("details.turn summary").first.inner_text()


def write_one(folder, tokens, **changes):
    """Write a run of one rollout whose completion has these pieces."""
    row = rollout_row(1, 0, len(tokens))
    values = {name: column[: len(tokens)] for name, column in row["values"].items()}
    row |= {"tokens": tokens, "policy": [1] * len(tokens), "values": values, "turns": [{"role": "assistant"}]}
    write_run(folder)
    write_rows(folder / "training_rollouts.jsonl", [row | changes])
    return folder


def test_a_token_that_cannot_be_seen_has_a_place_of_its_own(show, tmp_path):
    # The pieces of "漢", an end of line, a joiner without width and a mark of the chat template, as byte-level BPE gives them.
    pieces = ["", "", "漢", ".\n\n", "\u200d", "<|im_end|>"]
    page = show(write_report([write_one(tmp_path / "run", pieces)]), "Rollouts")
    for index, shown in enumerate(["part of a character", "part of a character", "漢", ".\\n\\n", "\u200d", "<|im_end|>"]):
        token = page.locator(f".tokens span[data-index='{index}']")
        assert token.bounding_box()["width"] > 3
        token.hover()
        assert page.inner_text("#tip code") == shown and f"token {index + 1}" in page.inner_text("#tip")
    copied = page.evaluate("getSelection().selectAllChildren(document.querySelector('.tokens')) || getSelection().toString()")
    assert copied == "漢.\n\n\u200d<|im_end|>"  # what is copied is the text, without the signs


def test_a_long_prompt_is_folded_and_its_template_can_be_told_from_its_words(show, tmp_path):
    question = "<|im_start|>user\n" + "many words " * 300 + "why?"
    changes = {
        "student_prompt": f"{question}<|im_end|>\n",
        "teacher_prompt": f"{question} THE HINT<|im_end|>\n",
        "privileged": "THE HINT",
    }
    page = show(write_report([write_one(tmp_path / "run", ["so"], **changes)]), "Rollouts")
    student = page.locator("#rollout .pair .text").first
    assert len(student.inner_text()) < 900 and "why?" in student.inner_text()
    assert page.locator("#rollout .pair mark").inner_text() == "THE HINT"
    student.locator("button.more").click()
    assert student.inner_text().strip() == changes["student_prompt"].strip()
    assert student.locator(".control").all_inner_texts() == ["<|im_start|>", "<|im_end|>"]
    assert student.locator(".role").inner_text() == "user"


def test_what_the_teacher_alone_reads_with_an_answer_stands_at_the_answer(show, tmp_path):
    row = rollout_row(1, 0)  # its observation is "word3 word4 "
    row |= {"privileged": None, "teacher_reads": [{"at": 3, "text": "word3 BUY <b>TWO</b> word4 "}]}
    write_run(tmp_path)
    write_rows(tmp_path / "training_rollouts.jsonl", [row, rollout_row(1, 1)])
    page = show(write_report([tmp_path]), "Rollouts")
    answer = page.locator("details.turn.other")
    assert "The teacher reads" in answer.inner_text() and answer.locator("mark").inner_text().strip() == "BUY <b>TWO</b>"
    assert page.locator("details.turn mark").count() == 1 and "PI comes with later turns" in page.inner_text("#rollout .pair")
    page.check("#pair")  # only the teacher's side has it
    assert [view.locator("mark").count() for view in page.locator(".completion .pair > div").all()] == [0, 1]
    page.fill("#f-words", "buy <b>two")
    assert listed(page) == 1
    page.fill("#f-words", "row 1")
    assert listed(page) == 1 and page.locator("details.turn mark").count() == 0


def test_rollouts_of_the_same_group_are_a_click_away(show, tmp_path):
    write_run(tmp_path)
    rows = [rollout_row(1, 0) | {"reward": float(i), "success": i == 1} for i in range(3)]
    write_rows(tmp_path / "training_rollouts.jsonl", [*rows, rollout_row(1, 5)])
    page = show(write_report([tmp_path]), "Rollouts")
    assert page.locator(".siblings button").count() == 2
    page.locator(".siblings button").last.click()
    assert "3 / 4" in page.inner_text(".step") and "reward 2" in page.inner_text(".chips")


def test_two_runs_have_a_colour_each_and_equal_curves_are_one(show, tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        rows = [row | ({"success_frac": row["reward_mean"]} if "reward_mean" in row else {}) for row in metrics_rows()]
        write_rows(folder / "metrics.jsonl", rows)
    page = show(write_report(folders, tmp_path / "page.html"), "Health")
    legend = page.locator(".chart", has_text="Reward and success").locator(".legend").inner_text()
    assert "success_frac: the same as reward_mean" in legend and legend.count("0.6") == 2
    colours = page.locator(".alarm .dot").evaluate_all("nodes => nodes.map((node) => getComputedStyle(node).backgroundColor)")
    assert len(set(colours)) == 2


def test_hostile_text_is_shown_and_runs_nothing(show, tmp_path):
    page = show(write_report([write_run(tmp_path / "run", text=HOSTILE)]), "Rollouts")
    assert page.locator("img").count() == 0
    assert "</script><img src=x onerror=alert(1)> \\x1b[31m" in page.inner_text(".tokens >> nth=0")


def test_a_run_of_two_thousand_rollouts_of_five_hundred_tokens_opens_within_two_seconds(show, tmp_path):
    path = write_report([write_run(tmp_path / "run", rollouts=2000, tokens=500)])
    assert path.stat().st_size < 30e6
    page = show(path, "Rollouts")
    assert listed(page) > 100 and page.locator(".tokens span").count() >= 500
    client = page.context.new_cdp_session(page)
    client.send("Performance.enable")
    metrics = {entry["name"]: entry["value"] for entry in client.send("Performance.getMetrics")["metrics"]}
    wall = page.evaluate("Number(document.documentElement.dataset.ready)") / 1000
    seconds = metrics["ProcessTime"]
    print(f"{path.stat().st_size / 1e6:.1f} MB, ready after {wall:.2f} s, {seconds:.2f} s of the processor")
    assert seconds < 2  # whatever else the machine does meanwhile
