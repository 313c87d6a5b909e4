"""Test that `pidistill validate` refuses what `pidistill preview` refuses, and prints one line where both accept."""

import json
import re
import sys
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from pidistill.commands.places import config_path
from pidistill.commands.preview.command import main as preview
from pidistill.commands.validate import main as validate
from pidistill.envs.tiny_world import tiny_world_dataset

SKIP = "{_component_: pidistill.losses.token_weights.SkipFirst, tokens: 500}"
FEW = ["dataset.max_rows=20"]
ADAPTED_HEAD = [
    "model=torchtune.models.llama3.lora_llama3",
    "model.lora_attn_modules=[q_proj]",
    "model.lora_rank=2",
    "model.lora_alpha=4",
    "model.apply_lora_to_output=True",
]


def ended(main, *words) -> int:
    with pytest.raises(SystemExit) as status:
        main(list(words))
    return status.value.code


@pytest.mark.parametrize("name", [["tiny/opsd"], ["--config", "tiny/opsd"]])
def test_a_right_config_gets_one_line(name, capsys):
    validate([*name, *FEW])
    assert re.fullmatch(
        r"tiny/opsd is right: 20 of 20 rows were checked; of eval_dataset (\d+) of \1 rows were checked\n",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize(
    "words",
    [["groupsize=3"], ["objective.beta=fast"], ["objective.beta=-1"], ["dataset.split=nosuch"], ["tokenizer.max_seq_len=30"],
     ["privileged.template=none"], ["model.vocab_size=7"], ["objective.no_pi=error", "dataset.privileged=none"]],
    ids=" ".join,
)  # fmt: skip
def test_validate_and_preview_refuse_the_same_with_the_same_sentence(words, capsys):
    assert ended(preview, "tiny/opsd", *FEW, *words) == 2
    expected = capsys.readouterr().err
    assert ended(validate, "tiny/opsd", *FEW, *words) == 2
    printed = capsys.readouterr()
    assert printed.err == expected and printed.err.startswith("error: ") and printed.out == ""


@pytest.mark.parametrize("config, words, said", [
    ("tiny/opsd", "views=[student]", "views is not read by this recipe"),
    ("tiny/sft", "views=[student]", "views is not read by this recipe"),
    ("tiny/evaluate", "views=[teacher]", "views=teacher is unknown"),
    ("tiny/evaluate", "views=[]", "views=[] leaves nothing to sample"),
])  # fmt: skip
def test_views_are_those_of_an_evaluation(config, words, said, capsys):
    assert ended(validate, config, *FEW, words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["nosuch"], ["tiny/opsd", "--scan", "0"], ["tiny/opsd", "--nosuch"]], ids=str)
