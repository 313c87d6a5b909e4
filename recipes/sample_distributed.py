"""Sample a checkpoint and keep some completions as demonstrations: the first stage of methods that end in SFT.

every row of `dataset` × `samples_per_prompt` samples of `view` → rewards → `selection` → `traces.jsonl`, which
pidistill.data.chat_dataset reads (RFT with privileged information, intervention training: see pidistill/rollouts/selections.py)

tune run --nproc_per_node 1 recipes/sample_distributed.py --config configs/tiny/rft_sample.yaml
"""

import functools
import math
import os
import sys

from omegaconf import DictConfig
from pidistill.config import build
from pidistill.data import load_prompts
from pidistill.errors import InputError
from pidistill.jsonl import write_jsonl
from pidistill.rollouts import CollectResult, rollout_seed
from pidistill.rollouts.selections import SAMPLING_STREAM, AfterTurns, Rewriter, Selected, trace_row
from pidistill.training.collector import build_collector
from pidistill.training.keys import keys_of, setting
from pidistill.training.load import load_initial
from pidistill.training.metrics import rollout_means, rollout_sums
from pidistill.training.rounds import check_rewards
from pidistill.training.run_folder import log_config
from pidistill.training.start import cleanup, one_sentence_errors, start
from pidistill.types import Example, PromptPair
from torchtune import config, utils
from tqdm.auto import tqdm

KEYS = keys_of("sample")
REQUIRED = ("output_dir", "model", "tokenizer", "checkpointer", "dataset", "environment", "sampler", "view",
            "samples_per_prompt", "selection")  # fmt: skip
TRACES = "traces.jsonl"
MANY_CUT = 0.2  # share of rollouts that a token limit cut off, from which on the run warns

log = utils.get_logger("INFO")
Indexed = tuple[int, tuple[Example, PromptPair]]


