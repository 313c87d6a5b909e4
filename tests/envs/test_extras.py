"""Test environments of other libraries where those are missing, and what they refuse before a library is asked."""

import pickle
import sys

import pytest

from pidistill.envs import Environment, GEMEnvironment, ReasoningGymEnvironment, gem_dataset, reasoning_gym_dataset
from pidistill.errors import InputError
from pidistill.types import Example


@pytest.fixture
def without_libraries(monkeypatch):
    for name in ("gem", "reasoning_gym", "reasoning_gym.factory"):
        monkeypatch.setitem(sys.modules, name, None)  # what an import of a missing library meets


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda: gem_dataset("game:GuessTheNumber-v0-easy", 3), "gem"),
        (lambda: reasoning_gym_dataset("leg_counting", 3), "reasoning-gym"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(make, extra, without_libraries):
    with pytest.raises(InputError, match=rf"is not usable here .*; install it with pip install 'pidistill\[{extra}\]'"):
        make()


@pytest.mark.parametrize("environment", [GEMEnvironment(), ReasoningGymEnvironment()])
def test_environments_are_made_without_their_library_and_name_the_dataset_they_need(environment, without_libraries):
    assert isinstance(environment, Environment)
    with pytest.raises(InputError, match=r"row 5 holds no .*rows of pidistill\.envs\.\w+_dataset"):
        environment.reset(Example(id="row 5", messages=[]))


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_bytes_of_a_row_are_not_unpickled(tmp_path):
    """A parquet file can hold any bytes under any name."""
    mark = tmp_path / "ran"
    row = Example(id="row 5", messages=[], data={"gem_start": pickle.dumps(Touches(mark))})
    with pytest.raises(InputError, match="row 5 holds no GEM episode"):
        GEMEnvironment().reset(row)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: gem_dataset("game:Mastermind-v0-easy", 0), r"dataset\.n=0 must"),
        (lambda: gem_dataset("game:Mastermind-v0-easy", 1, completion="expert"), r"dataset\.completion=expert is unknown"),
        (lambda: gem_dataset("game:Mastermind-v0-easy", 1, privileged="all"), r"dataset\.privileged=all is unknown"),
        (lambda: reasoning_gym_dataset("leg_counting", 0), r"dataset\.n=0 must"),
        (lambda: reasoning_gym_dataset("leg_counting", 1, answer_format="boxed"), r"dataset\.answer_format=boxed is unknown"),
    ],
)
def test_wrong_arguments_are_refused(make, told):
    """Under pytest the type checker is first; the sentences are for configs, which it does not see."""
    with pytest.raises(Exception, match=rf"{told}|Type-check error"):
        make()
