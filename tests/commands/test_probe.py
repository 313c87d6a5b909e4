"""Test `pidistill probe`: the numbers of each wording, the recommendation, and what it refuses."""

import json
import math
import sys
from dataclasses import dataclass, replace

import pytest
import yaml

from pidistill.commands.probe.after import GoOn, beginning
from pidistill.commands.probe.command import Found
from pidistill.commands.probe.command import main as probe
from pidistill.commands.probe.measure import Measured, Probe
from pidistill.commands.probe.wordings import Wording, builtin_wordings, configured, prompts_by_wording, read_wordings
from pidistill.data import ExampleDataset, gsm8k_dataset
from pidistill.envs import EnvStep
from pidistill.envs.tiny_world import tiny_world_dataset, tiny_world_tokenizer
from pidistill.errors import InputError
from pidistill.privileged.prompt import PLACEMENTS, PrivilegedPrompt
from pidistill.rollouts.base import Sample
from pidistill.tokenizers import HFChatTokenizer
from pidistill.training.start import cleanup
from pidistill.types import Rollout
from tests.support.hub_models import hub_folder
from tests.support.tiny_tokenizers import qwen_folder

VOCABULARY = 640
TEMPERATURES: list[float] = []
LIMITS: list[int | None] = []


@dataclass
class ReadsTheUserTurn:
    """Gives the right answer where the prompt's last user turn holds the solution, "#### 7" elsewhere."""

    path: str
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 24

    def sample(self, model, prompts, *, group_size, on_turn_end, temperature=None, **settings) -> list[Sample]:
        tokenizer = HFChatTokenizer(self.path, max_seq_len=1024)
        TEMPERATURES.append(temperature)
        samples = []
        for row, prompt in enumerate(prompts):
            user = tokenizer.decode(list(prompt)).rpartition("user\n")[2]
            number = user.rpartition("It is ")[2].split(".")[0] if "It is " in user else "7"
            turn = tokenizer.encode_turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": f"#### {number}"})
            assert on_turn_end(row, turn) is None
            samples.append(Sample(turn, [True] * len(turn), [-1.0] * len(turn), "done"))
        return samples


class StopsAtOnce(ReadsTheUserTurn):
    """Writes one token, which the limit cuts off."""

    def sample(self, model, prompts, *, group_size, on_turn_end, temperature=None, **settings) -> list[Sample]:
        return [Sample([5], [True], [-1.0], "length") for _ in prompts]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """The words of a command: a tiny Qwen2.5 with twelve rows of GSM8K's layout."""
    folder = tmp_path_factory.mktemp("probe")
    hub_folder("qwen2, tied", folder / "model", vocab_size=VOCABULARY, max_position_embeddings=1024)
    qwen_folder(folder / "model")
    rows = [{"question": f"{n} * 12?", "answer": f"It is {12 * n}.\n#### {12 * n}"} for n in range(20, 32)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "qwen2_5/0.5B_pi_distill",
        "model._component_=pidistill.models.from_folder",
        "model.path=${checkpointer.checkpoint_dir}",
        f"checkpointer.checkpoint_dir={folder / 'model'}",
        f"dataset.source={folder / 'rows.jsonl'}",
        "dataset.split=train",
        "dataset.answer_format=hashes",
        "eval_dataset=null",
        "privileged.placement=system_end",
        "~privileged.template",
        "tokenizer.max_seq_len=1024",
        f"sampler._component_={__name__}.ReadsTheUserTurn",
        f"sampler.path={folder / 'model'}",
        "sampler.max_new_tokens=24",
        "~sampler.max_batch_size",
        "device=cpu",
        "threads=1",
        f"output_dir={folder / 'run'}",
    ]


def run(words: list[str], capsys) -> dict:
    with pytest.raises(SystemExit) as ended:
        probe([*words, "--json"])
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    return json.loads(captured.out)


