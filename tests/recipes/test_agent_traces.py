"""Test the τ-bench configs on real traces with a tiny model: three tasks, every token of their episodes."""

import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from pidistill.commands.trace_report import both_views, main
from pidistill.config import build
from pidistill.data import build_prompts, demonstration, trace_dataset
from pidistill.envs import ReplayEnvironment
from pidistill.losses.reductions import token_mean
from pidistill.objectives import PiDistill
from pidistill.privileged.hint_file import read_hints
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.privileged.trace_kinds import KINDS
from pidistill.rollouts import Sample, collect_rollouts
from pidistill.scoring.batch import make_batch
from pidistill.scoring.score import score
from pidistill.testing import tiny_model
from pidistill.tokenizers import HFChatTokenizer
from pidistill.training.start import cleanup
from pidistill.types import Rollout, ScoreRequest
from recipes.sample_distributed import SampleRecipe
from tests.support.chat_templates import ONE_SYSTEM
from tests.support.tiny_qwen import ROOT, VOCABULARY, load_config, qwen_checkpoint, read_metrics, set_up, small_model
from tests.support.tiny_tokenizers import qwen_folder

DATA = os.environ.get("PIDISTILL_TEST_DATA")
REAL = Path(DATA or ".") / "tau_bench_airline_gpt4o.jsonl"
pytestmark = pytest.mark.skipif(not REAL.is_file(), reason="PIDISTILL_TEST_DATA names no folder with the τ-bench traces")

TASKS = (0, 1, 18)  # the first has no success, the others have short ones; the last has no reference actions
SENTINEL = "ZQXJ7KVW"
LIMIT = 6144
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return [row for row in map(json.loads, REAL.open()) if row["task_id"] in TASKS]


@pytest.fixture(scope="session")
def qwen(rows, tmp_path_factory) -> Path:
    texts = [message["content"] or json.dumps(message.get("tool_calls")) for row in rows for message in row["messages"][1:]]
    texts += [rows[0]["messages"][0]["content"]] * 3 + [SENTINEL]
    return qwen_checkpoint(tmp_path_factory.mktemp("qwen"), texts)


@pytest.fixture(scope="session")
def tokenizer(qwen) -> HFChatTokenizer:
    return HFChatTokenizer(str(qwen), max_seq_len=LIMIT)


@pytest.fixture
def process_group():
    yield
    cleanup()


