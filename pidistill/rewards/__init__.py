"""Rewards: (example, the turns of its episode) → float in a stated range; and parts that shape it once an episode is over."""

from pidistill.chat.phrases import count_phrases
from pidistill.rewards.base import Reward, RewardWithParts, last_answer
from pidistill.rewards.constraints import Constraints
from pidistill.rewards.contains import Contains
from pidistill.rewards.exact_match import ExactMatch
from pidistill.rewards.gsm8k import GSM8KReward, final_answer
from pidistill.rewards.shaping import LeakPenalty, LengthPenalty, Shaping, add_shaping, build_shaping

__all__ = [
    "Constraints",
    "Contains",
    "ExactMatch",
    "GSM8KReward",
    "LeakPenalty",
    "LengthPenalty",
    "Reward",
    "RewardWithParts",
    "Shaping",
    "add_shaping",
    "build_shaping",
    "count_phrases",
    "final_answer",
    "last_answer",
]
