"""Test sampling of demonstrations, and stages whose earlier stage may not have been run."""

import json
import logging
import shutil

import pytest
from omegaconf import OmegaConf
from safetensors.torch import save_file

from pidistill.data import chat_dataset, load_prompts
from pidistill.errors import InputError
from recipes import sample_distributed
from recipes.sample_distributed import SampleRecipe
from tests.support.forks import launch_several
from tests.support.runs import assert_same_tensors, metrics, run, sample_config, small_config
from tests.support.runs import weights as weights_of


def sample(name, base, folder, **changes):
    cfg = sample_config(name, base, folder, **changes)
    recipe = SampleRecipe(cfg)
    recipe.setup(cfg)
    recipe.report(recipe.sample())
    return [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def kept(tiny_base, tmp_path_factory):
    """(folder, rows) of a small run of RFT's first stage."""
    folder = tmp_path_factory.mktemp("rft_sample")
    return folder, sample("rft_sample", tiny_base, folder)


def test_a_sampling_run_writes_its_traces_and_summary(kept):
    folder, rows = kept
    (summary,) = metrics(folder)
    assert summary["rollouts"] == 3 * 8 and summary["kept"] == len(rows)
    assert 0 < summary["kept_frac"] == len(rows) / 24 < 1, "the selection keeps all or nothing, and nothing below says much"
    assert summary["policy_tokens"] == pytest.approx(24 * summary["completion_tokens_mean"])
    assert all(row["reward"] >= 0.5 for row in rows)
    prompts = [row["provenance"]["example"] for row in rows]
    assert prompts == sorted(prompts) and len(set(prompts)) == 3
    assert {row["provenance"]["sampled_by"] for row in rows} == {"teacher"}
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "metrics.jsonl", "traces.jsonl"}


def test_written_rows_are_read_back_as_demonstrations_without_privileged_information(kept):
    folder, rows = kept
    examples = chat_dataset(str(folder / "traces.jsonl"), privileged_key="privileged", completion_key="completion")
    for example, row in zip(examples, rows, strict=True):
        assert [message["role"] for message in example.messages] == ["user"] and "[" not in example.messages[0]["content"]
        assert example.privileged == row["privileged"] and example.privileged.startswith("[ d")
        assert example.completion == row["completion"] and example.completion[-1]["role"] == "assistant"


def test_a_run_says_who_sampled_its_rows_and_warns_of_another_control(kept, tiny_base, tmp_path, caplog):
    def said(folder, **changes):
        caplog.clear()
        load_prompts(
            small_config("rft", tiny_base, tmp_path, dataset__source=str(folder / "traces.jsonl"), **changes), no_pi="rl"
        )
        return [(r.levelname, r.getMessage()) for r in caplog.records if "were sampled by" in r.getMessage()]

    folder, rows = kept
    caplog.set_level(logging.INFO)
    whole = f"{len(rows)} of {len(rows)} rows of `dataset` were sampled by the teacher view of {tiny_base}"
    assert said(folder) == [("INFO", whole)]
    shuffled = tmp_path / "shuffled"
    sample("rft_sample", tiny_base, shuffled, privileged__control="shuffled", selection__threshold=0.0)
    ((level, sentence),) = said(shuffled)
    assert level == "WARNING" and "with privileged.control=shuffled, and this run has null: what is learned is that" in sentence
    assert [level for level, _ in said(shuffled, privileged__control="shuffled")] == ["INFO"]


def test_many_rollouts_that_were_cut_off_are_warned_of(kept, tiny_base, tmp_path, caplog, monkeypatch):
    (summary,) = metrics(kept[0])
    monkeypatch.setattr("recipes.sample_distributed.MANY_CUT", summary["truncated_frac"] + 0.01)
    sample("rft_sample", tiny_base, tmp_path / "few")
    assert "cut off" not in caplog.text
    monkeypatch.setattr("recipes.sample_distributed.MANY_CUT", summary["truncated_frac"])
    sample("rft_sample", tiny_base, tmp_path / "many")
    assert f"{summary['truncated_frac']:.0%} of the rollouts were cut off by a token limit" in caplog.text


def test_the_same_command_writes_the_same_file_whatever_the_batch(kept, tiny_base, tmp_path):
    _, rows = kept
    for batch in (1, 3, 64):
        again = sample("rft_sample", tiny_base, tmp_path / str(batch), prompts_per_batch=batch)
        assert again == rows
    assert sample("rft_sample", tiny_base, tmp_path / "seed", seed=1) != rows


def test_two_processes_write_what_one_does(kept, tiny_base, tmp_path):
    two = ("rft_sample", sample_config("rft_sample", tiny_base, tmp_path / "two"))
    launch_several(tmp_path / "several", {"two": two})
    folder, rows = kept
    assert [json.loads(line) for line in (tmp_path / "two" / "traces.jsonl").read_text().splitlines()] == rows
    (one,), (two,) = metrics(folder), metrics(tmp_path / "two")
    assert two == pytest.approx(one)