def as_file(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def planted(value):
    """The same JSON with the sentinel in every text."""
    if isinstance(value, str):
        return f"{value} {SENTINEL}"
    if isinstance(value, dict):
        return {key: planted(item) for key, item in value.items()}
    return [planted(item) for item in value] if isinstance(value, list) else value


def plant_in_calls(row: dict) -> dict:
    row = json.loads(json.dumps(row))
    for message in row["messages"]:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.dumps(planted(json.loads(call["function"]["arguments"])))
    return row


def plant_in_actions(row: dict) -> dict:
    row = json.loads(json.dumps(row))
    row["task"]["actions"] = [action | {"kwargs": planted(action["kwargs"])} for action in row["task"]["actions"]]
    return row


def small(qwen: Path, source: str, output_dir: Path, new_tokens: int) -> list[str]:
    """The later override of a key wins."""
    return [*small_model(qwen, output_dir), f"model.max_seq_len={LIMIT}", f"tokenizer.max_seq_len={LIMIT}",
            "checkpointer.checkpoint_files=[model.safetensors]", f"dataset.source={source}", "dataset.messages_key=messages",
            f"sampler.max_new_tokens={new_tokens}"]  # fmt: skip


def small_config(name: str, qwen: Path, source: str, output_dir: Path, *more: str) -> DictConfig:
    rounds = ["prompts_per_round=2", "group_size=2", "micro_batch_tokens=9000", "updates_per_round=1", "max_steps=1",
              "rollout_log_steps=1", "rollout_log_max_new_tokens=12", "rollout_log_samples=3", "~save_every_steps",
              "dataset.max_tasks=3", "lr_scheduler.num_warmup_steps=1", "optimizer.lr=1e-3",
              "dataset.actions_key=task.actions", "minibatch_rollouts=null"]  # fmt: skip
    cfg = load_config(f"tau_bench/{name}", [*small(qwen, source, output_dir, 24), *rounds, *more])
    cfg.eval_dataset = None
    return cfg


# ------------------------------------------------------------------------------------------- ids and masks


class RecordedTurns:
    """A sampler that says what it is told, turn by turn; nobody drew it, so no probabilities."""

    temperature, top_p, top_k, max_new_tokens = 1.0, None, None, LIMIT

    def __init__(self, turns: list[list[list[int]]]) -> None:
        self.turns = turns  # per row, the ids of each turn

    def sample(self, model, prompts, *, on_turn_end, **settings) -> list[Sample]:
        samples = []
        for row, turns in enumerate(self.turns):
            tokens, mask = [], []
            for ids in turns:
                tokens, mask = tokens + ids, mask + [True] * len(ids)
                answer = on_turn_end(row, ids)
                if answer is None:
                    break
                tokens, mask = tokens + answer, mask + [False] * len(answer)
            samples.append(Sample(tokens, mask, [math.nan] * len(tokens), "done"))
        return samples


def turns_of(example, tokenizer) -> list[list[int]]:
    history, ids = list(example.messages), []
    for message in example.completion:
        if message["role"] == "assistant":
            ids.append(tokenizer.encode_turn(history, message, example.tools))
        history.append(message)
    return ids


@pytest.fixture(scope="session")
def replayed(rows, tokenizer, tmp_path_factory) -> list[Rollout]:
    """The successful traces played through the environment, with the calls as privileged information."""
    source = as_file(tmp_path_factory.mktemp("rows") / "traces.jsonl", rows)
    dataset = trace_dataset(source, "calls", unsolved="drop")
    prompts = build_prompts(dataset, tokenizer, PrivilegedPrompt(), max_new_tokens=2100)
    examples, pairs = zip(*prompts.prompts, strict=True)
    sampler = RecordedTurns([turns_of(example, tokenizer) for example in examples])
    collected = collect_rollouts(
        None, sampler, tokenizer, ReplayEnvironment(), examples, pairs, view="teacher", group_size=1, seeds=[0, 1]
    )
    assert len(collected.rollouts) == 2 and not any(collected.dropped.values())
    return collected.rollouts


def test_replayed_episodes_are_the_recorded_ones_id_for_id(replayed, tokenizer):
    for rollout in replayed:
        told = demonstration(rollout.example, rollout.prompts, tokenizer)
        assert (rollout.completion, rollout.policy_mask) == (told.completion, told.policy_mask)
        assert rollout.reward == 1.0 and rollout.reward_parts["followed"] == pytest.approx(1.0)
        assert rollout.stop_reason == "done" and rollout.turn_policy_tokens == told.turn_policy_tokens


def spoken(message: dict) -> str:
    """An assistant turn as Qwen's template writes it, from the raw row."""
    parts = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls") or []:
        arguments = json.dumps(json.loads(call["function"]["arguments"]), ensure_ascii=False)
        parts.append(f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(parts) + "<|im_end|>"


def test_the_policy_mask_covers_what_the_agent_said_and_nothing_else(replayed, rows, tokenizer):
    for rollout in replayed:
        (row,) = [row for i, row in enumerate(rows) if rollout.example.id.endswith(f" row {i}")]
        own = [token for token, mine in zip(rollout.completion, rollout.policy_mask, strict=True) if mine]
        assistant = [message for message in row["messages"] if message["role"] == "assistant"]
        assert tokenizer.decode(own) == "".join(map(spoken, assistant))
        others = tokenizer.decode([t for t, mine in zip(rollout.completion, rollout.policy_mask, strict=True) if not mine])
        for message in row["messages"][2:-1]:
            if message["role"] != "assistant":
                assert message["content"] in others


@pytest.fixture(scope="module")
def model():
    made = tiny_model(VOCABULARY, max_seq_len=LIMIT)
    with torch.no_grad():  # fresh weights give every token the same probability, in both views
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return made


def pi_distill_loss(model, rollouts, objective, packing="padded"):
    """−J of π-Distill per policy token. The turns are the recorded ones; μ is the live teacher, so ratios are 1."""
    batch = make_batch(rollouts, objective.advantages(rollouts, 0), pad_id=0, device=CPU, packing=packing)
    scores = score(model, batch, objective.score_request(0))
    return token_mean(objective.token_loss(batch, scores, 0).loss, len(batch.targets)), batch


def with_behaviour(model, rollouts: list[Rollout]) -> list[Rollout]:
    """Each rollout as a group of its own, with the log-probs that the teacher view gives its tokens."""
    empty = [replace(r, sampled_logprobs=[0.0] * len(r.completion)) for r in rollouts]
    batch = make_batch(empty, None, pad_id=0, device=CPU)
    with torch.no_grad():
        logprobs = score(model, batch, ScoreRequest(False, False, views=("teacher",))).teacher_logprobs.tolist()
    for rollout in empty:
        own = iter(logprobs[: rollout.policy_tokens])
        logprobs = logprobs[rollout.policy_tokens :]
        rollout.sampled_logprobs = [next(own) if mine else math.nan for mine in rollout.policy_mask]
    return [replace(rollout, group=i) for i, rollout in enumerate(empty)]


def test_a_pi_distill_step_over_replayed_episodes_touches_assistant_tokens_only(model, replayed, tokenizer):
    """Hidden states that predict observations get no gradient, and noise on them changes nothing."""
    shortest = min(replayed, key=lambda rollout: len(rollout.completion))
    group = with_behaviour(model, [shortest])
    objective = PiDistill(alpha=0.5, beta=0.25)
    kept, noise = [], {}

    def on_hidden(module, args, output):
        output.retain_grad() if output.requires_grad else None
        kept.append(output)
        return output + noise["value"] if noise else output

    handle = model.layers[-1].register_forward_hook(on_hidden)
    try:
        loss, batch = pi_distill_loss(model, group, objective)
        assert all(a.advantage == 0.0 for a in objective.advantages(group, 0)), "a recorded episode has no policy gradient"
        loss.backward()
        (hidden,) = [h for h in kept if h.grad is not None]
        expected = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        count = 0
        for view, first in (("student", 0), ("teacher", len(group))):
            for row in range(first, first + len(group)):
                at = len(shortest.prompts.of(view))
                for ids, answers in observed_turns(shortest, tokenizer):
                    expected[row, at - 1 : at - 1 + len(ids)] = True
                    at, count = at + len(ids) + len(answers), count + (view == "student") * len(ids)
        assert count == len(batch.targets) == shortest.policy_tokens
        assert torch.equal(hidden.grad.abs().sum(-1) > 0, expected)
        for where, same in ((~expected, True), (expected, False)):
            noise["value"] = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)) * where[..., None]
            changed, _ = pi_distill_loss(model, group, objective)
            assert (changed.item() == loss.item()) is same
    finally:
        handle.remove()
        model.zero_grad()


