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


def of_nothing():
    return 1.0


async def later(example, turns):
    return 1.0


def in_parts(example, turns):
    yield 1.0


class NotCalled:
    """An object that is no function."""


def plain_decorator(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


@plain_decorator
def decorated(example, turns, limit=20):
    return is_short(example, turns, limit)


def make_of_names(*names, threshold=0.5):
    return lambda example, turns: threshold


@plain_decorator
def hidden_maker():
    return lambda example, turns: 0.25


class Making(type):
    def __call__(cls):
        return lambda example, turns: 0.25


class ByMeta(metaclass=Making):
    """A class whose call makes a function."""


def say_look(example, turns):
    return "look"


NUMBER = 3


class Silent:
    """An environment of one's own that gives no reward."""

    gives_reward = False


class Holder:
    """An environment of one's own that asks its reward in its own way."""

    def __init__(self, reward):
        self.reward = reward