class SampleRecipe:
    """Sample a checkpoint in one view and write what the selection keeps."""

    def __init__(self, cfg: DictConfig) -> None:
        self._run = start(cfg, KEYS, REQUIRED)
        if cfg.view not in ("teacher", "student"):
            raise InputError(f"view={cfg.view} is unknown; teacher sees the privileged information, student does not")
        self._view, self._samples = cfg.view, int(cfg.samples_per_prompt)
        self._batch = setting(cfg, "prompts_per_batch")
        # Written aside and moved into place when complete: the file is whole, or there is none.
        self._aside = {name: self._run.output_dir / f".{name}" for name in (TRACES, "metrics.jsonl")}

    def setup(self, cfg: DictConfig) -> None:
        self._data = load_prompts(cfg, no_pi="rl")
        self._selection = build(cfg.selection)
        sampler, environment = build(cfg.sampler), build(cfg.environment)
        collect = build_collector(cfg, sampler, self._data.tokenizer, environment)
        self._collect = functools.partial(collect, load_initial(cfg, self._run))
        self._rewrite = Rewriter(
            collect=functools.partial(self._collect, environment=AfterTurns(environment), max_turns=None),
            tokenizer=self._data.tokenizer,
            privileged=self._data.privileged,
            run=self._run,
            max_new_tokens=sampler.max_new_tokens,
            max_seq_len=self._data.sampled_len or self._data.max_seq_len,
        )
        self._provenance = {
            "checkpoint": str(cfg.checkpointer.get("checkpoint_dir")),
            "selection": cfg.selection._component_.rpartition(".")[2],
            "temperature": float(sampler.temperature),
            **{key: getattr(sampler, key) for key in ("top_p", "top_k", "max_new_tokens")},
            "seed": self._run.seed,
        } | ({"control": control} if (control := self._data.privileged.control) is not None else {})

    def sample(self) -> dict[str, float]:
        """Sample, select and write batch after batch; returns what :meth:`report` writes."""
        if self._run.is_main:  # files of an earlier run must not be taken for this run's
            for path in self._aside.values():
                path.unlink(missing_ok=True)
                path.with_name(path.name[1:]).unlink(missing_ok=True)
        totals: dict[str, float] = {}
        rows = list(enumerate(self._data.prompts))
        with tqdm(total=len(rows), desc="sampling", unit="prompt", disable=not self._run.is_main) as bar:
            for first in range(0, len(rows), self._batch):
                batch = rows[first : first + self._batch]
                collected = self.sample_batch(self._run.share(batch))
                selected = self._selection.select(collected.rollouts, self._data.leak_phrases, self._rewrite, self._run.seed)
                self.write_traces(selected)
                for name, value in self._run.sums(self.count(collected, selected)).items():
                    totals[name] = totals.get(name, 0.0) + value
                bar.update(len(batch))
                bar.set_postfix(kept=f"{totals['kept']:g}", sampled=f"{totals['_rollouts']:g}", refresh=False)
        dropped = {name.removeprefix("_dropped/"): n for name, n in totals.items() if name.startswith("_dropped/")}
        check_rewards(totals.get("_rollouts", 0), dropped, "of the run")
        return self.summarise(totals)

    def sample_batch(self, prompts: list[Indexed]) -> CollectResult:
        """Sample this rank's rollouts; what a prompt gets does not depend on the number of ranks."""
        return self._collect(
            examples=[example for _, (example, _) in prompts],
            prompts=[pair for _, (_, pair) in prompts],
            view=self._view,
            group_size=self._samples,
            groups=[index for index, _ in prompts],
            seeds=[
                rollout_seed(self._run.seed, SAMPLING_STREAM, index, member)
                for index, _ in prompts
                for member in range(self._samples)
            ],
        )

    def write_traces(self, selected: Selected) -> None:
        """Append all ranks' traces, in the order of the prompts."""
        traces = sorted(self._run.gather(selected.traces), key=lambda trace: trace.group)
        if self._run.is_main:
            write_jsonl(self._aside[TRACES], [trace_row(trace, self._provenance) for trace in traces])

    def count(self, collected: CollectResult, selected: Selected) -> dict[str, float]:
        sums = rollout_sums(collected.rollouts, self._data.success_threshold, self._data.leak_phrases)
        every = [*collected.rollouts, *selected.rollouts]
        dropped = [*collected.dropped.items(), *selected.dropped.items()]
        sums |= {f"_dropped/{reason}": sum(count for name, count in dropped if name == reason) for reason, _ in dropped}
        return sums | {
            "_all_rollouts": len(every) + sum(count for _, count in dropped),
            "_policy_tokens": collected.sampled_tokens + sum(rollout.policy_tokens for rollout in selected.rollouts),
            "kept": len(selected.traces),
        }

    def summarise(self, totals: dict[str, float]) -> dict[str, float]:
        """Return sums of all that was sampled, rewritten turns included, and means over whole rollouts."""
        row = {"step": 0, "rollouts": totals["_all_rollouts"], "policy_tokens": totals["_policy_tokens"]}
        row |= {"kept": totals["kept"]}
        if totals["_rollouts"]:
            row["kept_frac"] = totals["kept"] / totals["_rollouts"]
        means = rollout_means({name: value for name, value in totals.items() if name != "kept"})
        row |= means | {name[1:]: value for name, value in totals.items() if name.startswith("_dropped/")}
        row |= {f"dropped_rows/{reason}": count for reason, count in self._data.dropped.items()}
        return row | {"rows_without_pi": self._data.rows_without_pi}

    def report(self, row: dict[str, float]) -> None:
        if not self._run.is_main:
            return
        write_jsonl(self._aside["metrics.jsonl"], [row])
        os.replace(self._aside["metrics.jsonl"], self._run.output_dir / "metrics.jsonl")
        if not row["kept"]:
            other_view = "set view=teacher, " if self._view == "student" else ""
            raise InputError(
                f"{self._provenance['selection']} kept none of {row['rollouts']:g} rollouts (view {self._view}, mean reward "
                f"{row.get('reward_mean', math.nan):.3g}, {row['truncated_frac']:.0%} cut off by a token limit), so there are "
                f"no traces; raise samples_per_prompt or sampler.max_new_tokens, {other_view}or lower selection.threshold"
            )
        os.replace(self._aside[TRACES], self._run.output_dir / TRACES)
        if row["truncated_frac"] >= MANY_CUT:
            log.warning(
                f"{row['truncated_frac']:.0%} of the rollouts were cut off by a token limit, and a selection of whole answers "
                "keeps none of them, so that whole kinds of rows may be missing from the traces; raise sampler.max_new_tokens, "
                "or let the teacher's training reward an end (reward_shaping)"
            )
        print(" ".join(f"{name}={value:.4g}" for name, value in row.items() if name != "step"))
        print(self._run.output_dir / TRACES)


@one_sentence_errors
@config.parse
def recipe_main(cfg: DictConfig) -> None:
    recipe = SampleRecipe(cfg)
    recipe.setup(cfg)
    log_config(cfg, "SampleRecipe")
    recipe.report(recipe.sample())
    cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
