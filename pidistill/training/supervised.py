"""Add a supervised term beside a method's own loss: the config keys `sft_weight` and `sft_batch_size`."""

from omegaconf import DictConfig

from pidistill.data import RecipeData, epoch_order, sft_demonstrations
from pidistill.distributed.run import Run, Timer
from pidistill.losses.reductions import token_mean
from pidistill.models.protocol import Decoder
from pidistill.scoring.packer import Packer
from pidistill.scoring.score import score, student_nll
from pidistill.training.keys import setting
from pidistill.training.update import add_gradients, mark_last
from pidistill.types import ScoreRequest

REQUEST = ScoreRequest(student_grad=True, teacher_grad=False, views=("student",), entropy=False)


class SupervisedTerm:
    """Add `sft_weight` × the mean −log S per token of `sft_batch_size` demonstrations to the gradient of every step."""

    def __init__(self, cfg: DictConfig, run: Run, data: RecipeData, packer: Packer, timer: Timer) -> None:
        self._run, self._packer, self._timer = run, packer, timer
        self._weight, self._batch_size = float(setting(cfg, "sft_weight")), setting(cfg, "sft_batch_size")
        self._chunk_tokens = cfg.get("score_chunk_tokens")
        self.active = self._weight > 0  # False: `backward` does nothing
        self.demonstrations = sft_demonstrations(cfg, data)

    def backward(self, model: Decoder, step: int) -> float:
        """Add the gradient of the term, the last one of ``step``; return this rank's part of its loss, the weight included."""
        if not self.active:
            return 0.0
        order = epoch_order(len(self.demonstrations), self._run.seed, step * self._batch_size, self._batch_size)
        demonstrations = [self.demonstrations[row] for row in self._run.share(order)]
        tokens = int(self._run.sum(sum(d.policy_tokens for d in demonstrations)))
        total_loss = 0.0
        for chunk, last in mark_last(self._packer.micro_batches(demonstrations, REQUEST.views)):
            batch = self._packer.batch(chunk)
            with self._timer.phase("update"):
                scores = score(model, batch, REQUEST, chunk_tokens=self._chunk_tokens, loss=student_nll)
                loss = self._weight * token_mean(student_nll(batch, scores) + scores.router_loss, tokens)
                add_gradients(model, loss, self._run.world_size, last=last)
            total_loss += loss.item()
        return total_loss

    def report(self, loss: float) -> dict[str, float]:
        """Return `sft_loss`, without the weight and over all ranks, from this rank's ``loss``; nothing where inactive."""
        return {"sft_loss": self._run.sum(loss) / self._weight} if self.active else {}