def observed_turns(rollout: Rollout, tokenizer) -> list[tuple[list[int], list[int]]]:
    """(ids of an assistant turn, ids of what answered it), encoded anew, message by message."""
    example, history, found = rollout.example, list(rollout.example.messages), []
    turns = turns_of(example, tokenizer)
    messages = list(example.completion)
    while messages:
        history.append(messages.pop(0))
        answers = []
        while messages and messages[0]["role"] != "assistant":
            answers.append(messages.pop(0))
        ids = tokenizer.encode_observations(history, answers, example.tools) if answers else []
        found.append((turns[len(found)], ids))
        history += answers
    return found


def test_packed_as_a_tree_the_loss_is_the_same(model, replayed):
    group = with_behaviour(model, replayed[:1])
    objective = PiDistill()
    with torch.no_grad():
        padded, tree = (pi_distill_loss(model, group, objective, packing)[0].item() for packing in ("padded", "tree"))
    assert tree == pytest.approx(padded, rel=1e-4) and padded > 0


# ------------------------------------------------------------------------------------------- the configs, made small


def check_only_teachers_see(rollouts: list[Rollout], tokenizer, teachers: int) -> None:
    """The sentinel is in the prompts of so many teachers, and in nothing that a student sees."""
    for rollout in rollouts:
        assert SENTINEL not in tokenizer.decode(rollout.prompts.student + rollout.completion)
    assert sum(SENTINEL in tokenizer.decode(rollout.prompts.teacher) for rollout in rollouts) == teachers


