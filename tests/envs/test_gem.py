"""Test GEM's games through our protocol: the same starts, answers and rewards as GEM gives by itself; then both recipes."""

import importlib
import random
import re

import numpy as np
import pytest

from pidistill.chat.messages import message_text
from pidistill.envs import GEMEnvironment, ProcessEnvironment, gem_dataset
from pidistill.errors import InputError
from pidistill.training.start import cleanup
from tests.support.byte_base import RECIPES, assert_trained, settings, train_base
from tests.support.tiny_qwen import load_config, qwen_checkpoint, read_metrics, run_config, set_up, small_model

gem = pytest.importorskip("gem", reason="the extra `gem` is not installed; `make test-envs` runs these")

GUESS, MASTERMIND, SUDOKU, TILES = (f"game:{name}-v0-easy" for name in ("GuessTheNumber", "Mastermind", "Sudoku", "Game2048"))
ENVIRONMENT = GEMEnvironment()


def say(state, text, environment=ENVIRONMENT):
    return environment.step(state, {"role": "assistant", "content": text}, truncated=False)


def number_in(text):
    return int(re.search(r"\d+", text)[0])


# ------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("env_id", [GUESS, "game:GuessTheNumber-v0-random", "game:Mastermind-v0-hard", SUDOKU, TILES])
def test_a_row_is_a_seeded_reset_of_gem(env_id):
    rows = gem_dataset(env_id, 5, seed=3)
    assert len({row.data["seed"] for row in rows}) == 5
    for row in rows:
        observation, info = gem.make(env_id).reset(seed=row.data["seed"])
        (message,) = row.messages
        assert message["role"] == "user" and message["content"].startswith(observation.rstrip())
        assert message["content"].endswith(info.get("suffix") or "")


def test_rows_depend_on_their_arguments_alone():
    rows = list(gem_dataset(MASTERMIND, 6, seed=3))
    random.seed(99)
    assert list(gem_dataset(MASTERMIND, 6, seed=3)) == rows == list(gem_dataset(MASTERMIND, 9, seed=3))[:6]
    other = list(gem_dataset(MASTERMIND, 6, seed=4))
    assert not {row.data["seed"] for row in rows} & {row.data["seed"] for row in other}
    assert len({row.id for row in [*rows, *other]}) == 12


def test_what_the_reset_hides_is_the_privileged_information_and_nobody_elses():
    for env_id, attribute in ((GUESS, "game_number"), ("game:Mastermind-v0-random", "game_code")):
        for row in gem_dataset(env_id, 8):
            env = gem.make(env_id)
            env.reset(seed=row.data["seed"])
            hidden = getattr(env, attribute)
            assert row.privileged.endswith(f" {hidden if attribute == 'game_number' else ' '.join(map(str, hidden))}.")
            assert row.privileged not in row.messages[0]["content"]
    assert gem_dataset(TILES, 1)[0].privileged is None, "the player sees everything"
    assert gem_dataset(GUESS, 1, privileged="none")[0].privileged is None
    row = gem_dataset(TILES, 1, privileged_attribute="target_tile")[0]
    assert row.privileged == str(gem.make(TILES).target_tile)
    (answer,) = [row.privileged for row in gem_dataset("rg:leg_counting", 1)]
    assert re.fullmatch(r"The answer is \d+\.", answer)


def test_options_and_a_system_prompt_reach_the_rows_of_gem():
    row = gem_dataset(GUESS, 1, options={"max_number": 99, "max_turns": 9}, system_prompt="Be brief.")[0]
    assert row.messages[0] == {"role": "system", "content": "Be brief."}
    assert "between 1 and 99 (inclusive) within 9 turns" in row.messages[1]["content"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"env_id": "game:Chess-v0"}, r"dataset\.env_id is 'game:Chess-v0', which gem does not have"),
        ({"env_id": "code:CodeContest"}, r"not those that take rows from the Hub or run programs"),
        ({"env_id": "math:GSM8K"}, r"not those that take rows from the Hub or run programs"),
        ({"env_id": "rg:countdown"}, r"the verifier of countdown evaluates what the model writes"),
        (
            {"env_id": GUESS, "options": {"max_turn": 3}},
            r"has 'max_turn', which .* it takes min_number, max_number, max_turns$",
        ),
        ({"env_id": GUESS, "options": {"max_number": "x"}}, r"cannot be started with \{'max_number': 'x'\} \(TypeError"),
        ({"env_id": GUESS, "privileged_attribute": "secret"}, r"is 'secret', and .* has .*game_number"),
        ({"env_id": "rg:arc_1d"}, r"cannot be copied as bytes: of a reasoning task use pidistill\.envs\.reasoning_gym_dataset"),
        ({"env_id": SUDOKU, "completion": "random_actions"}, r"has no random actions"),
    ],
)
def test_wrong_arguments_of_process_environments_are_refused(arguments, told):
    with pytest.raises(InputError, match=told):
        gem_dataset(n=1, **arguments)


