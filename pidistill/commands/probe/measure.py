"""Sample the teacher under one wording, and score the student's own completions in both views."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pidistill.commands.probe.after import GoOn, beginning
from pidistill.commands.probe.wordings import Prompts
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.models.protocol import Decoder
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.rollouts import CollectResult, Sampler
from pidistill.scoring.batch import make_batch
from pidistill.scoring.score import score
from pidistill.tokenizers import ChatTokenizer
from pidistill.training.collector import Collect
from pidistill.training.evaluation import sample_view
from pidistill.training.metrics import rollout_means, rollout_sums
from pidistill.types import Divergence, Example, Rollout, ScoreRequest, ViewName

KL = (Divergence("kl_teacher_student", grad="none"), Divergence("kl_student_teacher", grad="none"))
FLEXIBLE = "success_last_number"  # GSM8KReward's part for a right number that is written in another way
REQUEST = ScoreRequest(student_grad=False, teacher_grad=False, divergences=KL)


@dataclass(frozen=True)
class Measured:
    """Hold the numbers of one view under one wording.

    Shares are between 0 and 1. Divergences are in nats per policy token of the student's own completions, over the full
    vocabulary, at temperature 1.
    """

    rows: int
    success: float  # share of rollouts whose reward reaches the threshold
    # The same by the reward's flexible rule (`success_last_number` among its parts); None where it has none.
    flexible: float | None
    tokens: float
    truncated: float
    leaks: float | None  # None without leak phrases
    kl_teacher_student: float | None = None
    kl_student_teacher: float | None = None
    # kl(teacher||student) by quarter of the completion; None where no answer is long enough to have a token there
    kl_quarters: tuple[float | None, ...] = ()
    # `best` of answers that the student has begun and the teacher ends, over the rows whose first turn was not over by then.
    after: float | None = None
    after_rows: int = 0

    @property
    def best(self) -> float:
        """Return the flexible success where there is one: a right answer that is written in another way is still known."""
        return self.success if self.flexible is None else self.flexible


def _row_of(example: Example) -> tuple[str, str]:
    """Return what tells a row from the others, also where a dataset of one's own gives several the same id."""
    return example.id, str(example.messages)


@dataclass(frozen=True)
class Probe:
    """Hold what all measurements of one command share."""

    model: Decoder
    tokenizer: ChatTokenizer
    sampler: Sampler
    collect: Collect
    run: Run
    threshold: float
    temperature: float
    micro_batch_rows: int
    chunk: int  # rows that are sampled at once
    progress: Callable[[int], None]  # a function that gets the number of rollouts that are done

    def sample(self, prompts: Prompts, view: ViewName, privileged: PrivilegedPrompt) -> tuple[list[Rollout], Counter]:
        """Return one rollout of each prompt, and how many have no reward, by reason."""
        collect = partial(self.collect, privileged=privileged)  # for what an environment gives with its answers
        found, dropped = [], Counter()
        for start in range(0, len(prompts), self.chunk):
            part = prompts[start : start + self.chunk]
            done = sample_view(self.model, part, collect, self.run, view=view, samples=1, temperature=self.temperature)
            found += done.rollouts
            dropped.update({reason: count for reason, count in done.dropped.items() if count})
            self.progress(len(part))
        if not found:
            reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
            raise InputError(f"none of the {len(prompts)} rollouts of the {view} has a reward ({reasons}); mend `environment`")
        return found, dropped

    def measure(self, rollouts: Sequence[Rollout], privileged: PrivilegedPrompt) -> Measured:
        """Return the means over ``rollouts``, without divergences."""
        means = rollout_means(rollout_sums(rollouts, self.threshold, list(privileged.leak_phrases)))
        flexible = [r.reward_parts[FLEXIBLE] for r in rollouts if FLEXIBLE in r.reward_parts]
        return Measured(
            rows=len(rollouts),
            success=means["success_frac"],
            flexible=sum(flexible) / len(flexible) if flexible else None,
            tokens=means["completion_tokens_mean"],
            truncated=means["truncated_frac"],
            leaks=means.get("leak_frac"),
        )

    def with_after(
        self, measured: Measured, rollouts: Sequence[Rollout], prompts: Prompts, privileged: PrivilegedPrompt, count: int
    ) -> Measured:
        """Return ``measured`` with the success of a teacher that goes on from the first ``count`` ids of ``rollouts``."""
        begun = {_row_of(r.example): ids for r in rollouts if (ids := beginning(r, count)) is not None}
        known = [(example, pair) for example, pair in prompts if _row_of(example) in begun]
        if not known:
            return measured

        def go_on(model: Decoder, *, examples: Sequence[Example], **settings: Any) -> CollectResult:
            given = GoOn(self.sampler, [begun[_row_of(example)] for example in examples])
            return self.collect(model, examples=examples, sampler=given, **settings)

        sampled, _ = replace(self, collect=go_on).sample(known, "teacher", privileged)
        return replace(measured, after=self.measure(sampled, privileged).best, after_rows=len(sampled))

    def with_divergences(self, measured: Measured, rollouts: Sequence[Rollout], prompts: Prompts) -> Measured:
        """Return ``measured`` with the divergences on the student's ``rollouts``, whose teacher sees ``prompts``."""
        pair_of = {_row_of(example): pair for example, pair in prompts}
        own = [replace(r, prompts=pair_of[_row_of(r.example)]) for r in rollouts if _row_of(r.example) in pair_of]
        sums = torch.zeros(2 + 4, dtype=torch.float64)
        counts = torch.zeros_like(sums)
        for start in range(0, len(own), self.micro_batch_rows):
            part_sums, part_counts = self._divergences(own[start : start + self.micro_batch_rows])
            sums, counts = sums + part_sums, counts + part_counts
        if not counts[0]:
            return measured
        means = [total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]
        return replace(measured, kl_teacher_student=means[0], kl_student_teacher=means[1], kl_quarters=tuple(means[2:]))

    def _divergences(self, rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = make_batch(rollouts, None, pad_id=self.tokenizer.pad_id, device=self.run.device, packing="padded")
        with torch.no_grad():
            scores = score(self.model, batch, REQUEST)
        forward, backward = (scores.divergences[d].double().cpu() for d in KL)
        lengths = torch.bincount(batch.rollout_index)[batch.rollout_index].cpu()
        quarter = (4 * batch.token_index.cpu()) // lengths
        inside = [quarter == q for q in range(4)]
        sums = [forward.sum(), backward.sum(), *(forward[mask].sum() for mask in inside)]
        counts = [len(forward), len(backward), *(int(mask.sum()) for mask in inside)]
        return torch.stack(sums), torch.tensor(counts, dtype=torch.float64)