def test_wrong_words_get_one_sentence(words, capsys):
    assert ended(validate, *words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("config, key", [("tiny/opsd", "environment"), ("tiny/opsd", "optimizer"), ("tiny/sft", "optimizer"),
                                         ("tiny/rft_sample", "selection"), ("tiny/evaluate", "output_dir")])  # fmt: skip
def test_a_key_that_the_recipe_requires_is_missed(config, key, capsys):
    assert ended(validate, config, *FEW, f"{key}=null") == 2
    assert capsys.readouterr().err == f"error: config key {key} is missing; this recipe needs it\n"


@pytest.mark.parametrize("config, words, said", [
    ("tiny/sdft", ["teacher.rate=2"], "teacher.rate=2 must lie in (0, 1]"),
    ("tiny/sdft", ["sampler.temperature=0"], "samples without probabilities cannot be trained on"),
    ("tiny/sdft", ["sampler.top_p=2"], "sampler.top_p=2"),
    ("tiny/evaluate", ["sampler.top_p=2"], "sampler.top_p=2"),
    ("tiny/opsd", ["teacher.nosuch=1"], "teacher.nosuch"),
    ("tiny/opsd", ADAPTED_HEAD, "cannot score with an output layer of type LoRALinear"),
    ("tiny/opsd", ["~optimizer.betas", "~optimizer.weight_decay", "optimizer=torch.optim.LBFGS"], "whose step() needs closure"),
    ("tiny/sft", ["prompts_per_round=3"], "config key prompts_per_round is not read by this recipe"),
    ("tiny/sft", ["environment=null"], "config key environment is missing, and the rows of eval_dataset are answered with it"),
    ("tiny/sft", ["sampler=null"], "config key sampler is missing, and the rows of eval_dataset"),
    ("tiny/opsd", ["temperature=1"], "temperature is not read by this recipe; did you mean sampler.temperature?"),
    ("tiny/opsd", ["objective=SDFT"], "SDFT cannot be found (it has no module; did you mean pidistill.objectives.SDFT"),
    ("tiny/opsd", ["device=gpu"], "device=gpu is not a device of torch"),
    ("tiny/opsd", ["objective._component_=pidistill.objectives.PiDistill"], "run pi_distill_distributed, or set another"),
    ("tiny/sdft", ["objective.skip_first_tokens=9", "sampler.max_new_tokens=9"],
     "objective.skip_first_tokens=9 leaves out the first tokens of an answer, and answers have at most"),
    ("tiny/gkd", [f"objective.token_weight={SKIP}"], "objective.token_weight.tokens=500 leaves out the first tokens"),
    ("tiny/opsd", ["teacher._component_=pidistill.teachers.LiveTeacher", "teacher_model=${model}"], "teacher_model"),
])  # fmt: skip
def test_teacher_and_sampler_are_refused_as_a_run_refuses_them(config, words, said, capsys):
    assert ended(validate, config, *FEW, *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("key, recipe", [("eval_dataset", "tiny/opsd"), ("dataset", "tiny/evaluate")])
def test_a_missing_file_of_evaluation_rows_is_refused_before_anything_is_built(key, recipe, capsys, monkeypatch):
    node = "{_component_: pidistill.data.qa_dataset, source: nosuch.jsonl}"
    monkeypatch.setattr("pidistill.commands.preview.rows.build", lambda node: pytest.fail("something was built"))
    text = config_path(recipe).read_text()
    cfg = OmegaConf.merge(OmegaConf.create(text), {key: None}, {key: OmegaConf.create(node)})
    monkeypatch.setattr("pidistill.commands.plan.reading.load_config", lambda name: cfg)
    assert ended(validate, recipe) == 2
    assert f"error: {key}.source nosuch.jsonl does not exist; relative paths start at" in capsys.readouterr().err


def test_rows_of_the_evaluation_are_checked(capsys):
    assert ended(validate, "tiny/opsd", *FEW, "eval_dataset.split=nosuch") == 2
    assert "nosuch" in capsys.readouterr().err


def test_what_is_on_the_machine_that_trains_alone_is_not_needed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    validate(["tiny/opsd", *FEW, "sampler._component_=pidistill.rollouts.VLLMSampler", "sampler.model_dir=nowhere"])
    assert "is right" in capsys.readouterr().out


def test_a_config_without_a_first_line_is_held_to_the_recipe_of_its_keys(tmp_path, capsys):
    text = config_path("tiny/opsd").read_text().split("\n", 1)[1]
    (tmp_path / "config.yaml").write_text(text)
    validate([str(tmp_path / "config.yaml"), *FEW])
    assert ended(validate, str(tmp_path / "config.yaml"), *FEW, "environment=null") == 2
    assert "config key environment is missing" in capsys.readouterr().err


def test_rows_that_are_left_out_are_counted(capsys, tmp_path):
    row = {"messages": [{"role": "user", "content": "req i1 c2 g3 1 2 3 go"}], "privileged_messages": "[ d2 f0 ? k3 ]"}
    long = row | {"messages": [{"role": "user", "content": "req " * 90}]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, long, row)))
    text = config_path("tiny/opsd").read_text()
    start, end = text.index("dataset:\n"), text.index("environment:\n")
    dataset = f"dataset:\n  _component_: pidistill.data.chat_dataset\n  source: {tmp_path}/rows.jsonl\n"
    (tmp_path / "config.yaml").write_text(text[:start] + dataset + text[end:])
    validate([str(tmp_path / "config.yaml"), "privileged.on_overflow=drop"])
    said = "is right: 3 of 3 rows were checked, dropped: prompt_too_long 1; the first is rows.jsonl row 1\n"
    assert capsys.readouterr().out.endswith(said)