def refusal(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        probe(words)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_wording_that_helps_is_recommended_and_measured(words, capsys):
    TEMPERATURES.clear()
    found = run([*words, "--rows", "5"], capsys)
    assert found["student"]["rows"] == 5 and found["student"]["success"] == 0.0
    by_name = found["wordings"]
    assert by_name["the config's"]["success"] == 0.0 and by_name["the config's"]["placement"] == "system_end"
    assert by_name["rewrite, user"]["success"] == 1.0
    for name, numbers in by_name.items():
        assert numbers["success"] == float(numbers["placement"] == "user_end"), name
        assert numbers["kl_teacher_student"] > 0 and numbers["kl_student_teacher"] > 0, name
        assert len(numbers["kl_quarters"]) == 4 and numbers["rows"] == 5
    helped = {name for name, numbers in by_name.items() if numbers["success"] == 1.0}
    closest = min(helped, key=lambda name: by_name[name]["kl_teacher_student"])
    assert found["recommended"] == closest
    assert "with success 1.00 of 5 rows (student 0.00)" in found["advice"][0]
    assert set(TEMPERATURES) == {0.0}


def test_a_probe_that_is_stopped_leaves_the_wordings_that_it_has_measured(words, tmp_path, monkeypatch):
    measured = []

    def stop_at_the_second(self, *arguments):
        measured.append(len(measured))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return arguments[0]

    monkeypatch.setattr(Probe, "with_divergences", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        probe([*words, "--rows", "2", f"output_dir={tmp_path}"])
    cleanup()
    left = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert list(left["wordings"]) == ["the config's"] and left["recommended"] == "the config's"
    assert left["student"]["rows"] == left["wordings"]["the config's"]["rows"] == 2


def test_a_teacher_that_never_helps_is_said_so(words, capsys):
    found = run([*words, "--rows", "3", "--only-own", "--no-kl"], capsys)
    assert list(found["wordings"]) == ["the config's"] and found["wordings"]["the config's"]["kl_teacher_student"] is None
    assert found["advice"][0].startswith("No wording helps")


def test_the_table_ends_in_lines_that_a_config_takes(words, capsys):
    with pytest.raises(SystemExit):
        probe([*words, "--rows", "2", "--no-kl"])
    shown = capsys.readouterr().out
    pasted = yaml.safe_load(shown[shown.index("privileged:") :])["privileged"]
    assert PrivilegedPrompt(**pasted).placement == "user_end"


def test_wordings_of_a_file_are_tried_before_the_built_in_ones(words, tmp_path, capsys):
    own = {
        "mine": {"template": "Use this: {privileged}"},
        "mine, system": {"template": "S {privileged}", "placement": "system_end"},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    found = run([*words, "--rows", "2", "--no-kl", "--wordings", str(tmp_path / "own.yaml"), "--only-own"], capsys)
    assert list(found["wordings"]) == ["the config's", "mine", "mine, system"]
    assert found["recommended"] == "mine"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[1, 2]", "holds no mapping"),
        ("a: {placement: user_end}", "a needs a template"),
        ("a: {template: no placeholder}", "a: privileged.template"),
        ("a: {template: '{privileged}', placement: nowhere}", "privileged.placement=nowhere is unknown"),
        ("a: {template: '{privileged}', role: user}", "has nothing else"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_file_of_wordings_is_one_sentence(text, sentence, tmp_path):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError, match="own.yaml") as refused:
        read_wordings(str(tmp_path / "own.yaml"))
    assert sentence in str(refused.value)


def test_answers_that_are_cut_off_are_said_so_and_no_quarter_without_a_token_has_a_number(words, capsys):
    cut = [f"sampler._component_={__name__}.StopsAtOnce", "--rows", "2", "--only-own"]
    found = run([*words, *cut], capsys)
    assert found["student"]["truncated"] == 1.0
    cut_off = "100% of the answers of student are cut off before they end; raise sampler.max_new_tokens."
    assert cut_off in found["advice"]
    first, *others = found["wordings"]["the config's"]["kl_quarters"]
    assert first > 0 and others == [None] * 3


def test_rows_without_privileged_information_and_wrong_numbers_are_refused(words, capsys):
    assert "no row of `dataset` has privileged information" in refusal([*words, "privileged.control=none"], capsys)
    assert "--rows 0 must be at least 1" in refusal([*words, "--rows", "0"], capsys)
    assert "--after 0 must be at least 1" in refusal([*words, "--after", "0"], capsys)
    assert "--after 24 leaves the teacher nothing to write" in refusal([*words, "--after", "24"], capsys)


@dataclass
class EndsWhatIsBegun(ReadsTheUserTurn):
    """Goes on from the first id of an answer with what the user turn says."""

    def sample(self, model, prompts, *, group_size, on_turn_end, max_new_tokens=None, **settings) -> list[Sample]:
        tokenizer = HFChatTokenizer(self.path, max_seq_len=1024)
        first = tokenizer.encode_turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": "#### 7"})[0]
        LIMITS.append(max_new_tokens)
        samples = []
        for row, prompt in enumerate(prompts):
            begun = int(prompt[-1] == first)
            plain = list(prompt[: len(prompt) - begun])
            whole = super().sample(model, [plain], group_size=1, on_turn_end=lambda row, ids: None, **settings)[0].tokens
            assert on_turn_end(row, whole[begun:]) is None
            samples.append(Sample(whole[begun:], [True] * len(whole[begun:]), [-1.0] * len(whole[begun:]), "done"))
        return samples


def test_a_teacher_that_goes_on_from_the_students_words_is_measured_on_the_whole_answer(words, capsys):
    LIMITS.clear()
    going_on = [*words, f"sampler._component_={__name__}.EndsWhatIsBegun", "--rows", "3", "--no-kl"]
    plain = run(going_on, capsys)
    assert all(numbers["after"] is None for numbers in plain["wordings"].values())
    begun = run([*going_on, "--after", "1"], capsys)
    one = begun["wordings"]
    assert any("in which it was not over by then), this teacher is right in 1.00" in said for said in begun["advice"])
    assert {numbers["success"] - numbers["after"] for numbers in one.values()} == {0.0}
    assert {numbers["after"] for numbers in one.values()} == {0.0, 1.0}
    assert {None, 23} == set(LIMITS)  # 24 with the one that is given
    assert {numbers["after_rows"] for numbers in one.values()} == {3}
    most = run([*going_on, "--after", "20"], capsys)  # every answer of the student is over by then
    assert {numbers["after"] for numbers in most["wordings"].values()} == {None}


def of_one_id(**settings) -> ExampleDataset:
    return ExampleDataset([replace(example, id="row") for example in gsm8k_dataset(**settings)])


def test_rows_of_the_same_id_are_not_taken_for_each_other(words, capsys):
    words = [*words, f"sampler._component_={__name__}.EndsWhatIsBegun", "--rows", "3", "--after", "1"]
    told_apart, of_one = run(words, capsys), run([*words, f"dataset._component_={__name__}.of_one_id"], capsys)
    assert of_one["wordings"] == told_apart["wordings"]


def test_an_answer_that_is_over_has_no_beginning_to_go_on_from():
    rollout = Rollout.__new__(Rollout)
    rollout.completion, rollout.turn_policy_tokens = [5, 6, 9, 1, 2, 7, 9], [3, 2]
    assert [beginning(rollout, n) for n in (1, 2, 3, 50)] == [[5], [5, 6], None, None]


def test_given_ids_come_before_what_is_sampled_in_every_row():
    class Two(ReadsTheUserTurn):
        def sample(self, model, prompts, *, on_turn_end, max_new_tokens, **settings):
            assert prompts == [[1, 2, 8, 8], [1, 2, 7, 7]] and max_new_tokens == 8
            assert [on_turn_end(row, [row]) for row in (1, 0, 1)] == [None, [4], None]
            return [
                Sample([0, 4, 5], [True, False, True], [-1.0, math.nan, -2.0], "length"),
                Sample([1], [True], [-1.0], "done"),
            ]

    heard = []
    found = GoOn(Two("", max_new_tokens=10), [[8, 8], [7, 7]]).sample(  # of rows with the same prompt, too
        None, [[1, 2], [1, 2]], on_turn_end=lambda row, ids: heard.append((row, ids)) or ([4] if row == 0 else None)
    )
    assert heard == [(1, [7, 7, 1]), (0, [8, 8, 0]), (1, [1])]  # a second turn begins with nothing
    assert [sample.tokens for sample in found] == [[8, 8, 0, 4, 5], [7, 7, 1]]
    assert [sample.policy_mask for sample in found] == [[True, True, True, False, True], [True] * 3]
    assert [math.isnan(value) for value in found[0].logprobs] == [True, True, False, True, False]


# ------------------------------------------------------------------------------------------- odd cases


def half_told(**options) -> ExampleDataset:
    """GSM8K's rows, of which every other one has no privileged information."""
    rows = list(gsm8k_dataset(**options))
    return ExampleDataset([replace(row, privileged=None) if i % 2 else row for i, row in enumerate(rows)])


def test_rows_without_privileged_information_among_others_are_counted_and_not_tried(words, capsys):
    half = [f"dataset._component_={__name__}.half_told", "privileged.leak_phrases=[]"]
    found = run([*words, *half, "--rows", "9", "--only-own", "--no-kl"], capsys)
    assert found["student"]["rows"] == 6 and found["student"]["leaks"] is None, "without phrases leaks are not known"
    assert "6 of 12 rows of `dataset` have no privileged information and were not tried." in found["advice"]


def test_a_control_is_applied_to_all_rows_once_and_not_again_to_those_that_are_tried(words, capsys):
    found = run([*words, "privileged.control=shuffled", "privileged.placement=user_end", "--rows", "1", "--only-own"], capsys)
    assert found["wordings"]["the config's"]["success"] == 0.0, "the teacher saw another row's solution"
    rows, tokenizer = list(tiny_world_dataset("validation"))[:8], tiny_world_tokenizer(max_seq_len=96)
    own = PrivilegedPrompt(template="{privileged}", control="shuffled")
    shuffled = own.apply_control(rows, tokenizer)
    prompts, _ = prompts_by_wording([configured(own)], shuffled, tokenizer, own, max_seq_len=96, max_new_tokens=20)
    assert [example.privileged for example, _ in prompts["the config's"]] == [example.privileged for example in shuffled]


def test_a_wording_without_a_divergence_does_not_win_a_tie_by_that():
    own, other = (Wording(name, "{privileged}", "user_end") for name in ("the config's", "other"))
    numbers = {"rows": 20, "success": 0.5, "flexible": None, "tokens": 3.0, "truncated": 0.0, "leaks": 0.0}
    measured = [(own, Measured(**numbers, kl_teacher_student=0.7)), (other, Measured(**numbers))]
    assert Found(Measured(**numbers), measured, 1.0, "x", []).wording == own
    assert Found(Measured(**numbers), measured[::-1], 1.0, "x", []).wording == own


def test_a_better_wording_than_the_configs_is_said_to_be_one_by_chance_where_it_may_be():
    own, other = (Wording(name, "{privileged}", "user_end") for name in ("the config's", "other"))
    numbers = {"rows": 24, "flexible": None, "tokens": 3.0, "truncated": 0.0, "leaks": 0.0}
    student = Measured(**numbers, success=0.0)

    def advice(best: float) -> list[str]:
        wordings = [(own, Measured(**numbers, success=0.5)), (other, Measured(**numbers, success=best))]
        return Found(student, wordings, 1.0, "x", []).advice()

    assert advice(0.625)[1] == "The config's own wording has 0.50; of 24 rows a difference of up to 0.28 may be chance."
    assert advice(1.0)[1] == "The config's own wording has 0.50."


def test_a_teacher_with_weights_of_its_own_is_said_not_to_be_measured(words, capsys):
    folder = next(word.partition("=")[2] for word in words if word.startswith("checkpointer.checkpoint_dir"))
    key = "teacher_checkpointer"
    teacher = [f"{key}._component_=pidistill.models.HFCheckpointer", f"{key}.checkpoint_dir={folder}"]
    found = run([*words, *teacher, "--rows", "1", "--only-own", "--no-kl"], capsys)
    assert any(f"{key} is not sampled" in said for said in found["advice"])


def test_a_difference_that_few_rows_may_give_by_chance_is_said_so(words, capsys):
    chance = "Of 1 row a difference of up to 1.00 may be chance; raise --rows."
    assert chance in run([*words, "--rows", "1", "--no-kl"], capsys)["advice"]
    assert not any("chance" in said for said in run([*words, "--rows", "12", "--no-kl"], capsys)["advice"])


def test_wordings_that_the_tokenizer_does_not_take_are_left_out_and_the_configs_own_is_refused():
    rows, tokenizer = list(tiny_world_dataset("validation"))[:3], tiny_world_tokenizer(max_seq_len=96)
    limits = {"max_seq_len": 96, "max_new_tokens": 20}
    own = PrivilegedPrompt(template="{privileged}")
    prompts, said = prompts_by_wording([configured(own), *builtin_wordings("dfk")], rows, tokenizer, own, **limits)
    assert {name: len(pairs) for name, pairs in prompts.items()} == {"the config's": 3}
    assert len(said) == 6 and said[0].startswith(
        "block, system is left out: tiny_world validation row 0: the word '<privileged_"
    )
    with pytest.raises(InputError, match="is not among the 85 words"):
        prompts_by_wording([configured(PrivilegedPrompt())], rows, tokenizer, PrivilegedPrompt(), **limits)


def some_long(**options) -> ExampleDataset:
    """GSM8K's rows, of which every third one has long privileged information."""
    rows = list(gsm8k_dataset(**options))
    return ExampleDataset([replace(row, privileged="word " * 200) if i % 3 == 0 else row for i, row in enumerate(rows)])


def test_all_wordings_are_tried_on_the_rows_that_fit_under_each(words, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"twice": {"template": "{privileged} {privileged}"}}))
    wordings = ["--wordings", str(tmp_path / "own.yaml"), "--only-own", "--no-kl", f"dataset._component_={__name__}.some_long"]
    found = run([*words, *wordings], capsys)
    assert [found["student"]["rows"], *(numbers["rows"] for numbers in found["wordings"].values())] == [8, 8, 8]
    assert found["advice"][-1] == "4 of 12 rows are too long under a wording and were not tried."


@dataclass
class ReadsTheAnswer(ReadsTheUserTurn):
    """Says something, and then repeats what follows MARK in the environment's answer, "#### 7" where nothing does."""

    def sample(self, model, prompts, *, group_size, on_turn_end, temperature=None, **settings) -> list[Sample]:
        tokenizer = HFChatTokenizer(self.path, max_seq_len=1024)
        question = [{"role": "user", "content": "?"}]
        first = tokenizer.encode_turn(question, {"role": "assistant", "content": "Well."})
        samples = []
        for row in range(len(prompts)):
            forced = on_turn_end(row, first)
            if forced is None:  # the environment failed
                samples.append(Sample(first, [True] * len(first), [-1.0] * len(first), "done"))
                continue
            number = tokenizer.decode(forced).rpartition("MARK ")[2].split(".")[0] if "MARK " in tokenizer.decode(forced) else 7
            last = tokenizer.encode_turn(question, {"role": "assistant", "content": f"#### {number}"})
            assert on_turn_end(row, last) is None
            mask = [True] * len(first) + [False] * len(forced) + [True] * len(last)
            samples.append(Sample([*first, *forced, *last], mask, [-1.0 if own else math.nan for own in mask], "done"))
        return samples


class TwoTurns:
    """Tells the teacher the answer after the first turn, and judges the second; the row "20 * 12?" fails if ``fails``."""

    gives_privileged = True

    def __init__(self, reward, fails: bool = False) -> None:
        self.fails = fails

    def reset(self, example):
        return [example]

    def step(self, state, turn, *, truncated):
        state.append(turn)
        if self.fails and "20 * 12?" in state[0].messages[-1]["content"]:
            raise ValueError("broken")
        if len(state) == 3:
            return EnvStep([], float(turn["content"] == f"#### {state[0].reference}"), True)
        return EnvStep([{"role": "user", "content": "Go on."}], 0.0, False, privileged=f"{state[0].reference}. That is it.")


def test_information_that_comes_with_an_answer_is_shown_in_each_wording(words, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"mine": {"template": "MARK {privileged}"}}))
    environment = [
        f"environment._component_={__name__}.TwoTurns",
        "dataset.privileged=none",
        f"sampler._component_={__name__}.ReadsTheAnswer",
    ]
    more = ["--rows", "12", "--wordings", str(tmp_path / "own.yaml"), "--only-own"]
    found = run([*words, *environment, *more], capsys)
    success = {name: numbers["success"] for name, numbers in found["wordings"].items()}
    assert success == {"the config's": 0.0, "mine": 1.0} and found["student"]["success"] == 0.0
    assert found["student"]["rows"] == 12
    # The student's own rollouts were read by the teacher under the config's wording.
    assert found["wordings"]["the config's"]["kl_teacher_student"] > 0
    assert found["wordings"]["mine"]["kl_teacher_student"] is None
    broken = run([*words, *environment, *more, "environment.fails=true"], capsys)
    assert broken["student"]["rows"] == 11
    assert "1 rollouts of mine have no reward and are not counted (reward_error 1)." in broken["advice"]