def test_no_marker_of_the_calls_reaches_a_student_that_samples(rows, qwen, tokenizer, tmp_path, process_group):
    """π-Distill through the replay environment; every argument of every recorded call holds the sentinel."""
    source = as_file(tmp_path / "traces.jsonl", [plant_in_calls(row) for row in rows])
    folder = tmp_path / "run"
    cfg = small_config("7B_pi_distill", qwen, source, folder, "prompts_per_round=3", "dataset.unsolved=keep")
    recipe = set_up("pi_distill_distributed", cfg)
    seen, sample_round = [], recipe.sample_round
    recipe.sample_round = lambda: seen.append(sample_round()) or seen[-1]
    recipe.train()
    recipe.cleanup()
    (rollouts,) = seen
    assert sorted(r.prompts.has_privileged for r in rollouts) == [False] * 2 + [True] * 4
    check_only_teachers_see(rollouts, tokenizer, teachers=4)
    (row,) = [row for row in read_metrics(folder) if "loss" in row]
    assert row["rows_without_pi"] == 1 and row["dropped_rows/other_trace_of_task"] == 9
    assert row["kl_teacher_student_nats"] > 0 and row["grad_norm"] > 0 and 0 <= row["reward/followed"] <= 1
    texts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert {text["view"] for text in texts} == {"student", "teacher"} and len(texts) == 6
    assert SENTINEL not in "".join(text["text"] for text in texts if text["view"] == "student")
    assert SENTINEL not in (folder / "metrics.jsonl").read_text()


def test_no_marker_of_the_reference_actions_reaches_a_student_on_recorded_turns(rows, qwen, tokenizer, tmp_path, process_group):
    """GKD on the recorded turns: they are the completions, so the sentinel is in the reference actions alone."""
    source = as_file(tmp_path / "traces.jsonl", [plant_in_actions(row) for row in rows])
    folder = tmp_path / "run"
    more = ("group_size=1", "dataset.kind=gold_actions", "rollout_log_steps=0", "sft_weight=0.5", "sft_batch_size=2")
    recipe = set_up("opsd_distributed", small_config("7B_recorded_gkd", qwen, source, folder, *more))
    seen, sample_round = [], recipe.sample_round
    recipe.sample_round = lambda: seen.append(sample_round()) or seen[-1]
    recipe.train()
    recipe.cleanup()
    (rollouts,) = seen
    check_only_teachers_see(rollouts, tokenizer, teachers=1)  # the other task's list of actions is empty
    assert len(rollouts) == 2 and all(rollout.prompts.has_privileged for rollout in rollouts)
    (row,) = [row for row in read_metrics(folder) if "loss" in row]
    own = sum(len(ids) for rollout in rollouts for ids in turns_of(rollout.example, tokenizer))
    assert row["policy_tokens"] == own and row["rollouts"] == row["sampled_tokens"] == 0
    assert row["loss"] == pytest.approx(row["kl_teacher_student_nats"] + 0.5 * row["sft_loss"], rel=1e-5)
    assert row["kl_teacher_student_nats"] > 0 and row["sft_loss"] > 0 and row["grad_norm"] > 0
    assert row["dropped_rows/task_without_success"] == 4 and row["dropped_rows/other_trace_of_task"] == 6


# ------------------------------------------------------------------------------------------- hints


def test_the_model_writes_its_own_hints_and_they_become_privileged_information(rows, qwen, tokenizer, tmp_path, process_group):
    source = as_file(tmp_path / "traces.jsonl", rows)
    folder = tmp_path / "hints"
    more = ("samples_per_prompt=4", "selection.threshold=0", "seed=3")
    cfg = load_config("tau_bench/7B_hints", [*small(qwen, source, folder, 300), *more])
    recipe = SampleRecipe(cfg)
    recipe.setup(cfg)
    recipe.report(recipe.sample())
    written = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    assert written and {row["provenance"]["task"] for row in written} <= {"1", "18"}
    for row in written:
        told = row["provenance"]
        assert told["checkpoint"] == str(qwen) and told["seed"] == 3 and told["sampled_by"] == "student"
        assert (told["temperature"], told["top_p"], told["max_new_tokens"], told["selection"]) == (0.7, None, 300, "Hints")
        assert "<conversation>" in row["messages"][0]["content"]
        solved = trace_dataset(source, "calls", unsolved="drop")
        assert told["trace"] == {e.data["task"]: e.id for e in solved}[told["task"]]
    hints = read_hints(str(folder / "traces.jsonl"))
    read = ("dataset.kind=hints", f"dataset.hints={folder / 'traces.jsonl'}", "eval_dataset.first_task=0")
    cfg = load_config("tau_bench/7B_pi_distill", [*small(qwen, source, folder, 24), *read, "dataset.actions_key=null"])
    for node in (cfg.dataset, cfg.eval_dataset):
        for example in build(node, header=""):
            assert example.privileged == hints.get(example.data["task"])


