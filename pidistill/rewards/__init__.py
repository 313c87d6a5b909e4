"""Rewards: (example, the turns of its episode) → float in a stated range."""

from pidistill.rewards.base import Reward, last_answer
from pidistill.rewards.exact_match import ExactMatch
from pidistill.rewards.gsm8k import GSM8KReward, final_answer

__all__ = ["ExactMatch", "GSM8KReward", "Reward", "final_answer", "last_answer"]
