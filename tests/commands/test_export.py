"""Test `pidistill export`: what the shared folder holds and what its card says."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pidistill.commands.export.command import export, main
from pidistill.errors import InputError
from pidistill.tokenizers import HFChatTokenizer
from tests.support.reported_runs import write_evaluation, write_run
from tests.support.tiny_tokenizers import qwen_folder


@pytest.fixture
def run(tmp_path):
    folder, base = write_run(tmp_path / "my_run"), tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text('{"own": 1}')
    (base / "model.safetensors").write_text("other weights")
    step = folder / "step_6"
    step.mkdir()
    for name in ("config.json", "model.safetensors", "training_state.pt"):
        (step / name).write_text(name)
    (step / "adapter").mkdir()
    (step / "adapter" / "adapter_model.safetensors").write_text("merged already")
    config = f"checkpointer:\n  checkpoint_dir: {base}\nobjective:\n  _component_: pidistill.objectives.OPSD\n  beta: 0.5\n"
    (folder / "config.yaml").write_text(config + "dataset:\n  source: rows_<b>.jsonl\nprivileged:\n  control: null\nseed: 3\n")
    return folder


def test_the_folder_has_weights_and_tokenizer_and_no_training_state(run, tmp_path):
    out = export(run, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert (out / "model.safetensors").read_text() == "model.safetensors"
    assert not (out / "README.md").is_symlink() and (run / "step_6" / "training_state.pt").is_file()


def test_the_tokenizer_of_the_config_comes_before_that_of_the_checkpoint_the_run_started_from(run, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text('{"words": 1}')
    with (run / "config.yaml").open("a") as file:
        file.write(f"words: {tmp_path}/words\ntokenizer:\n  path: ${{words}}\n")
    assert (export(run, tmp_path / "out") / "tokenizer.json").read_text() == '{"words": 1}'


@pytest.fixture
def chat_run(run, tmp_path):
    """A run of a real tokenizer, whose template it replaces; the checkpoint holds the base's files."""
    folder = qwen_folder(tmp_path / "instruct")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    shutil.copytree(folder, run / "step_6", dirs_exist_ok=True)

    def with_settings(**settings):
        node = {"_component_": "pidistill.tokenizers.HFChatTokenizer", "path": str(folder), **settings}
        with (run / "config.yaml").open("a") as file:
            file.write(OmegaConf.to_yaml({"tokenizer": node}))
        return run, HFChatTokenizer(**{key: value for key, value in node.items() if key != "_component_"})

    return with_settings


MESSAGES = [{"role": "user", "content": "hello"}]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("as_file", [True, False])
def test_transformers_builds_the_prompts_of_the_run_from_the_exported_folder_and_the_call_of_its_card(
    as_file, chat_run, tmp_path
):
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "own.jinja").write_text(TEMPLATE)
    chosen = str(tmp_path / "own.jinja") if as_file else TEMPLATE
    run, trained = chat_run(chat_template=chosen, template_kwargs={"enable_thinking": False}, stop_tokens=["<|im_end|>"])
    out = export(run, tmp_path / "out")
    card = (out / "README.md").read_text()
    call = "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)"
    assert f"\n{call}\n" in card and '{"enable_thinking": false}' in card
    assert r"| template_kwargs.enable\_thinking | false |" in card and "| chat_template | in chat_template.jinja |" in card
    assert r'| stop_tokens | \["\<\|im\_end\|\>"\] |' in card
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    prompt = eval(call, {"tokenizer": tokenizer, "messages": MESSAGES})
    assert prompt == trained.decode(trained.encode_prompt(MESSAGES)) and prompt.endswith("<think></think>")
    assert tokenizer.apply_chat_template(MESSAGES, tools=[], tokenize=False, add_generation_prompt=True)
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert not (out / "additional_chat_templates").exists()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == sorted(trained.stop_ids)


def test_the_exported_model_stops_where_the_tokenizers_own_folder_says(chat_run, run, tmp_path):
    (run / "step_6" / "generation_config.json").write_text('{"eos_token_id": 1, "top_p": 0.9}')
    (tmp_path / "instruct" / "generation_config.json").write_text('{"eos_token_id": [7, 5], "top_p": 0.5}')
    (run / "step_6" / "tokenizer.json").unlink()
    run, _ = chat_run()
    assert json.loads((export(run, tmp_path / "out") / "generation_config.json").read_text()) == {
        "eos_token_id": [7, 5],
        "top_p": 0.9,
    }


