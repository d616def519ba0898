"""`train.py --profile`: a trace of some steps by torch.profiler, to see where the time goes."""

import torch
from torch import Tensor
from torch.profiler import profile, schedule

from smallm.training.trainer import Trainer

TRACE = "trace.json"
WAIT, WARM_UP, ACTIVE = 4, 1, 5  # steps: left out, for the profiler to warm up, recorded


class ProfiledTrainer(Trainer):
    """A `Trainer` whose main process writes the trace of five steps into the run folder."""

    def train(self) -> int:
        plan = schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1)
        with profile(schedule=plan, on_trace_ready=self._write) as self._profiler:
            return super().train()

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        result = super().train_step(step)
        self._profiler.step()
        return result

    def _write(self, profiler: torch.profiler.profile) -> None:
        if self.accelerator.is_main_process:
            profiler.export_chrome_trace(str(self.folder / TRACE))
            self.logger.info(f"profile: {self.folder / TRACE}; open it in https://ui.perfetto.dev or chrome://tracing")
