"""Answer assistant turns, and give rewards for them.

In: an :class:`~pidistill.types.Example`, then the assistant's messages, one turn at a time.
Out: an :class:`EnvStep` per turn: the messages that come next, a reward, and whether the episode has ended.

Read base.py first: the protocol, and the check of what an environment answers. single_turn.py is the shortest environment. Then
function_tools.py (Python functions as tools), replay.py (recorded episodes), process.py (any of them in worker processes),
tiny_world/ and tool_world/ (worlds for CPUs, with datasets of their own), gem.py and reasoning_gym.py (other libraries).
"""

from pidistill.envs.base import Environment, EnvironmentCrash, EnvironmentOutputError, EnvironmentTimeout, EnvStep, check_step
from pidistill.envs.function_tools import FunctionToolEnvironment
from pidistill.envs.gem import GEMEnvironment, gem_dataset
from pidistill.envs.process import ProcessEnvironment
from pidistill.envs.reasoning_gym import ReasoningGymEnvironment, reasoning_gym_dataset
from pidistill.envs.replay import ReplayEnvironment
from pidistill.envs.routed import RoutedEnvironment
from pidistill.envs.single_turn import SingleTurn
from pidistill.envs.state_privileged import StatePrivileged
