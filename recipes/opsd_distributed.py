"""On-policy distillation from the student's own samples: OPSD (arXiv 2602.04942) and, without a teacher term, the RL baseline.

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
from dataclasses import replace

import torch
from omegaconf import DictConfig
from torchtune import config

from pidistill.config import build
from pidistill.data import epoch_order, load_prompts, row_completions, sft_demonstrations
from pidistill.distributed.run import Timer
from pidistill.losses.reductions import token_mean
from pidistill.privileged.hindsight import add_hindsight
from pidistill.rewards import build_shaping
from pidistill.rollouts import DROP_REASONS, collect_rollouts, rollout_seed
from pidistill.scoring.mismatch import MismatchMeter
from pidistill.scoring.packer import Packer
from pidistill.scoring.score import score, student_nll
from pidistill.teachers import LiveTeacher, Teacher
from pidistill.training.checkpoints import Checkpoints
from pidistill.training.compatibility import check_method, no_pi
from pidistill.training.evaluation import evaluate, sample_texts
from pidistill.training.keys import COMMON_KEYS, ROUND_KEYS
from pidistill.training.load import load_model, load_teacher
from pidistill.training.metrics import advantage_sums, rollout_means, rollout_sums, token_means, token_sums
from pidistill.training.metrics_log import MetricsLog
from pidistill.training.rounds import RoundSizes, check_rewards, dump_rollouts
from pidistill.training.run_folder import log_config
from pidistill.training.start import cleanup, one_sentence_errors, start
from pidistill.training.update import Updates
from pidistill.types import Batch, PerTokenLoss, Rollout, RolloutAdvantage, ScoreRequest, Scores, ViewName

KEYS = COMMON_KEYS | ROUND_KEYS | {"hindsight"}
REQUIRED = ("output_dir", "max_steps", "model", "tokenizer", "checkpointer", "dataset", "environment", "privileged", "sampler",
            "objective", "optimizer", "prompts_per_round", "group_size")  # fmt: skip
SAMPLING_VIEW: ViewName = "student"
SFT_REQUEST = ScoreRequest(student_grad=True, teacher_grad=False, views=("student",), entropy=False)
SHOWN = ("reward_mean", "kl_teacher_student_nats", "leak_frac", "eval_student_success_greedy")

Pair = tuple[Rollout, RolloutAdvantage]


class OPSDRecipe:
    """Trains the student on its own samples; the teacher, if there is one, scores them and gets no gradient."""

    def __init__(self, cfg: DictConfig) -> None:
        self._run = start(cfg, KEYS, REQUIRED)
        self._round_sizes = RoundSizes(cfg)
        self._max_steps = int(cfg.max_steps)
        self._sft_weight, self._sft_batch = float(cfg.get("sft_weight") or 0.0), int(cfg.get("sft_batch_size") or 64)
        self._timer = Timer(self._run.device)

    def setup(self, cfg: DictConfig) -> None:
        # Everything that can be wrong is built and looked at before weights are loaded.
        self._objective = build(cfg.objective)
        self._sampler = build(cfg.sampler)
        # Hindsight comes with the rollouts: rows need no privileged information of their own.
        self._hindsight, self._privileged = build(cfg.get("hindsight")), build(cfg.privileged)
        rows_without_pi = no_pi(cfg, self._objective)
        self._data = load_prompts(cfg, no_pi="rl" if self._hindsight else rows_without_pi)
        self._collect = functools.partial(
            collect_rollouts,
            sampler=self._sampler,
            tokenizer=self._data.tokenizer,
            environment=build(cfg.environment),
            max_turns=cfg.get("max_turns"),
            environment_threads=cfg.get("environment_threads"),
            environment_timeout_s=cfg.get("environment_timeout_s"),
            shaping=build_shaping(cfg.get("reward_shaping")),
        )
        self._packer = Packer(cfg, self._run, self._data.tokenizer.pad_id)
        self._demonstrations = sft_demonstrations(cfg, self._data)
        self._completions = row_completions(self._data) if self._objective.on_policy_frac < 1.0 else []
        must_match = self._round_sizes.must_match | {"rows": len(self._data.prompts)}
        self._checkpoints = Checkpoints(cfg, self._run, method=cfg.objective._component_, must_match=must_match)
        self._teacher = build(cfg.teacher) if cfg.get("teacher") else LiveTeacher()
        self._mismatch = MismatchMeter(cfg, self._run, self._sampler, SAMPLING_VIEW)
        self._importance = build(cfg.get("importance_weights"))
        check_method(cfg, self._objective, self._sampler, self._teacher, SAMPLING_VIEW)

        self._model = load_model(cfg, self._run, cfg.model, self._checkpoints.load_weights(), trained=True)
        self._teacher.attach(functools.partial(load_teacher, cfg, self._run))
        self._updates = Updates(cfg, self._run, self._model)
        progress = self._checkpoints.restore(self._model, self._updates, self._teacher)
        self._step, self._round = progress["step"], progress["round"]
        self._round_sizes.check_progress(self._step, self._round, self._max_steps)
        self._log = MetricsLog(
            cfg, self._run, first_step=self._step, last_step=self._max_steps, title=cfg.objective._component_.rpartition(".")[2]
        )
        self._evaluate = functools.partial(
            evaluate,
            prompts=self._data.eval_prompts,
            collect=self._collect,
            run=self._run,
            samples=int(cfg.get("eval_samples") or 1),
            success_threshold=self._data.success_threshold,
            leak_phrases=self._data.leak_phrases,
        )

    # ------------------------------------------------------------------------------------------------ the method

    def train(self) -> None:
        if self._step == 0:
            self.evaluate()
        while self._step < self._max_steps:
            before = self._step
            rollouts = self.sample_round()
            self.score_behaviour(rollouts)
            advantages = self._objective.advantages(rollouts, self._step)
            report = self.round_report(rollouts, advantages)
            for minibatch in self._round_sizes.minibatches(list(zip(rollouts, advantages, strict=True))):
                self.update(minibatch, report)
                if self._step == self._max_steps:
                    break
            self._round += 1
            last = self._step == self._max_steps
            if last or self._round_sizes.eval_due(before, self._step):
                self.evaluate()
            if self._round_sizes.texts_due(before, self._step):
                self.write_texts()
            if last or self._checkpoints.due(before, self._step):
                self.save_checkpoint()

    def sample_round(self) -> list[Rollout]:
        """This rank's groups of the round: rewards and μ's log-probs included. A group is never split between ranks."""
        sizes = self._round_sizes
        order = epoch_order(len(self._data.prompts), self._run.seed, self._round * sizes.prompts, sizes.prompts)
        groups = self._run.share(list(enumerate(order)))
        given = self.dataset_completions(groups)
        answered = {rollout.group for rollout in given}
        self._counts = dict.fromkeys(("rollouts", "sampled_tokens", *DROP_REASONS), 0.0)
        with self._timer.phase("rollout"):
            rollouts = self.sample_groups([g for g in groups if g[0] not in answered], SAMPLING_VIEW)
            if self._objective.guides_failed_groups:
                rollouts = self.guide_failed_groups(groups, rollouts)
        if self._hindsight is not None:
            limits = {"run": self._run, "max_seq_len": self._data.max_seq_len}
            self._counts |= add_hindsight(self._hindsight, rollouts, self._privileged, self._data.tokenizer, **limits)
        self._counts = self._run.sums(self._counts)
        return rollouts + given

    def sample_groups(self, groups: list[tuple[int, int]], view: ViewName, first_member: int = 0) -> list[Rollout]:
        """`group_size` rollouts of each (group, row), in ``view``."""
        size = self._round_sizes.group_size
        members = range(first_member, first_member + size)
        collected = self._collect(
            self._model,
            examples=[self._data.prompts[row][0] for _, row in groups],
            prompts=[self._data.prompts[row][1] for _, row in groups],
            view=view,
            group_size=size,
            groups=[group for group, _ in groups],
            seeds=[rollout_seed(self._run.seed, self._round, group, member) for group, _ in groups for member in members],
        )
        self._counts["rollouts"] += len(groups) * size
        self._counts["sampled_tokens"] += sum(rollout.policy_tokens for rollout in collected.rollouts)
        for reason, count in collected.dropped.items():
            self._counts[reason] += count
        return collected.rollouts

    def guide_failed_groups(self, groups: list[tuple[int, int]], rollouts: list[Rollout]) -> list[Rollout]:
        """A group without any reward is sampled again from the view with privileged information (Guide-GRPO)."""
        present = {rollout.group for rollout in rollouts}
        rewarded = {rollout.group for rollout in rollouts if rollout.task_reward > 0}
        failed = [g for g in groups if g[0] in present - rewarded and self._data.prompts[g[1]][1].has_privileged]
        self._counts["guided_groups"] = float(len(failed))
        guided = self.sample_groups(failed, "teacher", first_member=self._round_sizes.group_size)
        replaced = {group for group, _ in failed}
        return [rollout for rollout in rollouts if rollout.group not in replaced] + guided

    def dataset_completions(self, groups: list[tuple[int, int]]) -> list[Rollout]:
        """The dataset's own completion where the coin of `objective.lmbda` says so (GKD); those groups are not sampled."""
        frac, seed = self._objective.on_policy_frac, self._run.seed
        chosen = [(g, row) for g, row in groups if random.Random(f"{seed} {self._round} {g} off-policy").random() >= frac]
        return [replace(self._completions[row], group=group) for group, row in chosen]

    @torch.no_grad()
    def score_behaviour(self, rollouts: list[Rollout]) -> None:
        """Write what the objective asks for under the weights that sampled (a KL estimate) onto each rollout.

        And, with `importance_weights`, the weights that turn the sampler's distribution into the trainer's.
        """
        self._mismatch.start_round()
        request = self._objective.behaviour_request()
        if request is None and self._importance is None:
            return
        for chunk in self._packer.micro_batches(rollouts):
            batch = self._packer.batch(chunk)
            if self._importance is not None:
                # Guide-GRPO's hinted samples are drawn from the live weights in the other view.
                views = ("student", "teacher") if self._objective.guides_failed_groups else (SAMPLING_VIEW,)
                with self._timer.phase("score"):
                    scores = self._score(batch, self._importance.request(*views), teacher=LiveTeacher())
                self._importance.weigh(chunk, batch, scores)
            if request is None:
                continue
            with self._timer.phase("score"):
                numbers = self._objective.behaviour_values(self._score(batch, request))
            lengths = [rollout.policy_tokens for rollout in chunk]
            for rollout, values in zip(chunk, numbers.split(lengths), strict=True):
                rollout.behaviour_values = values.tolist()

    def update(self, minibatch: list[Pair], report: dict[str, float]) -> None:
        """One optimiser step."""
        kept = [(rollout, advantage) for rollout, advantage in minibatch if advantage.keep]
        tokens = int(self._run.sum(sum(rollout.policy_tokens for rollout, _ in kept)))
        request = self._objective.score_request(self._step)
        kept = self._packer.balanced(kept, request.views)
        total_loss, sums = 0.0, {}
        for chunk in self._packer.micro_batches(kept, request.views):
            batch = self._packer.batch(chunk)
            with self._timer.phase("score"):
                scores = self._score(batch, request, loss=self._objective.per_token_loss(self._step))
                token_loss = self._objective.token_loss(batch, scores, self._step)
                loss = token_mean(token_loss.loss, tokens)
            with self._timer.phase("update"):
                (loss * self._run.world_size).backward()  # FSDP2 averages gradients over ranks; the loss is already global
            self._mismatch.look(batch, scores)
            total_loss += loss.item()
            for name, value in token_sums(batch, scores, token_loss.metrics).items():
                sums[name] = sums.get(name, 0.0) + value
        sft_loss = self.add_sft_term()
        total_loss = self._run.sum(total_loss + sft_loss)
        mismatch = self._mismatch.report()  # before the step: beyond the limit nothing is learned from these samples
        with self._timer.phase("update"):
            dump = functools.partial(dump_rollouts, [rollout for rollout, _ in kept])
            result = self._updates.step(total_loss, max(tokens, int(self._sft_weight > 0)), dump, self._step + 1)
            if result.applied:
                self._teacher.update(self._model)
        row = {"loss": total_loss, "grad_norm": result.grad_norm, "lr": result.lr, "policy_tokens": tokens}
        row |= token_means(self._run.sums(sums), tokens) | self._objective.coefficients(self._step) | mismatch
        if self._sft_weight:
            row["sft_loss"] = self._run.sum(sft_loss) / self._sft_weight
        self._step += 1
        self.write_metrics(row | report)

    def add_sft_term(self) -> float:
        """Backward of `sft_weight` × the mean −log S per token of `sft_batch_size` demonstrations; this rank's part of it."""
        if not self._sft_weight:
            return 0.0
        order = epoch_order(len(self._demonstrations), self._run.seed, self._step * self._sft_batch, self._sft_batch)
        demonstrations = [self._demonstrations[row] for row in self._run.share(order)]
        tokens = int(self._run.sum(sum(d.policy_tokens for d in demonstrations)))
        total_loss = 0.0
        for chunk in self._packer.micro_batches(demonstrations, SFT_REQUEST.views):
            batch = self._packer.batch(chunk)
            with self._timer.phase("update"):
                chunk_tokens = self._round_sizes.score_chunk_tokens
                scores = score(self._model, batch, SFT_REQUEST, chunk_tokens=chunk_tokens, loss=student_nll)
                loss = self._sft_weight * token_mean(student_nll(batch, scores), tokens)
                (loss * self._run.world_size).backward()
            total_loss += loss.item()
        return total_loss

    def _score(
        self, batch: Batch, request: ScoreRequest, loss: PerTokenLoss | None = None, teacher: Teacher | None = None
    ) -> Scores:
        return score(
            self._model,
            batch,
            request,
            temperature=self._sampler.temperature,
            teacher=teacher or self._teacher,
            chunk_tokens=self._round_sizes.score_chunk_tokens,
            loss=loss,
        )

    # ------------------------------------------------------------------------------------------------ reports

    def round_report(self, rollouts: list[Rollout], advantages: list[RolloutAdvantage]) -> dict[str, float]:
        """Numbers of the round's rollouts, over all ranks; every step of the round carries them."""
        sampled = [
            (rollout, advantage) for rollout, advantage in zip(rollouts, advantages, strict=True) if rollout.reward is not None
        ]
        sums = rollout_sums([rollout for rollout, _ in sampled], self._data.success_threshold, self._data.leak_phrases)
        sums = self._run.sums(sums | advantage_sums(sampled))
        counts = dict(self._counts)
        if self._objective.on_policy_frac == 1.0:
            check_rewards(sums["_rollouts"], {reason: counts[reason] for reason in DROP_REASONS})
        dropped = {f"dropped/{reason}": counts.pop(reason) for reason in DROP_REASONS}
        dropped |= {f"dropped_rows/{reason}": count for reason, count in self._data.dropped.items()}
        if "_with_pi" in counts:
            counts["rollouts_with_pi_frac"] = counts.pop("_with_pi") / max(1.0, sums["_rollouts"])
        weights = self._importance.report(self._run) if self._importance is not None else {}
        return rollout_means(sums) | counts | dropped | weights | {"rows_without_pi": self._data.rows_without_pi}

    def write_metrics(self, row: dict[str, float]) -> None:
        seconds = self._timer.take()
        row |= {f"time_{phase}_s": seconds.get(phase, 0.0) for phase in ("rollout", "score", "update")}
        row["tokens_per_s"] = row["policy_tokens"] / max(sum(seconds.values()), 1e-9)
        row |= {"nonfinite_steps": self._updates.nonfinite_steps, "empty_steps": self._updates.empty_steps}
        self._log.write({"step": self._step, "round": self._round} | row, shown=SHOWN)

    def evaluate(self) -> None:
        if self._data.eval_prompts:
            dropped = {f"eval_dropped_rows/{reason}": count for reason, count in self._data.eval_dropped.items()}
            self._log.write({"step": self._step} | self._evaluate(self._model) | dropped, shown=SHOWN)

    def write_texts(self) -> None:
        """What student and teacher each write for the same rows, side by side."""
        texts = sample_texts(self._model, self._data.prompts, self._collect, self._run, self._round_sizes.texts)
        self._log.texts(self._step, texts)

    def save_checkpoint(self) -> None:
        self._checkpoints.save(self._step, self._round, self._model, self._updates, self._teacher)

    def cleanup(self) -> None:
        self._log.close()
        cleanup()


@config.parse
@one_sentence_errors
def recipe_main(cfg: DictConfig) -> None:
    log_config(cfg, "OPSDRecipe")
    recipe = OPSDRecipe(cfg)
    recipe.setup(cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