def test_the_first_row_without_privileged_information_is_named(capsys):
    validate(["tiny/opsd", "dataset.max_rows=8", "dataset.privileged=dfk", "eval_dataset=null", "objective.no_pi=drop",
              "dataset._component_=tests.commands.test_validate.some_rows"])  # fmt: skip
    said = "8 of 8 rows were checked, dropped: rows_without_pi 2; the first is tiny_world train row 3\n"
    assert capsys.readouterr().out.endswith(said)


def some_rows(split, privileged, max_rows):
    rows = list(tiny_world_dataset(split=split, privileged=privileged, max_rows=max_rows))
    return [replace(row, privileged=None) if place in (3, 5) else row for place, row in enumerate(rows)]


def test_evaluation_rows_that_are_training_rows_are_counted(capsys):
    validate(["tiny/opsd", *FEW, "eval_dataset.split=train", "eval_dataset.max_rows=30"])
    assert "; but 20 of 30 evaluation rows are training rows" in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    (["environment.reward=tests.support.own_rewards.later"], "later is an async function"),
    (["environment._component_=tests.commands.test_validate.NoStep"], "environment: tests.commands.test_validate.NoStep has no "
     "method step; define step(self, state, turn, *, truncated)"),
    (["environment._component_=tests.commands.test_validate.Short"], "has a method step that cannot be called as it is"),
    (["environment._component_=tests.commands.test_validate.Later"], "has the async method reset"),
])  # fmt: skip
def test_an_environment_or_a_reward_that_cannot_work_is_refused(words, said, tmp_path, capsys):
    text = config_path("tiny/sdft").read_text()
    start, end = text.index("environment:\n"), text.index("privileged:\n")
    environment = "environment:\n  _component_: pidistill.envs.SingleTurn\n  reward: null\n"
    (tmp_path / "config.yaml").write_text(text[:start] + environment + text[end:])
    validate([str(tmp_path / "config.yaml"), *FEW])
    assert ended(validate, str(tmp_path / "config.yaml"), *FEW, *words) == 2
    assert said in capsys.readouterr().err


class Gym:
    """A thing of another shape that an adapter wraps."""

    def reset(self, *, seed=None):
        return 0, {}

    def step(self, action):
        return 0, 0.0, True, False, {}


class Adapter:
    def __init__(self, environment=None):
        self.reset = lambda example: example
        self.step = lambda state, turn, *, truncated: None


def refuses_to_be_called():
    raise OSError("no judge server on this machine")


@pytest.mark.parametrize("words", [
    ["environment._component_=tests.commands.test_validate.Adapter"],
    ["environment._component_=tests.commands.test_validate.Adapter",
     "environment.environment={_component_: tests.commands.test_validate.Gym}"],
    ["environment.reward=tests.commands.test_validate.refuses_to_be_called"],
])  # fmt: skip
def test_adapters_and_makers_of_the_user_are_not_called_and_not_refused(words, tmp_path, capsys):
    text = config_path("tiny/sdft").read_text()
    start, end = text.index("environment:\n"), text.index("privileged:\n")
    environment = "environment:\n  _component_: pidistill.envs.SingleTurn\n  reward: null\n"
    (tmp_path / "config.yaml").write_text(text[:start] + environment + text[end:])
    validate([str(tmp_path / "config.yaml"), *FEW, *words])
    assert "is right" in capsys.readouterr().out


class NoStep:
    def reset(self, example):
        return example


class Short(NoStep):
    def step(self, state, turn):
        return None


class Later(Short):
    async def reset(self, example):
        return example

    def step(self, state, turn, *, truncated):
        return None
