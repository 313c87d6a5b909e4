"""Distil on policy from the student's own samples: OPSD (arXiv 2602.04942) and, without a teacher term, the RL baseline.

    round:   the student, which never sees the privileged information, answers each prompt `group_size` times
             (Guide-GRPO: a group that fails once more with it; GKD: some prompts from the dataset; SDPO: what the round
             itself reveals becomes the privileged information)
             → rewards → group-relative advantages
    update:  the teacher (itself with the privileged information, frozen, EMA) scores what the student wrote
             → policy gradient and KL per policy token → mean over the policy tokens of the whole step
             (+ `sft_weight` × −log S of demonstrations) → backward → clip → step

`diff recipes/pi_distill_distributed.py recipes/opsd_distributed.py` is the difference between the two families.

    tune run --nproc_per_node 1 recipes/opsd_distributed.py --config configs/tiny/opsd.yaml
"""

import functools
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from pidistill.config import build
from pidistill.data import load_prompts, row_completions, told_later
from pidistill.distributed.run import Timer
from pidistill.losses.reductions import token_mean
from pidistill.privileged.hindsight import add_hindsight
from pidistill.scoring.mismatch import apply_mask, load_mismatch
from pidistill.scoring.packer import Packer
from pidistill.scoring.score import score
from pidistill.teachers import LiveTeacher, Teacher
from pidistill.training.checkpoints import Checkpoints, saves_what_was_trained
from pidistill.training.compatibility import build_objective, check_method
from pidistill.training.evaluation import Evaluation, TextSamples
from pidistill.training.keys import keys_of
from pidistill.training.load import build_teacher, load_model, load_teacher
from pidistill.training.metrics import step_report, token_means, token_sums
from pidistill.training.metrics_log import MetricsLog
from pidistill.training.round_sampler import RoundSampler
from pidistill.training.rounds import RoundSizes, dump_rollouts, round_report
from pidistill.training.run_folder import log_config
from pidistill.training.start import cleanup, one_sentence_errors, start
from pidistill.training.supervised import SupervisedTerm
from pidistill.training.update import Updates, add_gradients, mark_last
from pidistill.types import Batch, PerTokenLoss, Rollout, RolloutAdvantage, ScoreRequest, Scores, ViewName
from torchtune import config

KEYS = keys_of("opsd")
REQUIRED = ("output_dir", "max_steps", "model", "tokenizer", "checkpointer", "dataset", "environment", "privileged", "sampler",
            "objective", "optimizer", "prompts_per_round", "group_size")  # fmt: skip
SAMPLING_VIEW: ViewName = "student"
SHOWN = ("reward_mean", "kl_teacher_student_nats", "leak_frac", "eval_student_success_greedy")