def test_an_environment_whose_seed_does_not_decide_is_refused(monkeypatch):
    module = pytest.importorskip("gem.envs.game_env.guess_the_number")
    count = iter(range(100))
    monkeypatch.setattr(module.GuessTheNumberEnv, "_get_instructions", lambda self: f"game {next(count)}")
    with pytest.raises(InputError, match="starts differently at the same seed"):
        gem_dataset(GUESS, 1)


# ------------------------------------------------------------------------------------------- episodes


def test_the_right_guess_wins_and_a_wrong_one_gets_a_hint():
    for row in gem_dataset(GUESS, 6):
        number = number_in(row.privileged)
        wrong = number % 10 + 1
        state = ENVIRONMENT.reset(row)
        hint = say(state, f"I take \\boxed{{{wrong}}}")
        assert not hint.done and hint.reward == 0.0
        assert ("lower" if wrong > number else "higher") in hint.observations[0]["content"]
        assert hint.observations[0]["role"] == "user" and hint.observations[0]["content"].endswith("Enter your next guess.")
        last = say(state, f"\\boxed{{{number}}}")
        assert (last.done, last.reward, last.observations) == (True, 1.0, [])
        assert say(ENVIRONMENT.reset(row), "seven").reward == -0.1, "GEM's own price of no answer"
    for row in gem_dataset("game:Mastermind-v0-hard", 3):
        code = re.search(r"\d.*\d", row.privileged)[0]
        assert say(ENVIRONMENT.reset(row), f"\\boxed{{{code}}}").reward == 1.0


def test_a_sudoku_is_solved_by_the_grid_that_the_teacher_sees():
    (row,) = gem_dataset(SUDOKU, 1)
    solved = [line.split() for line in row.privileged.splitlines()[1:]]
    state, rewards, done = ENVIRONMENT.reset(row), [], False
    for r, c in [(r, c) for r in range(4) for c in range(4) if state.env.board[r][c] == 0]:
        assert not done
        step = say(state, f"\\boxed{{{r + 1} {c + 1} {solved[r][c]}}}")
        rewards.append(step.reward)
        done = step.done
    assert done and sum(rewards) > 0.99


def gem_alone(row, actions):
    """The same game played with GEM by itself, whose draws come from the global streams."""
    env = gem.make(row.data["env_id"])
    env.reset(seed=row.data["seed"])
    answers = [env.step(action) for action in actions]
    return [(f"{observation}\n{info.get('suffix')}", reward) for observation, reward, _, _, info in answers]


def test_interleaved_episodes_draw_as_gem_alone_does_and_leave_the_streams_of_others():
    """In 2048 every move draws a tile."""
    rows = list(gem_dataset(TILES, 2))
    actions = [f"\\boxed{{{move}}}" for move in ("up", "left", "down", "right", "left", "up", "left", "down")]
    expected = [gem_alone(row, actions) for row in rows]
    before = np.random.get_state()[1].tolist()
    environment = ProcessEnvironment(ENVIRONMENT, workers=1)
    for player in (ENVIRONMENT, environment):
        states = [player.reset(row) for row in rows]
        for turn, action in enumerate(actions):
            for state, alone in zip(states, expected, strict=True):
                step = say(state, action, player)
                assert step.reward == alone[turn][1]
                assert step.done or step.observations[0]["content"].startswith(alone[turn][0].rstrip())
    assert expected[0] != expected[1] and np.random.get_state()[1].tolist() == before