def test_the_view_is_the_one_that_is_asked_for(kept, tiny_base, tmp_path):
    student = sample("rft_sample", tiny_base, tmp_path / "student", view="student")
    assert student != kept[1] and {row["provenance"]["sampled_by"] for row in student} == {"student"}
    blind = sample("rft_sample", tiny_base, tmp_path / "blind", privileged__control="none")
    assert [row["completion"] for row in blind] == [row["completion"] for row in student]
    assert all(row["privileged"] is None for row in blind)
    with pytest.raises(InputError, match="view=both is unknown"):
        sample("rft_sample", tiny_base, tmp_path / "both", view="both")


def test_interventions_are_sampled_by_the_recipe(tiny_base, tmp_path):
    rows = sample("int_sample", tiny_base, tmp_path)
    (summary,) = metrics(tmp_path)
    failed = summary["rollouts"] - 3 * 8
    assert 0 < summary["kept"] == len(rows) < failed, "the selection keeps all or nothing, which says little"
    assert summary["policy_tokens"] > 24 * summary["completion_tokens_mean"], "the rewritten turns are sampled tokens too"
    for row in rows:
        told = row["provenance"]
        assert (told["sampled_by"], told["rewritten_by"]) == ("student", "teacher")
        turns = [message for message in row["completion"] if message["role"] == "assistant"]
        assert len(turns) == told["rewritten_turn"] + 1


def test_sampling_without_any_reward_ends_in_one_sentence(tiny_base, tmp_path):
    rows = [f"tiny_world train row {row}" for row in range(512)]
    with pytest.raises(InputError, match=r"no rollout of the run has a reward \(reward_error \d+\); the warning above"):
        sample("rft_sample", tiny_base, tmp_path, environment__fail="raise", environment__fail_on=rows)
    assert not (tmp_path / "traces.jsonl").exists()


def test_rollouts_that_failed_count_as_sampled_and_not_among_those_that_could_be_kept(kept, tiny_base, tmp_path):
    row = metrics(kept[0])[0] | {"example": kept[1][0]["provenance"]["example"]}
    rows = sample("rft_sample", tiny_base, tmp_path, environment__fail="raise", environment__fail_on=[row["example"]])
    (summary,) = metrics(tmp_path)
    assert summary["dropped/reward_error"] == 8 and summary["rollouts"] == row["rollouts"] == 24
    assert summary["kept_frac"] == pytest.approx(len(rows) / 16) and len(rows) < row["kept"]


def test_a_run_that_ends_in_the_middle_leaves_no_traces_and_removes_earlier_ones(kept, tiny_base, tmp_path, monkeypatch):
    """A run that ends in the middle leaves no traces, and takes those of an earlier run away."""
    (tmp_path / "traces.jsonl").write_text("an earlier run's\n")

    class Stopped(BaseException):
        pass

    written = []

    def stop_at_second(path, rows):
        written.append(path)
        if len(written) == 2:
            raise Stopped
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    with monkeypatch.context() as patch:
        patch.setattr(sample_distributed, "write_jsonl", stop_at_second)
        with pytest.raises(Stopped):
            sample("rft_sample", tiny_base, tmp_path)
    assert not (tmp_path / "traces.jsonl").exists() and not (tmp_path / "metrics.jsonl").exists()
    assert sample("rft_sample", tiny_base, tmp_path) == kept[1], "what the killed run left aside is in the file"


def test_a_selection_that_keeps_nothing_says_so_and_leaves_no_traces(tiny_base, tmp_path):
    for reason, changes in (
        (r"mean reward 0\.\d+, \d\d?% cut off", {"selection__threshold": 9.0}),
        (r"mean reward 0\.\d+, 100% cut off", {"sampler__max_new_tokens": 1}),
    ):
        sentence = (
            rf"Successes kept none of 24 rollouts \(view teacher, {reason} by a token limit\), so there are no traces; raise"
        )
        with pytest.raises(InputError, match=sentence):
            sample("rft_sample", tiny_base, tmp_path, **changes)
    for view, advice in (("student", "set view=teacher, or lower"), ("teacher", r"sampler\.max_new_tokens, or lower")):
        with pytest.raises(InputError, match=advice):
            sample("rft_sample", tiny_base, tmp_path, selection__threshold=9.0, view=view)
    assert not (tmp_path / "traces.jsonl").exists()
    (summary,) = metrics(tmp_path)
    assert (summary["rollouts"], summary["kept"]) == (24, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt=0 must be a whole number of at least 1"),
        ({"prompts_per_batch": 0}, "prompts_per_batch=0 must be a whole number of at least 1"),
        ({"selection": None}, "config key selection is missing"),
        ({"max_steps": 3}, "config key max_steps is not read"),
    ],
)
def test_sampling_keys_that_cannot_work_are_refused(change, said, tiny_base, tmp_path):
    with pytest.raises(InputError, match=said):
        SampleRecipe(sample_config("rft_sample", tiny_base, tmp_path, **change))