# ------------------------------------------------------------------------------------------- the report


def test_the_report_counts_what_a_plain_reading_counts(rows, qwen, tokenizer, tmp_path, capsys):
    source = as_file(tmp_path / "traces.jsonl", rows)
    main([source, "--tokenizer", str(qwen), "--show", "18", "actions_key=task.actions", "omit_tools=[think]"])
    printed = capsys.readouterr().out
    table = {line.split("|")[1].strip(): line for line in printed.splitlines() if line.startswith("|")}
    assert [int(table[kind].split("|")[3]) for kind in ("calls", "full", "gold_actions", "none")] == [2, 2, 3, 0]
    assert "12 traces of 3 tasks" in printed and "2 tasks solved" in printed and "derived from the calls seen" in printed
    (example,) = [e for e in trace_dataset(source, omit_tools=["think"]) if e.data["task"] == "18"]
    student, teacher = both_views(example, tokenizer).split("── teacher")
    assert example.privileged in teacher and example.privileged not in student
    assert both_views(example, tokenizer) in printed
    with pytest.raises(SystemExit) as ended:
        main([source, "--show", "7"])
    assert ended.value.code == 2 and "--show 7 is none of the tasks 0, 1, 18" in capsys.readouterr().err


def test_the_report_reads_traces_with_a_template_without_tools(rows, tmp_path, capsys):
    source = as_file(tmp_path / "traces.jsonl", rows)
    words = [source, "--tokenizer", str(qwen_folder(tmp_path / "plain", ONE_SYSTEM)), "omit_tools=[think]"]
    with pytest.raises(SystemExit):
        main(words)
    assert "set tokenizer.tool_format: action" in capsys.readouterr().err
    main([*words, "--tool-format", "action"])
    assert "policy_tokens_mean" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- the page


def test_the_pages_commands_and_snippets_are_those_that_work(rows, qwen, tmp_path, capsys):
    page = (ROOT / "docs" / "agent_traces.md").read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL)
    commands = [line for kind, text in blocks if not kind for line in text.splitlines()]
    (report,) = [shlex.split(line)[3:] for line in commands if "trace_report" in line]
    assert report[0].endswith("gpt-4o-airline.json") and report[2] == "/tmp/Qwen2.5-7B-Instruct"
    as_published = [{**row, "traj": row["messages"], "info": {"task": row["task"]}} for row in rows]
    (tmp_path / "published.json").write_text(json.dumps(as_published))
    main([str(tmp_path / "published.json"), "--tokenizer", str(qwen), "--show", "18", *report[5:]])
    assert "── teacher" in capsys.readouterr().out
    runs = [shlex.split(line) for line in commands if line.startswith("tune run")]
    assert len(runs) == 2
    for run in runs:
        assert (ROOT / run[4]).is_file() and load_config(run[6].removeprefix("configs/").removesuffix(".yaml"), run[7:])
    own, *others = [OmegaConf.create(text) for kind, text in blocks if kind == "yaml"]
    own.dataset.source = as_file(tmp_path / "own.jsonl", [row | {"tools": [{"name": "book"}]} for row in rows])
    assert len(build(own.dataset)) == 2 and isinstance(build(own.environment), ReplayEnvironment)
    snippets = [build(other.hindsight) for other in others]
    assert [type(hindsight.feedback).__name__ for hindsight in snippets] == ["ToolFeedback", "Judge"]
    listed = re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)
    assert listed == list(KINDS)