@pytest.fixture
def word_list(tmp_path, monkeypatch):
    """NLTK's `words` corpus, of a few words: the real one has to be downloaded."""
    import nltk

    folder = tmp_path / "corpora" / "words"
    folder.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (folder / name).write_text("cat\ndog\nsun\nday\nhouse\nplant\nboard\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *_: True)
    corpus = nltk.corpus.util.LazyCorpusLoader("words", nltk.corpus.reader.WordListCorpusReader, r"(?!README|\.).*")
    for game in ("wordle", "hangman"):
        monkeypatch.setattr(importlib.import_module(f"gem.envs.game_env.{game}"), "words", corpus)


@pytest.mark.parametrize("env_id", ["game:Wordle-v0-easy", "game:Hangman-v0-easy"])
def test_word_games_tell_their_word(env_id, word_list):
    for row in gem_dataset(env_id, 3):
        word = re.fullmatch(r"The secret word is (CAT|DOG|SUN|DAY)\.", row.privileged)[1]
        step = say(ENVIRONMENT.reset(row), f"\\boxed{{{word}}}")
        assert step.done and step.reward == 1.0


def test_word_games_without_the_word_list_say_how_to_get_it(monkeypatch, tmp_path):
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *_: False)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    corpus = nltk.corpus.util.LazyCorpusLoader("words", nltk.corpus.reader.WordListCorpusReader, r"(?!README|\.).*")
    monkeypatch.setattr(importlib.import_module("gem.envs.game_env.wordle"), "words", corpus)
    with pytest.raises(InputError, match="run `python -m nltk.downloader words` once"):
        gem_dataset("game:Wordle-v0-easy", 1)


def test_random_actions_are_demonstrations_of_the_form():
    for env_id in (GUESS, MASTERMIND, TILES):
        row = gem_dataset(env_id, 1, completion="random_actions")[0]
        said = [message_text(turn) for turn in row.completion if turn["role"] == "assistant"]
        assert all(re.fullmatch(r"\\boxed\{[\w ]+\}", text) for text in said) and row.completion[-1]["role"] == "assistant"
        state = ENVIRONMENT.reset(row)
        answers = [say(state, text) for text in said]
        assert [answer.done for answer in answers] == [False] * (len(said) - 1) + [True]
        assert [m for a in answers for m in a.observations] == [turn for turn in row.completion if turn["role"] == "user"]


# ------------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train_base("gem/base", tmp_path_factory.mktemp("base"), batch_size=4)


@pytest.mark.parametrize("method", RECIPES)
def test_both_recipes_train_on_a_game(method, base, tmp_path):
    recipe = set_up(RECIPES[method], load_config(f"gem/{method}", settings(base, tmp_path)))
    try:
        rollouts = recipe.sample_round()
        teacher_sees = [recipe._data.tokenizer.decode(pair.teacher) for _, pair in recipe._data.prompts]
        student_sees = [recipe._data.tokenizer.decode(pair.student) for _, pair in recipe._data.prompts]
        assert all("The target number is" in text for text in teacher_sees)
        assert not any("The target number is" in text for text in student_sees)
        assert len(rollouts) == 8 and all(r.reward == pytest.approx(sum(r.turn_rewards)) for r in rollouts)
        recipe.train()
    finally:
        cleanup()
    assert_trained(tmp_path, least_reward=-0.1)


def test_the_command_of_the_config_runs_it_in_worker_processes(base, tmp_path):
    inside = [
        "environment._component_=pidistill.envs.ProcessEnvironment",
        "environment.environment._component_=pidistill.envs.GEMEnvironment",
        "environment_threads=2",
        "environment_timeout_s=null",
    ]
    run_config("opsd_distributed", "gem/opsd", [*settings(base, tmp_path), *inside])
    assert_trained(tmp_path, least_reward=-0.1)


def test_the_config_of_a_real_model_runs_with_small_sizes(tmp_path):
    texts = [row.messages[0]["content"] for row in gem_dataset("game:GuessTheNumber-v0-hard", 3)]
    checkpoint = qwen_checkpoint(tmp_path / "qwen", texts)
    rounds = ["max_steps=1", "prompts_per_round=2", "group_size=3", "updates_per_round=1", "minibatch_rollouts=null"]
    rows = ["dataset.n=4", "eval_dataset=null", "checkpointer.checkpoint_files=[model.safetensors]"]
    overrides = [*small_model(checkpoint, tmp_path / "run"), *rounds, *rows]
    recipe = set_up("opsd_distributed", load_config("gem/qwen2_5_1.5B_opsd", overrides))
    try:
        recipe.train()
    finally:
        cleanup()
    (row,) = read_metrics(tmp_path / "run")
    assert row["policy_tokens"] > 0 and row["kl_teacher_student_nats"] > 0