def test_a_tokenizer_of_its_own_folder_that_is_not_found_from_here_is_refused(chat_run, tmp_path):
    run, _ = chat_run()
    shutil.move(tmp_path / "instruct", tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"tokenizer.path=.*instruct of the run is not found; .* or export from the folder"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_template_of_the_tokenizers_own_folder_replaces_that_of_the_checkpoint(chat_run, run, tmp_path):
    (run / "step_6" / "chat_template.jinja").write_text("the base's")
    run, _ = chat_run()
    out = export(run, tmp_path / "out")
    assert not (out / "chat_template.jinja").exists()
    assert (out / "tokenizer_config.json").read_text() == (tmp_path / "instruct" / "tokenizer_config.json").read_text()
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert "## Prompt" not in (out / "README.md").read_text()


def test_a_template_of_the_training_that_is_gone_is_refused_before_anything_is_written(chat_run, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    run, _ = chat_run(chat_template=str(tmp_path / "own.jinja"))
    (tmp_path / "own.jinja").unlink()
    with pytest.raises(InputError, match=r"chat template that the run was trained with is not found .*own.jinja.*put its file"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_says_that_tools_were_plain_text(chat_run, tmp_path):
    run, _ = chat_run(tool_format="action")
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "| tool_format | action |" in text and "plain text in the messages" in text


def test_the_card_says_method_data_results_and_alarms_of_the_run(run, tmp_path):
    (run / "sweep.json").write_text('{"commit": "abc123"}')
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    for piece in ("**OPSD**", "`step_6` after 6 steps", "| beta | 0.5 |", "success 0.25 [0.1, 0.4]", "Commit abc123", "Seed 3"):
        assert piece in text
    assert "step 3: all are cut" in text and r"rows\_\<b\>.jsonl" in text and "<b>" not in text


def test_without_an_evaluation_the_card_says_that_its_numbers_are_of_validation_rows(run, tmp_path):
    (run / "evaluate" / "results.json").unlink()
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "Validation rows at the last evaluation" in text and "eval_teacher_success 0.500" in text


def test_the_card_of_an_earlier_checkpoint_has_its_own_numbers_and_not_those_of_the_last(run, tmp_path):
    (run / "step_2").mkdir()
    for name in ("config.json", "model.safetensors"):
        (run / "step_2" / name).write_text(name)
    for checkpoint, success in (("step_2", 0.125), ("step_6", 0.875)):
        write_evaluation(run / f"evaluate_{checkpoint}", {"student": {"success": success}}, config=f"{run}/{checkpoint}")
    (run / "evaluate" / "results.json").unlink()
    first = (export(run, tmp_path / "first", "step_2") / "README.md").read_text()
    assert "`step_2` after 2 steps" in first and "0.125" in first and "0.875" not in first
    last = (export(run, tmp_path / "last") / "README.md").read_text()
    assert "`step_6` after 6 steps" in last and "0.875" in last and "0.125" not in last


def test_the_card_has_no_numbers_of_the_base_and_of_the_step_that_latest_was_before(run, tmp_path):
    write_evaluation(run / "evaluate", {"student": {"success": 0.875}}, "../step_2", f"{run}/latest")
    write_evaluation(run / "base_test", {"student": {"success": 0.125}}, "../../base", f"{tmp_path}/base")
    write_evaluation(run / "older_base_test", {"student": {"success": 0.0625}}, config=f"{tmp_path}/base")
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "Validation rows at the last evaluation" in text and "left out" not in text
    assert not [number for number in ("0.875", "0.125", "0.0625") if number in text]


def test_the_card_leaves_out_an_evaluation_whose_folder_says_latest_alone_and_says_so(run, tmp_path):
    write_evaluation(run / "old", {"student": {"success": 0.875}}, config=f"{run}/latest")
    write_evaluation(run / "no_config", {"student": {"success": 0.625}})
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "success 0.25" in text and "0.875" not in text and "0.625" not in text
    views = r"student, no\_config, step not recorded; student, old, step not recorded"
    assert f"does not record the checkpoint that answered are left out: {views}.\n" in text


def test_an_evaluation_of_the_base_with_the_adapter_of_a_step_is_of_that_step(run, tmp_path):
    write_evaluation(run / "evaluate", {"student": {"success": 0.875}}, "../step_6/adapter", f"{tmp_path}/base")
    assert "0.875" in (export(run, tmp_path / "out") / "README.md").read_text()
    shutil.copytree(run, tmp_path / "copy" / "run", symlinks=True)
    shutil.rmtree(run)
    assert "0.875" in (export(tmp_path / "copy" / "run", tmp_path / "second") / "README.md").read_text()


def test_validation_numbers_of_a_card_are_those_up_to_its_checkpoint(run, tmp_path):
    (run / "evaluate" / "results.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "eval_teacher_success": 0.75}\n')
    (run / "step_2").mkdir()
    for name in ("config.json", "model.safetensors"):
        (run / "step_2" / name).write_text(name)
    assert "eval_teacher_success 0.500" in (export(run, tmp_path / "first", "step_2") / "README.md").read_text()
    assert "eval_teacher_success 0.750" in (export(run, tmp_path / "last") / "README.md").read_text()


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(run, tmp_path):
    with pytest.raises(InputError, match=r"step_9 holds no config.json .* \(checkpoints there: step_6\)"):
        export(run, tmp_path / "out", "step_9")
    with pytest.raises(InputError, match="checkpoints there: none"):
        export(tmp_path / "absent", tmp_path / "out")


def test_a_folder_with_files_is_not_written_into(run, tmp_path):
    with pytest.raises(InputError, match="is not an empty folder"):
        export(run, run)
    (tmp_path / "empty").mkdir()
    assert export(run, tmp_path / "empty") == tmp_path / "empty"


@pytest.mark.parametrize("function", ["copyfile", "copy"])
@pytest.mark.parametrize("exists", [False, True])
def test_an_export_to_a_full_disk_says_so_leaves_nothing_and_can_be_tried_again(exists, function, run, tmp_path, monkeypatch):
    """`copyfile` is called for the weights, whose errors are collected, and `copy` for the tokenizer."""
    output = tmp_path / "folder" / "out"
    if exists:
        output.mkdir(parents=True)

    def fail(source, target, **options):
        Path(target).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, function, fail)
        with pytest.raises(InputError, match=r"out cannot be written \(No space left on device\); name another folder"):
            export(run, output)
    assert [path.name for path in (tmp_path / "folder").rglob("*")] == ["out"] * exists
    assert export(run, output) == output and (output / "README.md").is_file()
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["out"]
    assert output.stat().st_mode & 0o777 == (run / "step_6").stat().st_mode & 0o777


def test_a_folder_inside_of_the_checkpoint_is_exported_once(run):
    output = export(run, run / "step_6" / "shared")
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_a_push_without_the_library_or_network_is_one_sentence(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit):
        main([str(run), "--output", str(tmp_path / "out"), "--push", "me/model"])
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "out") and "--push needs the package huggingface_hub" in captured.err