# ------------------------------------------------------------------------------------------- stages without their input


def test_supervised_stages_name_the_command_that_writes_their_traces(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, before in (("rft", "rft_sample"), ("int_sft", "int_sample")):
        command = f"tune run --nproc_per_node 1 recipes/sample_distributed.py --config configs/tiny/{before}.yaml"
        with pytest.raises(InputError, match=f"does not exist; .* run `{command}` first"):
            run(name, small_config(name, tiny_base, tmp_path / name))


def test_supervised_training_runs_on_the_traces(kept, tiny_base, tmp_path):
    folder, rows = kept
    run("rft", small_config("rft", tiny_base, tmp_path, dataset__source=str(folder / "traces.jsonl"), max_steps=2))
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    assert all(row["policy_tokens"] > 0 for row in metrics(tmp_path)) and rows


def small_rl(base, folder, first_stage, **changes):
    """The small sft_rl, whose first stage is expected in ``first_stage`` and whose base is ``base``."""
    changes = {"max_steps": 2, "save_every_steps": 1, "fallback_checkpoint_dir": str(base)} | changes
    return small_config("sft_rl", first_stage, folder, **changes)


def test_a_missing_first_stage_is_replaced_by_the_base_and_told(tiny_base, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run("sft_rl", small_rl(tiny_base, tmp_path / "fallen", tmp_path / "nowhere"))
    (said,) = [record.getMessage() for record in caplog.records if "fallback_checkpoint_dir" in record.getMessage()]
    missing = tmp_path / "nowhere"
    assert said == (
        f"starting from fallback_checkpoint_dir {tiny_base}, since {missing} does not exist: the stage before was not run"
    )
    recorded = OmegaConf.load(tmp_path / "fallen" / "config.yaml")
    assert recorded.checkpointer.checkpoint_dir == str(tiny_base)
    run("sft_rl", small_rl(tiny_base, tmp_path / "plain", tiny_base))
    assert_same_tensors(weights_of(tmp_path / "fallen"), weights_of(tmp_path / "plain"))
    assert metrics(tmp_path / "fallen") == metrics(tmp_path / "plain")


def test_a_first_stage_that_exists_is_used_without_a_message(tiny_base, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run("sft_rl", small_rl(tmp_path / "no base", tmp_path / "run", tiny_base))
    assert not [record for record in caplog.records if "fallback" in record.getMessage()]
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").checkpointer.checkpoint_dir == str(tiny_base)


def test_a_missing_fallback_is_the_usual_error(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint folder .*/gone does not exist"):
        run("sft_rl", small_rl(tmp_path / "gone", tmp_path / "run", tmp_path / "nowhere"))


def test_a_resumed_run_keeps_the_folder_that_it_began_with(tiny_base, tmp_path):
    """The frozen teacher is made of it: the first stage's weights, come into being meanwhile, must not become the teacher."""
    frozen = {"teacher": {"_component_": "pidistill.teachers.FrozenTeacher"}}
    whole, halved, first_stage = tmp_path / "whole", tmp_path / "halved", tmp_path / "first_stage"
    run("sft_rl", small_rl(tiny_base, whole, first_stage, **frozen))
    run("sft_rl", small_rl(tiny_base, halved, first_stage, max_steps=1, **frozen))
    shutil.copytree(tiny_base, first_stage)
    other = {name: 2 * tensor for name, tensor in weights_of(first_stage, ".").items()}
    save_file(other, first_stage / "model.safetensors", metadata={"format": "pt"})
    run("sft_rl", small_rl(tiny_base, halved, first_stage, resume_from_checkpoint=True, **frozen))
    assert metrics(halved) == metrics(whole)
    assert OmegaConf.load(halved / "config.yaml").checkpointer.checkpoint_dir == str(tiny_base)


def test_a_resumed_run_does_not_fall_back_when_its_first_stage_is_gone(tiny_base, tmp_path):
    first_stage = tmp_path / "first_stage"
    shutil.copytree(tiny_base, first_stage)
    run("sft_rl", small_rl(tiny_base, tmp_path / "run", first_stage, max_steps=1))
    shutil.rmtree(first_stage)
    with pytest.raises(InputError, match=r"checkpoint folder .*first_stage does not exist"):
        run("sft_rl", small_rl(tiny_base, tmp_path / "run", first_stage, resume_from_checkpoint=True))
