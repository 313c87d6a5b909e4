"""Judge episodes, and shape their rewards.

In: an :class:`~pidistill.types.Example` and the messages of its episode.
Out: a number within a stated range, with named parts for the log where a reward has them.

Read base.py first: what a reward is (a plain function suffices). exact_match.py, contains.py and gsm8k.py judge answers,
constraints.py makes one reward of several, shaping.py adds parts to the reward of a whole episode.
"""

from pidistill.chat.phrases import count_phrases
from pidistill.rewards.base import Reward, RewardWithParts, last_answer
from pidistill.rewards.constraints import Constraints
from pidistill.rewards.contains import Contains
from pidistill.rewards.exact_match import ExactMatch
from pidistill.rewards.gsm8k import GSM8KReward, final_answer
from pidistill.rewards.shaping import LeakPenalty, LengthPenalty, OverlongPenalty, Shaping, add_shaping, build_shaping
