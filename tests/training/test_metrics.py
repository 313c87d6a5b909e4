"""Test what a run reports: sums do not depend on how the work was cut, and a number that was not computed is absent."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.chat.phrases import privileged_overlap, says_leak_phrase
from pidistill.distributed.run import Run
from pidistill.objectives.base import BOTH_KLS
from pidistill.training.metrics import advantage_sums, rollout_means, rollout_sums, token_means, token_sums
from pidistill.training.metrics_log import MetricsLog, shared_config
from pidistill.types import Divergence, Example, PromptPair, Rollout, RolloutAdvantage, Scores
from tests.support.builders import CPU, batch_of, random_rollouts

KL = BOTH_KLS[0]


def scores_of(batch, seed=0, entropy=True):
    generator = torch.Generator().manual_seed(seed)

    def random():
        return torch.rand(batch.targets.numel(), generator=generator)

    student = -3 * random()
    return Scores(
        student_logprobs=student,
        teacher_logprobs=student + random() - 0.5,
        divergences={KL: random(), BOTH_KLS[1]: random(), Divergence("kl_teacher_student", grad="student"): random()},
        student_entropy=random() if entropy else None,
        teacher_entropy=random() if entropy else None,
    )


def part_of(scores, keep):
    return Scores(
        scores.student_logprobs[keep],
        scores.teacher_logprobs[keep],
        {d: value[keep] for d, value in scores.divergences.items()},
        scores.student_entropy[keep],
        scores.teacher_entropy[keep],
    )


def slow_quarters(batch, values):
    """Mean of the values in each quarter of the rollouts: token t of T is in the quarter that t/T falls into."""
    quarters = [[], [], [], []]
    for rollout in batch.rollout_index.unique().tolist():
        own = [value for value, r in zip(values.tolist(), batch.rollout_index.tolist(), strict=True) if r == rollout]
        for t, value in enumerate(own):
            quarters[next(q for q in range(4) if t / len(own) < (q + 1) / 4)].append(value)
    return {f"kl_teacher_student_q{q + 1}": statistics.fmean(values) for q, values in enumerate(quarters) if values}


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_token_means_are_means_over_all_policy_tokens_however_they_were_cut(turns):
    rollouts = random_rollouts(7, turns=turns)
    whole = batch_of(rollouts)
    scores = scores_of(whole)
    extra = {"clip_frac": (scores.student_logprobs < -1).float()}
    n = whole.targets.numel()

    sums, done = {}, 0
    for i in (slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 7)):  # micro-batches, one of them empty
        batch = batch_of(rollouts[i])
        keep = slice(done, done + batch.targets.numel())
        done = keep.stop
        for name, value in token_sums(batch, part_of(scores, keep), {"clip_frac": extra["clip_frac"][keep]}).items():
            sums[name] = sums.get(name, 0.0) + value
    means = token_means(sums, n)

    ratios = [math.exp(s - m) for s, m in zip(scores.student_logprobs.tolist(), whole.ratio_logprobs.tolist(), strict=True)]
    expected = {
        "kl_teacher_student_nats": statistics.fmean(scores.divergences[KL].tolist()),
        "kl_student_teacher_nats": statistics.fmean(scores.divergences[BOTH_KLS[1]].tolist()),
        "entropy_nats": statistics.fmean(scores.student_entropy.tolist()),
        "teacher_entropy_nats": statistics.fmean(scores.teacher_entropy.tolist()),
        "student_nll_nats": -statistics.fmean(scores.student_logprobs.tolist()),
        "teacher_nll_nats": -statistics.fmean(scores.teacher_logprobs.tolist()),
        "clip_frac": statistics.fmean(extra["clip_frac"].tolist()),
        "ess_frac": sum(ratios) ** 2 / sum(r**2 for r in ratios) / n,
        **slow_quarters(whole, scores.divergences[KL]),
    }
    assert done == n
    assert means == pytest.approx(expected, rel=1e-5)


def test_a_completion_shorter_than_four_tokens_leaves_quarters_empty():
    rollouts = [r for r in random_rollouts(60, turns=1, group_size=1) if r.policy_tokens == 2]
    batch = batch_of(rollouts)
    means = token_means(token_sums(batch, scores_of(batch), {}), batch.targets.numel())
    assert len(rollouts) > 3
    assert [q for q in (1, 2, 3, 4) if f"kl_teacher_student_q{q}" in means] == [1, 3]


def test_what_was_not_computed_is_absent():
    batch = batch_of(random_rollouts(2))
    bare = Scores(scores_of(batch).student_logprobs, None, {}, None, None)
    assert token_means(token_sums(batch, bare, {}), 5).keys() == {"ess_frac", "student_nll_nats"}
    batch.ratio_logprobs = None
    assert token_means(token_sums(batch, bare, {}), 5).keys() == {"student_nll_nats"}
    assert token_means({"entropy_nats": 0.0}, 0) == {}
    empty = batch_of([])
    assert token_means(token_sums(empty, scores_of(empty), {}), 0) == {}


def test_equal_policies_have_the_whole_sample_as_effective_size():
    batch = batch_of(random_rollouts(3))
    scores = Scores(batch.ratio_logprobs.clone(), None, {}, None, None)
    assert token_means(token_sums(batch, scores, {}), batch.targets.numel())["ess_frac"] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------- rollouts


def rollout(text="", *, privileged=None, reward=0.0, stop="done", turns=None, parts=None):
    turns = [{"role": "assistant", "content": text}] if turns is None else turns
    example = Example("row", [], privileged)
    prompts = PromptPair([1], [1], privileged is not None)
    return Rollout(example, prompts, [1, 2], [True, False], None, "student", 0, stop, turns, reward, parts or {})


def test_rollout_means_are_those_of_all_rollouts_together():
    rollouts = [rollout(reward=r, stop=s, parts={"right": r}) for r, s in ((1.0, "done"), (0.25, "length"), (0.0, "done"))]
    parts = [rollout_sums(part, 0.25, ["hint"]) for part in (rollouts[:1], [], rollouts[1:])]  # as over ranks
    sums = {name: sum(part.get(name, 0.0) for part in parts) for name in parts[0] | parts[2]}
    rewards = [1.0, 0.25, 0.0]
    expected = {
        "reward_mean": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "success_frac": 2 / 3,
        "completion_tokens_mean": 1.0,
        "truncated_frac": 1 / 3,
        "turn_truncated_frac": 0.0,
        "leak_frac": 0.0,
        "reward/right": statistics.fmean(rewards),
    }
    assert rollout_means(sums) == pytest.approx(expected)


def test_numbers_of_rewards_leave_out_rollouts_without_one_and_success_leaves_out_shaping():
    """A group of two and one of three, one of these without a reward, on two ranks."""
    groups, weights = [0, 0, 1, 1, 1], [1.5, 0.5, 1.0, 2.0, 0.0]
    rewards, given = [0.75, 0.0, 1.0, 1.0, None], [1.0, 0.0, 1.0, 1.0, None]  # shaping took a quarter from the first
    stops = ["done", "turn_length", "done", "length", "curriculum"]
    pairs = []
    for group, weight, reward, task, stop in zip(groups, weights, rewards, given, stops, strict=True):
        one = rollout(reward=reward, stop=stop)
        one.group, one.task_reward = group, task
        advantage = {0: 0.375 if reward else -0.375, 1: 0.0}[group]
        pairs.append((one, RolloutAdvantage(advantage, snis_weight=weight)))
    ranks = [rollout_sums([r for r, _ in part], 1.0, []) | advantage_sums(part) for part in (pairs[:2], pairs[2:])]
    means = rollout_means({name: sum(rank.get(name, 0.0) for rank in ranks) for name in ranks[0] | ranks[1]})
    # Shares of the weights: 3/4 and 1/4; 1/3, 2/3 and 0. Effective sizes 1 / sum of squares, each for all of its group.
    sizes = [1 / (9 / 16 + 1 / 16)] * 2 + [1 / (1 / 9 + 4 / 9)] * 3
    expected = {"reward_mean": 2.75 / 4, "success_frac": 3 / 4, "zero_advantage_frac": 2 / 4, "snis_ess": sum(sizes) / 5}
    expected |= {"truncated_frac": 2 / 5, "turn_truncated_frac": 1 / 5}
    others = rollout_sums([rollout(reward=1.0)] * 5, 1.0, []) | advantage_sums([(rollout(reward=1.0), RolloutAdvantage(1.0))])
    both = {name: sum(rank.get(name, 0.0) for rank in (*ranks, others)) for name in ranks[0] | ranks[1]}
    assert rollout_means(both)["snis_ess"] == pytest.approx(sum(sizes) / 5), "rollouts of other objectives have no weight"
    assert {name: means[name] for name in expected} == pytest.approx(expected)


def test_no_rollouts_have_no_means():
    assert rollout_means(rollout_sums([], 1.0, ["hint"])) == {}


def test_without_phrases_there_is_no_leak_rate():
    assert "leak_frac" not in rollout_sums([rollout("hint")], 1.0, [])


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("the hint says 4", True),
        ("HINT: four", True),
        ("(hint)", True),
        ("a hinted answer", False),
        ("hints", False),
        ("my_hint", False),
        ("h i n t", False),
        ("", False),
    ],
)
def test_leak_phrases_are_whole_words_in_any_case(text, leaks):
    assert says_leak_phrase(rollout(text), ["reference answer", "hint"]) is leaks


def test_leak_phrases_are_text_not_patterns():
    assert says_leak_phrase(rollout("see (a.b)"), ["a.b"])
    assert not says_leak_phrase(rollout("see (axb)"), ["a.b"])
    assert says_leak_phrase(rollout("c++ it is"), ["c++"])
    assert says_leak_phrase(rollout("根据参考答案可知"), ["参考答案"]), "no spaces stand between words there"


def test_only_what_the_assistant_says_leaks():
    tool = [{"role": "tool", "content": "hint"}, {"role": "assistant", "content": None, "tool_calls": []}]
    assert not says_leak_phrase(rollout(turns=tool), ["hint"])
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "no"}, {"type": "text", "text": " hint"}]}]
    assert says_leak_phrase(rollout(turns=parts), ["hint"])
    assert not says_leak_phrase(rollout(turns=parts), ["type"]), "the keys of a content part are not text"


def test_overlap_counts_the_said_four_grams_that_stand_in_the_privileged_text():
    given = "add three to five and get eight"
    said = "I Add three to five and stop there"
    assert privileged_overlap(rollout(said, privileged=given)) == (2, 5)
    as_messages = [{"role": "user", "content": given}]
    assert privileged_overlap(rollout(said, privileged=as_messages)) == (2, 5)
    assert privileged_overlap(rollout(said)) == (0, 0)
    assert privileged_overlap(rollout("too short", privileged=given)) == (0, 0)
    assert privileged_overlap(rollout(said, privileged=given), n=1)[0] == 5


# ------------------------------------------------------------------------------------------- metrics.jsonl


class Logger:
    """A torchtune metric logger that remembers."""

    rows: list = []  # noqa: RUF012

    def log_dict(self, payload, step):
        Logger.rows.append((step, dict(payload)))

    def close(self):
        Logger.rows.append("closed")


def log_in(folder: Path, first_step=0, rank=0, logger=False) -> MetricsLog:
    cfg = OmegaConf.create({"metric_logger": {"_component_": "tests.training.test_metrics.Logger"} if logger else None})
    run = Run(CPU, torch.float32, rank, 2, 0, folder)
    return MetricsLog(cfg, run, first_step=first_step, last_step=9, title="test")


def rows_in(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    log = log_in(tmp_path)
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.0, "tokens": 3})
    assert rows_in(tmp_path) == [{"step": 1, "lr": 0.0, "tokens": 3}]


def test_only_the_first_rank_writes(tmp_path):
    log = log_in(tmp_path, rank=1)
    log.write({"step": 1, "loss": 1.0})
    log.texts(1, [{"example": "row", "view": "student", "reward": 0.0, "text": "x"}])
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_the_configured_logger_gets_every_number_and_is_closed(tmp_path):
    Logger.rows = []
    log = log_in(tmp_path, logger=True)
    log.write({"step": 2, "loss": 1.5, "policy_tokens": 7, "name": "text"})
    log.close()
    assert Logger.rows == [(2, {"loss": 1.5, "policy_tokens": 7}), "closed"]


class FailingLogger:
    """A metric logger whose server is down."""

    def log_dict(self, payload, step):
        raise ConnectionError("the network is unreachable")

    def log_table(self, name, rows, step):
        raise ConnectionError("the network is unreachable")

    def close(self):
        raise ConnectionError("the network is unreachable")


def test_a_logger_that_fails_is_warned_of_once_and_the_run_continues(tmp_path, caplog):
    cfg = OmegaConf.create({"metric_logger": {"_component_": "tests.training.test_metrics.FailingLogger"}})
    log = MetricsLog(cfg, Run(CPU, torch.float32, 0, 1, 0, tmp_path), first_step=0, last_step=9, title="test")
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5, "eval_student_success": 0.5})
    log.texts(2, [{"example": "row", "view": "student", "reward": 0.0, "text": "x"}])
    log.close()
    assert [row["step"] for row in rows_in(tmp_path)] == [1, 2]
    (said,) = caplog.messages
    assert "metric_logger FailingLogger failed (ConnectionError: the network is unreachable); the run continues" in said


def test_a_logger_gets_grouped_names_and_metrics_jsonl_keeps_the_old_ones(tmp_path):
    Logger.rows = []
    names = {
        "eval_student_success": "eval/student_success",
        "eval_reward/right": "eval/reward/right",
        "time_score_s": "time/score_s",
        "kl_teacher_student_nats": "kl/teacher_student_nats",
        "sampler_mismatch_max_nats": "sampler_mismatch/max_nats",
        "reward/right": "reward/right",
        "loss": "loss",
    }
    log_in(tmp_path, logger=True).write({"step": 1, **dict.fromkeys(names, 0.5)})
    assert Logger.rows == [(1, dict.fromkeys(names.values(), 0.5))]
    assert rows_in(tmp_path) == [{"step": 1, **dict.fromkeys(names, 0.5)}]


def test_a_logger_gets_the_config_without_what_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    cfg = OmegaConf.create({"seed": 3, "again": "${seed}", "deep": [{"key": "${oc.env:SECRET_TOKEN}"}], "metric_logger": None})
    resolved = OmegaConf.to_container(shared_config(cfg), resolve=True)
    assert resolved == {"seed": 3, "again": 3, "deep": [{"key": "${oc.env:SECRET_TOKEN}"}], "metric_logger": None}


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_torchtunes_logger_writes_config_and_numbers(tmp_path, package, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    name, where = {"tensorboard": ("TensorBoardLogger", "log_dir"), "wandb": ("WandBLogger", "log_dir")}[package]
    logger = {"_component_": f"torchtune.training.metric_logging.{name}", where: str(tmp_path / "log")}
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "seed": 7, "metric_logger": logger})
    (tmp_path / "log").mkdir()
    log = MetricsLog(cfg, Run(CPU, torch.float32, 0, 1, 0, tmp_path), first_step=0, last_step=9, title="test")
    log.write({"step": 1, "eval_student_success": 0.5})
    log.close()
    assert "seed: 7" in (tmp_path / "torchtune_config.yaml").read_text()
    assert any((tmp_path / "log").rglob("*"))


ODD = "line\u2028separator \u0085 next \x0b tab \ud83d half a pair, \U0001f600"


def test_a_resumed_log_keeps_the_rows_up_to_the_checkpoint(tmp_path):
    log = log_in(tmp_path)
    for step in (0, 1, 2, 2, 3):
        log.write({"step": step})
        log.texts(step, [{"example": "row", "view": "student", "reward": 0.0, "text": ODD}])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 3, "los')
    log_in(tmp_path, first_step=2).write({"step": 3})
    assert [row["step"] for row in rows_in(tmp_path)] == [0, 1, 2, 2, 3]
    texts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [text["step"] for text in texts] == [0, 1, 2, 2]
    assert {text["text"] for text in texts} == {ODD}


def test_a_fresh_log_in_an_old_folder_starts_empty(tmp_path):
    log_in(tmp_path).write({"step": 0})
    log_in(tmp_path).write({"step": 5})
    assert rows_in(tmp_path) == [{"step": 5}]
