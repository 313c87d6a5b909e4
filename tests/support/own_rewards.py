"""Define rewards and judges as plain functions, which configs of tests name by their dotted paths."""

from pidistill.rewards import RewardWithParts, last_answer


def is_short(example, turns, limit=20):
    return float(len(last_answer(turns)) <= limit)


def with_parts(example, turns):
    words = last_answer(turns).split()
    return RewardWithParts(len(set(words)) % 3 / 2, {"words": float(len(words))})


def is_true(example, turns):
    return True


def make_reward(limit=3):
    return lambda example, turns: float(len(turns) <= limit)


def of_one(turns):
    return 1.0


def say_look(example, turns):
    return "look"


NUMBER = 3


class Silent:
    """An environment of one's own that gives no reward."""

    gives_reward = False
