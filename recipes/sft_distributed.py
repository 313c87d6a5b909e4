"""Fine-tune on demonstrations: the tiny base, and the SFT baselines that the methods are measured against.

    step:  `batch_size` demonstrations → −log S of every policy token → mean over the policy tokens of the whole step
           → backward → clip → step

Same keys, checkpoints and evaluation as the other recipes; runs on any device, and takes conversations with tools. Observations
inside a demonstration are context, not targets.

    tune run --nproc_per_node 1 recipes/sft_distributed.py --config configs/tiny/base.yaml
"""

import functools
import sys
from collections import Counter

from omegaconf import DictConfig
from pidistill.config import build
from pidistill.data import build_demonstrations, epoch_order, load_prompts
from pidistill.distributed.run import Timer
from pidistill.losses.reductions import token_mean
from pidistill.scoring.packer import Packer
from pidistill.scoring.score import score, student_nll
from pidistill.training.checkpoints import Checkpoints, saves_what_was_trained
from pidistill.training.collector import build_collector
from pidistill.training.evaluation import Evaluation
from pidistill.training.keys import keys_of
from pidistill.training.load import load_model
from pidistill.training.metrics import step_report, token_means, token_sums
from pidistill.training.metrics_log import MetricsLog
from pidistill.training.rounds import dump_rollouts
from pidistill.training.run_folder import log_config
from pidistill.training.start import cleanup, one_sentence_errors, start
from pidistill.training.update import Updates, add_gradients, crossed, mark_last
from pidistill.types import Rollout, ScoreRequest
from torchtune import config

KEYS = keys_of("sft")
REQUIRED = ("output_dir", "max_steps", "model", "tokenizer", "checkpointer", "dataset", "optimizer", "batch_size")
REQUEST = ScoreRequest(student_grad=True, teacher_grad=False, views=("student",))
SHOWN = ("loss", "entropy_nats", "eval_student_success_greedy")


class SFTRecipe:
    """Maximise the likelihood of the dataset's assistant turns."""

    def __init__(self, cfg: DictConfig) -> None:
        self._run = start(cfg, KEYS, REQUIRED)
        self._max_steps = int(cfg.max_steps)
        self._batch_size = int(cfg.batch_size)
        self._eval_every = cfg.get("eval_every_steps")
        self._chunk_tokens = cfg.get("score_chunk_tokens")
        self._timer = Timer(self._run.device)

    def setup(self, cfg: DictConfig) -> None:
        # Everything that can be wrong is built and looked at before weights are loaded.
        self._data = load_prompts(cfg, no_pi="rl", samples=False)
        self._packer = Packer(cfg, self._run, self._data.tokenizer.pad_id)
        self._demonstrations, too_long = build_demonstrations(
            self._data.prompts,
            self._data.tokenizer,
            max_seq_len=self._data.max_seq_len,
            on_overflow=cfg.get("on_overflow"),
        )
        self._dropped = self._data.dropped | {"demonstration_too_long": too_long}
        collect = build_collector(cfg, build(cfg.sampler), self._data.tokenizer) if cfg.get("eval_dataset") else None
        self._evaluation = Evaluation(cfg, self._run, self._data, collect)
        must_match = {"batch_size": self._batch_size, "rows": len(self._demonstrations)}
        self._checkpoints = Checkpoints(cfg, self._run, "sft", must_match, self._data.prompts)

        self._model = load_model(cfg, self._run, cfg.model, self._checkpoints.load_weights(), trained=True)
        self._updates = Updates(cfg, self._run, self._model)
        self._step = self._checkpoints.restore(self._model, self._updates, None)["step"]
        self._log = MetricsLog(cfg, self._run, first_step=self._step, last_step=self._max_steps, title="SFT")
        self._checkpoints.record_config()

    # ------------------------------------------------------------------------------------------------ the method

    @saves_what_was_trained
    def train(self) -> None:
        if self._step == 0:
            self.evaluate()
        while self._step < self._max_steps:
            before = self._step
            self.update(self.next_demonstrations())
            last = self._step == self._max_steps
            if last or crossed(self._eval_every, before, self._step):
                self.evaluate()
            if last or self._checkpoints.due(before, self._step):
                self.save_checkpoint()

    def next_demonstrations(self) -> list[Rollout]:
        """Return this rank's share of the step's batch."""
        first = self._step * self._batch_size
        order = epoch_order(len(self._demonstrations), self._run.seed, first, self._batch_size)
        return [self._demonstrations[row] for row in self._run.share(order)]

    def update(self, demonstrations: list[Rollout]) -> None:
        """Take one optimiser step."""
        tokens = int(self._run.sum(sum(d.policy_tokens for d in demonstrations)))
        total_loss, sums = 0.0, Counter()
        for chunk, last in mark_last(self._packer.micro_batches(demonstrations, REQUEST.views)):
            batch = self._packer.batch(chunk)
            with self._timer.phase("score"):
                # The head forms the gradients of this loss in the forward; the call below is the same loss, for autograd and
                # the log.
                scores = score(self._model, batch, REQUEST, chunk_tokens=self._chunk_tokens, loss=student_nll)
                loss = token_mean(student_nll(batch, scores) + scores.router_loss, tokens)
            with self._timer.phase("update"):
                add_gradients(self._model, loss, self._run.world_size, last=last)
            total_loss += loss.item()
            sums.update(token_sums(batch, scores, {}))
        total_loss = self._run.sum(total_loss)
        with self._timer.phase("update"):
            result = self._updates.step(total_loss, tokens, functools.partial(dump_rollouts, demonstrations), self._step + 1)
        self._step += 1
        row = step_report(total_loss, tokens, result, self._timer, phases=("score", "update"))
        row |= token_means(self._run.sums(sums), tokens)
        row |= {f"dropped_rows/{reason}": count for reason, count in self._dropped.items()}
        self._log.write({"step": self._step} | row, shown=SHOWN)

    # ------------------------------------------------------------------------------------------------ reports

    def evaluate(self) -> None:
        if numbers := self._evaluation.numbers(self._model, self._step):
            self._log.write({"step": self._step} | numbers, shown=SHOWN)

    def save_checkpoint(self) -> None:
        self._checkpoints.save(self._step, self._step, self._model, self._updates, None)

    def cleanup(self) -> None:
        self._log.close()
        cleanup()


@one_sentence_errors
@config.parse
def recipe_main(cfg: DictConfig) -> None:
    recipe = SFTRecipe(cfg)
    recipe.setup(cfg)
    log_config(cfg, "SFTRecipe")
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
