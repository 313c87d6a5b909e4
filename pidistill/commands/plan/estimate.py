"""Make both estimates of a config: memory at the longest of its lengths, seconds at their means."""

import dataclasses
from dataclasses import dataclass

from omegaconf import DictConfig

from pidistill.commands.plan.devices import Device
from pidistill.commands.plan.lengths import RowLengths
from pidistill.commands.plan.memory import memory, peak
from pidistill.commands.plan.reading import setup_of, workload_of
from pidistill.commands.plan.seconds import seconds
from pidistill.commands.plan.workload import Setup, Workload, count_tokens


@dataclass(frozen=True)
class Estimate:
    """Hold bytes by phase and part, seconds by phase of a round, and the tokens that the tree and the padded batch feed."""

    memory: dict[str, dict[str, float]]
    seconds: dict[str, float]
    tree_tokens: int
    padded_tokens: int

    @property
    def peak(self) -> tuple[str, float]:
        return peak(self.memory)


def estimate(cfg: DictConfig, rows: RowLengths, ranks: int, device: Device) -> Estimate:
    setup = setup_of(cfg, ranks, device.kind)
    typical, longest = (workload_of(cfg, lengths, ranks) for lengths in (rows.mean, rows.longest))
    tree, padded = (_fed(setup, dataclasses.replace(typical, packing=packing)) for packing in ("tree", "padded"))
    return Estimate(memory(setup, longest), seconds(setup, typical, device), tree, padded)


def _fed(setup: Setup, work: Workload) -> int:
    """Return the tokens that the updates of a round feed to models."""
    return work.updates * sum(count_tokens(work, one.views, work.trained_groups).fed for one in setup.update)
