"""Train with a constant negative advantage: the control arm of methods with a log-ratio as advantage (OPSA, arXiv 2608.31046).

    J = E_{y~S}[ Σ_t ρ_t·A_t ],  A_t = c on the share q of the round's tokens with the lowest log S(y_t), 0 on the others;
    `entropy_scaled`: c·(½ + (H_t − H_min) / (2·(H_max − H_min))), H the student's entropies at the selected tokens

No teacher, no reward, no label. Over all tokens (`quantile: 1`) the expected gradient on-policy is exactly 0, since
E[c·∇log S] = 0. On a tail it is c·∇(mass of the tail, held fixed): with c < 0 the student becomes sharper, and nothing else
happens. What OPD or OPSD gain must exceed this arm at equal tokens.

What we do differently: tail and extremes are those of the whole round, over all ranks (the source does not say), and log S is
the sampler's own record.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pidistill.distributed.run import gather_of_all
from pidistill.errors import InputError, check_share
from pidistill.objectives.grpo import GRPO
from pidistill.types import Batch, Rollout, RolloutAdvantage, ScoreRequest, Scores, TokenLoss


class ConstantNegative(GRPO):
    """Give the least likely of the sampled tokens one advantage, whatever they say.

    Args:
        quantile: q, the share of the round's policy tokens that are selected; 1 selects all.
        value: c; below 0 as published. Above 0 is reported to collapse.
        entropy_scaled: scale c by the student's entropy between ½ and 1, as published; one more forward per round.
        clip_low, clip_high, dual_clip: as in π-Distill.
    """

    def __init__(
        self,
        quantile: float = 0.2,
        value: float = -1.0,
        entropy_scaled: bool = True,
        clip_low: float = 0.8,
        clip_high: float = 1.2,
        dual_clip: float | None = None,
    ) -> None:
        super().__init__(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
        check_share("objective.quantile", quantile, "the share of the tokens that are selected", "(0, 1]")
        if value == 0.0 or not math.isfinite(value):
            raise InputError(f"objective.value={value} must be a finite number other than 0, or nothing is trained")
        self.quantile, self.value, self.entropy_scaled = quantile, value, entropy_scaled

    def behaviour_request(self) -> ScoreRequest | None:
        return ScoreRequest(student_grad=False, teacher_grad=False, views=("student",)) if self.entropy_scaled else None

    def behaviour_values(self, scores: Scores) -> Float[Tensor, " N"]:
        return scores.student_entropy

    def advantages(self, rollouts: Sequence[Rollout], step: int) -> list[RolloutAdvantage]:
        logprobs = [
            [x for x, is_policy in zip(rollout.sampled_logprobs, rollout.policy_mask, strict=True) if is_policy]
            for rollout in rollouts
        ]
        everyone = sorted(gather_of_all([x for row in logprobs for x in row]))
        if not everyone:
            return [RolloutAdvantage(0.0, tokens=[]) for _ in rollouts]
        last = everyone[math.ceil(self.quantile * len(everyone)) - 1]
        selected = [[x <= last for x in row] for row in logprobs]
        scales = self._scales(rollouts, selected)
        tokens = [
            [self.value * scale if chosen else 0.0 for chosen, scale in zip(*pair, strict=True)]
            for pair in zip(selected, scales, strict=True)
        ]
        return [RolloutAdvantage(max(row, key=abs, default=0.0), tokens=row) for row in tokens]

    def _scales(self, rollouts: Sequence[Rollout], selected: list[list[bool]]) -> list[list[float]]:
        """Return ½ + (H − H_min) / (2·(H_max − H_min)) per token, the extremes over the selected tokens of all ranks."""
        if not self.entropy_scaled:
            return [[1.0] * len(row) for row in selected]
        entropies = [rollout.behaviour_values for rollout in rollouts]
        pairs = [pair for rows in zip(entropies, selected, strict=True) for pair in zip(*rows, strict=True)]
        chosen = gather_of_all([h for h, is_selected in pairs if is_selected])
        least, spread = min(chosen), max(chosen) - min(chosen)
        return [[0.5 + (h - least) / (2.0 * spread) if spread else 1.0 for h in row] for row in entropies]

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        answer = super().token_loss(batch, scores, step)
        return TokenLoss(answer.loss, answer.metrics | {"selected_frac": (batch.advantages != 0).to(torch.float32)})
