"""Test `pidistill probe`: the numbers of each wording, the recommendation, and what it refuses."""

import json
from dataclasses import dataclass

import pytest
import yaml

from pidistill.commands.probe.command import main as probe
from pidistill.commands.probe.measure import Probe
from pidistill.commands.probe.wordings import builtin_wordings, read_wordings
from pidistill.errors import InputError
from pidistill.privileged.prompt import PLACEMENTS, PrivilegedPrompt
from pidistill.rollouts.base import Sample
from pidistill.tokenizers import HFChatTokenizer
from pidistill.training.start import cleanup
from tests.support.hub_models import hub_folder
from tests.support.tiny_tokenizers import qwen_folder

VOCABULARY = 640
TEMPERATURES: list[float] = []


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


def test_rows_without_privileged_information_and_wrong_numbers_are_refused(words, capsys):
    assert "no row of `dataset` has privileged information" in refusal([*words, "privileged.control=none"], capsys)
    assert "--rows 0 must be at least 1" in refusal([*words, "--rows", "0"], capsys)


@pytest.mark.parametrize("kind", [None, "solution", "answer", "gold_actions", "hints"])
def test_every_built_in_wording_is_a_valid_setting(kind):
    wordings = builtin_wordings(kind)
    assert len({(w.template, w.placement) for w in wordings}) == len(wordings) >= 5
    for wording in wordings:
        assert wording.applied(PrivilegedPrompt()).placement in PLACEMENTS
        assert yaml.safe_load(wording.as_yaml())["privileged"] == {"placement": wording.placement, "template": wording.template}