class OPSDRecipe:
    """Train the student on its own samples; the teacher, if there is one, scores them and gets no gradient."""

    def __init__(self, cfg: DictConfig) -> None:
        self._run = start(cfg, KEYS, REQUIRED)
        self._round_sizes = RoundSizes(cfg)
        self._max_steps = int(cfg.max_steps)
        self._timer = Timer(self._run.device)

    def setup(self, cfg: DictConfig) -> None:
        # Everything that can be wrong is built and looked at before weights are loaded.
        self._objective = build_objective(cfg)
        self._sampler = build(cfg.sampler)
        self._hindsight = build(cfg.get("hindsight"))
        no_pi, judged = "rl" if told_later(cfg) else self._objective.no_pi, self._objective.on_policy_frac > 0.0
        self._data = load_prompts(cfg, no_pi=no_pi, judged=judged)
        self._rounds = RoundSampler(cfg, self._run, self._data, self._sampler, self._round_sizes, self._objective)
        self._packer = Packer(cfg, self._run, self._data.tokenizer.pad_id)
        self._supervised = SupervisedTerm(cfg, self._run, self._data, self._packer, self._timer)
        self._evaluation = Evaluation(cfg, self._run, self._data, self._rounds.collect)
        self._texts = TextSamples(cfg, self._run, self._data, self._rounds.collect)
        self._completions = row_completions(self._data, self._sampler.temperature) if self._objective.on_policy_frac < 1 else []
        must_match, rows = self._round_sizes.must_match | {"rows": len(self._data.prompts)}, self._data.prompts
        self._checkpoints = Checkpoints(cfg, self._run, cfg.objective._component_, must_match, rows)
        self._teacher = build_teacher(cfg, [example for example, _ in self._data.prompts], self._objective)
        self._mismatch, self._corrections = load_mismatch(cfg, self._run, self._sampler, SAMPLING_VIEW)
        check_method(cfg, self._objective, self._sampler, self._teacher, SAMPLING_VIEW)

        self._model = load_model(cfg, self._run, cfg.model, self._checkpoints.load_weights(), trained=True)
        self._teacher.attach(functools.partial(load_teacher, cfg, self._run, teacher=self._teacher))
        self._updates = Updates(cfg, self._run, self._model)
        progress = self._checkpoints.restore(self._model, self._updates, self._teacher, self._rounds)
        self._step, self._round = progress["step"], progress["round"]
        self._round_sizes.check_progress(self._step, self._round, self._max_steps)
        steps = {"first_step": self._step, "last_step": self._max_steps}
        self._log = MetricsLog(cfg, self._run, data=self._data, title=cfg.objective._component_.rpartition(".")[2], **steps)
        self._checkpoints.record_config()

    # ------------------------------------------------------------------------------------------------ the method

    @saves_what_was_trained
    def train(self) -> None:
        if self._step == 0:
            self.evaluate()
        while self._step < self._max_steps:
            before = self._step
            rollouts = self.sample_round()
            self.score_behaviour(rollouts)
            advantages = apply_mask(self._corrections, rollouts, self._objective.advantages(rollouts, self._step))
            report = round_report(self._run, self._data, rollouts, advantages, self._counts, self._corrections)
            for minibatch in self._round_sizes.minibatches(list(zip(rollouts, advantages, strict=True))):
                self.update(minibatch, report)
                if self._step == self._max_steps:
                    break
            self._round += 1
            last = self._step == self._max_steps
            if last or self._round_sizes.eval_due(before, self._step):
                self.evaluate()
            if self._texts.due(before, self._step):
                self._log.texts(self._step, self._texts.sample(self._model))
            if last or self._checkpoints.due(before, self._step):
                self.save_checkpoint()

    def sample_round(self) -> list[Rollout]:
        """Return this rank's rollouts of the round: sampled now or, with `rollout_lag: 1`, while the last round was trained."""
        with self._timer.phase("rollout"):
            rollouts, found = self._rounds.next(self._round, self._model, self.sample_from)
        counts = Counter(found)
        if self._hindsight is not None:
            limits = {"run": self._run, "max_seq_len": self._data.max_seq_len}
            counts.update(add_hindsight(self._hindsight, rollouts, self._data.privileged, self._data.tokenizer, **limits))
        self._counts = self._run.sums(counts)
        return rollouts + self.dataset_completions(self._rounds.groups(self._round), self._round)

    def sample_from(self, weights: Any, round_: int) -> tuple[list[Rollout], Counter]:
        """Sample this rank's groups of a round, with rewards and μ's log-probs."""
        groups, counts = self._rounds.groups(round_), Counter()
        answered = {rollout.group for rollout in self.dataset_completions(groups, round_)}
        sample = functools.partial(self.sample_groups, weights, round_, counts)
        rollouts = sample([g for g in groups if g[0] not in answered], SAMPLING_VIEW)
        if self._objective.guides_failed_groups:
            rollouts = self.guide_failed_groups(groups, rollouts, sample, counts)
        return self._round_sizes.refill(self._run, round_, len(self._data.prompts), rollouts, sample, counts), counts

    def sample_groups(
        self, weights: Any, round_: int, counts: Counter, groups: list[tuple[int, int]], view: ViewName, first_member: int = 0
    ) -> list[Rollout]:
        """Sample `group_size` rollouts of each (group, row), in ``view``."""
        collected = self._rounds.collect_groups(weights, round_, groups, view, first_member)
        sampled = {"rollouts": len(groups) * self._round_sizes.group_size, "sampled_tokens": collected.sampled_tokens}
        counts.update(collected.dropped | sampled)
        return collected.rollouts

    def guide_failed_groups(
        self, groups: list[tuple[int, int]], rollouts: list[Rollout], sample: Callable[..., list[Rollout]], counts: Counter
    ) -> list[Rollout]:
        """Sample a group without any reward again from the view with privileged information (Guide-GRPO)."""
        present = {rollout.group for rollout in rollouts}
        rewarded = {rollout.group for rollout in rollouts if rollout.task_reward > 0}
        failed = [g for g in groups if g[0] in present - rewarded and self._data.prompts[g[1]][1].has_privileged]
        counts["guided_groups"] = float(len(failed))
        guided = sample(failed, "teacher", first_member=self._round_sizes.group_size)
        replaced = {group for group, _ in failed}
        return [rollout for rollout in rollouts if rollout.group not in replaced] + guided

    def dataset_completions(self, groups: list[tuple[int, int]], round_: int) -> list[Rollout]:
        """Return the dataset's completions for the share of groups that `objective.lmbda` does not sample (GKD)."""
        frac, seed = self._objective.on_policy_frac, self._run.seed
        chosen = [(g, row) for g, row in groups if random.Random(f"{seed} {round_} {g} off-policy").random() >= frac]
        return [replace(self._completions[row], group=group) for group, row in chosen]

    @torch.no_grad()
    def score_behaviour(self, rollouts: list[Rollout]) -> None:
        """Score the round before its first update: write KL estimates and `importance_weights` onto its rollouts."""
        self._mismatch.start_round(lagged=self._rounds.lagged)
        request = self._objective.behaviour_request()
        if request is None and self._corrections is None:
            return
        views = ("student", "teacher") if self._objective.guides_failed_groups else (SAMPLING_VIEW,)  # hinted samples too
        for chunk in self._packer.micro_batches(rollouts):
            batch = self._packer.batch(chunk)
            with self._timer.phase("score"):
                if self._corrections is not None:
                    self._corrections.weigh(chunk, batch, self._score(batch, self._corrections.request(*views), LiveTeacher()))
                if request is not None:
                    numbers = self._objective.behaviour_values(self._score(batch, request, self._teacher))
                    for rollout, values in zip(chunk, numbers.split([r.policy_tokens for r in chunk]), strict=True):
                        rollout.behaviour_values = values.tolist()

    def update(self, minibatch: list[tuple[Rollout, RolloutAdvantage]], report: dict[str, float]) -> None:
        """Take one optimiser step."""
        kept = [(rollout, advantage) for rollout, advantage in minibatch if advantage.keep and rollout.keep]
        tokens = int(self._run.sum(sum(rollout.policy_tokens for rollout, _ in kept)))
        self._teacher.balance([rollout for rollout, _ in kept], self._run.sums)
        request = self._objective.score_request(self._step)
        kept = self._packer.balanced(kept, request.views)
        total_loss, sums = 0.0, Counter()
        for chunk, last in mark_last(self._packer.micro_batches(kept, request.views)):
            batch = self._packer.batch(chunk)
            with self._timer.phase("score"):
                # The head forms the gradients of this loss in the forward; the call below is the same loss, for autograd and
                # the log.
                scores = self._score(batch, request, self._teacher, loss=self._objective.per_token_loss(self._step))
                token_loss = self._objective.weighted_loss(batch, scores, self._step)
                loss = token_mean(token_loss.loss + scores.router_loss, tokens)
            with self._timer.phase("update"):
                add_gradients(self._model, loss, self._run.world_size, last=last and not self._supervised.active)
            self._mismatch.look(batch, scores)
            self._log.look(batch, scores)
            total_loss += loss.item()
            sums.update(token_sums(batch, scores, token_loss.metrics, self._teacher.names(batch.views.rollouts)))
        supervised_loss = self._supervised.backward(self._model, self._step)
        total_loss = self._run.sum(total_loss + supervised_loss)
        mismatch = self._mismatch.report()  # before the step: above its limit it ends the run
        with self._timer.phase("update"):
            dump = functools.partial(dump_rollouts, [rollout for rollout, _ in kept])
            result = self._updates.step(total_loss, tokens, dump, self._step + 1, supervised_term=self._supervised.active)
            if result.applied:
                self._teacher.update(self._model)
        row = step_report(total_loss, tokens, result, self._timer) | self._supervised.report(supervised_loss)
        row |= token_means(self._run.sums(sums), tokens) | self._objective.coefficients(self._step) | mismatch
        self._step += 1
        self._log.write({"step": self._step, "round": self._round} | row | report, shown=SHOWN)

    def _score(self, batch: Batch, request: ScoreRequest, teacher: Teacher, loss: PerTokenLoss | None = None) -> Scores:
        return score(
            self._model,
            batch,
            request,
            temperature=self._sampler.temperature,
            teacher=teacher,
            chunk_tokens=self._round_sizes.score_chunk_tokens,
            loss=loss,
        )

    # ------------------------------------------------------------------------------------------------ reports

    def evaluate(self) -> None:
        if numbers := self._evaluation.numbers(self._model, self._step):
            self._log.write({"step": self._step} | numbers, shown=SHOWN)

    def save_checkpoint(self) -> None:
        self._checkpoints.save(self._step, self._round, self._model, self._updates, self._teacher, self._rounds)

    def cleanup(self) -> None:
        self._log.close()
        cleanup()


@one_sentence_errors
@config.parse
def recipe_main(cfg: DictConfig) -> None:
    recipe = OPSDRecipe(cfg)
    recipe.setup(cfg)
    log_config(cfg, "OPSDRecipe")
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