def test_a_name_that_is_taken_is_refused_and_one_of_the_built_in_ones_takes_its_place(words, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"plain, user": {"template": "Mine: {privileged}"}}))
    found = run([*words, "--rows", "2", "--no-kl", "--wordings", str(tmp_path / "own.yaml")], capsys)
    assert found["wordings"]["plain, user"]["template"] == "Mine: {privileged}"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"the config's": {"template": "{privileged}"}}))
    assert 'the name "the config\'s" is taken' in refusal([*words, "--wordings", str(tmp_path / "own.yaml")], capsys)


def test_a_config_that_samples_with_vllm_is_read(words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm = ["sampler._component_=pidistill.rollouts.VLLMSampler", "sampler.model_dir=${checkpointer.checkpoint_dir}"]
    plain = [word for word in words if not word.startswith(("sampler._component_", "sampler.path"))]
    assert "VLLMSampler needs vLLM, which is not installed" in refusal([*plain, *vllm], capsys)


@pytest.mark.parametrize("kind", [None, "solution", "answer", "gold_actions", "hints"])
def test_every_built_in_wording_is_a_valid_setting(kind):
    wordings = builtin_wordings(kind)
    assert len({(w.template, w.placement) for w in wordings}) == len(wordings) >= 5
    assert {w.placement for w in wordings} == {"system_end", "user_end", "before_user"}
    for wording in wordings:
        assert wording.applied(PrivilegedPrompt()).placement in PLACEMENTS
        assert yaml.safe_load(wording.as_yaml())["privileged"] == {"placement": wording.placement, "template": wording.template}
