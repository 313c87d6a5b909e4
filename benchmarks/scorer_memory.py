"""Peak memory of scoring both views with a generalised JSD, forward and backward, gradients to the head and both hidden states.

    python benchmarks/scorer_memory.py                    # N = 1024 and 4096 tokens, H = 1024, V = 151,936, fp32
    python benchmarks/scorer_memory.py --dense            # also a dense implementation, in the same run

Each case runs in its own process; the figure is that process's peak resident memory minus what it held before scoring
(inputs and parameters included, gradients not).
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time

GIB = 2**30


def measure(implementation: str, tokens: int, hidden: int, vocabulary: int, chunk_tokens: int | None) -> dict[str, float]:
    import torch

    from pidistill.divergences import generalised_jsd
    from pidistill.head import Plan, apply_head
    from pidistill.types import Divergence, ScoreRequest

    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, hidden) * hidden**-0.5).requires_grad_()
    student, teacher = (torch.randn(tokens, hidden).requires_grad_() for _ in range(2))
    targets = torch.randint(vocabulary, (tokens,))
    divergence = Divergence("jsd", grad="both", beta=0.5)
    request = ScoreRequest(student_grad=True, teacher_grad=True, divergences=(divergence,), entropy=False)
    (student[:1] @ weight.T).sum().item()  # first-use buffers of the matmul library
    with PeakMemory() as peak:
        begin = time.perf_counter()
        if implementation == "dense":
            logp = [torch.log_softmax(h @ weight.T, dim=-1) for h in (teacher, student)]
            loss = generalised_jsd(*logp, 0.5).mean()
        else:
            plan = Plan(targets, request, 1.0, chunk_tokens)
            scores = plan.as_scores(apply_head(plan, {"student": student, "teacher": teacher}, weight))
            loss = scores.divergences[divergence].mean()
        loss.backward()
        seconds = time.perf_counter() - begin
    return {"gib": peak.bytes / GIB, "seconds": seconds, "loss": loss.item()}


class PeakMemory:
    """Peak of this process's resident memory above what it was on entry, sampled every millisecond."""

    def __enter__(self) -> "PeakMemory":
        self._start = self._peak = self._resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._peak, self._resident()) - self._start

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._peak = max(self._peak, self._resident())

    @staticmethod
    def _resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk-tokens", type=int, default=None)
    parser.add_argument("--dense", action="store_true", help="also the dense implementation, at the first token count")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        implementation, tokens = arguments.case.split(":")
        print(json.dumps(measure(implementation, int(tokens), arguments.hidden, arguments.vocabulary, arguments.chunk_tokens)))
        return
    head = arguments.vocabulary * arguments.hidden * 4 / GIB
    print(f"H={arguments.hidden} V={arguments.vocabulary} fp32; the head's own gradient, the floor: {head:.2f} GiB")
    cases = [f"pidistill:{tokens}" for tokens in arguments.tokens] + [f"dense:{arguments.tokens[0]}"] * arguments.dense
    for case in cases:
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        implementation, tokens = case.split(":")
        figures = f"peak {result['gib']:.2f} GiB  {result['seconds']:.1f} s  loss {result['loss']:.6f}"
        print(f"{implementation:>10}  N={tokens:>5}  {figures}", flush=True)


if __name__ == "__main__":
    main()
