"""Give our datasets to torchtune's own supervised recipes, which need tokens and labels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from pidistill.config import build
from pidistill.data.demonstrations import demonstration
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.tokenizers import as_chat_tokenizer


class StockSFTDataset(Dataset):
    """Give {"tokens", "labels"} of one demonstration; labels are the tokens, not shifted, or −100 where nothing is learned."""

    def __init__(self, tokenizer: Any, dataset: Mapping[str, Any]) -> None:
        self._tokenizer = as_chat_tokenizer(tokenizer)
        self._examples = build(dataset)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self._examples[index]
        pair = PrivilegedPrompt().build(replace(example, privileged=None), self._tokenizer).pair  # checked as recipes check it
        rollout = demonstration(example, pair, self._tokenizer, max_seq_len=self._tokenizer.max_seq_len)
        both = zip(rollout.completion, rollout.policy_mask, strict=True)
        learned = [token if own else CROSS_ENTROPY_IGNORE_IDX for token, own in both]
        return {"tokens": pair.student + rollout.completion, "labels": [CROSS_ENTROPY_IGNORE_IDX] * len(pair.student) + learned}


def stock_sft_dataset(tokenizer: Any, dataset: Mapping[str, Any]) -> StockSFTDataset:
    """Return demonstrations of any of our dataset builders, for `dataset:` of a torchtune recipe; tools are included.

    Args:
        tokenizer: given by the recipe: torchtune's own or one of ours.
        dataset: a component node of one of our builders, e.g. ``{_component_: pidistill.data.gsm8k_dataset, source: ...}``.
    """
    return StockSFTDataset(tokenizer, dataset)
