"""The engine: one step of any method, and everything that the next step depends on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctt.data.dataset import DatasetInfo
from ctt.data.seeding import derive_seed
from ctt.methods.base import Method
from ctt.methods.optim import learning_rate
from ctt.methods.sharding import gather, settle
from ctt.settings import Settings
from ctt.train.batches import batch_of, split_batch
from ctt.train.compiling import compile_networks
from ctt.train.context import StepContext
from ctt.train.contract import (
    check_names,
    checked_batch,
    checked_optimizers,
    checked_schedules,
    checked_terms,
    refuse_undeclared,
)
from ctt.train.data_parallel import DataParallel
from ctt.train.distributed import World
from ctt.train.graph_runner import GraphRunner
from ctt.train.prefetcher import Batch as Images
from ctt.train.recomputing import recompute_blocks
from ctt.train.rounds import Labeling, Rounds


class Engine:
    """Trains a method step by step.

    Nothing in a step waits for a GPU unless the method makes it. What a step computes depends on
    the tensors it is given and on those of the method alone, so that it can be recorded and
    replayed as a CUDA graph.

    Args:
        device: that of the step; what the method holds is moved there.
        world: the processes that share the batch; None: this one alone.

    Attributes:
        iteration: steps done.
        drawn, drawn_unlabeled: images that they took, of all processes.
        trained, untrained: images that went through networks with and without gradient, in the
            steps of all processes; not what a method perturbs and decodes again, or, as VAT does,
            searches for by itself.
    """

    def __init__(
        self,
        method: Method,
        settings: Settings,
        info: DatasetInfo,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.settings, self.device, self.world = settings, device, world or World()
        self.method = method.to(device).train()
        if settings.train.gradient_checkpointing:
            recompute_blocks(method.students)
        if settings.train.compile != "off":
            compile_networks([*method.students, *method.teachers], settings.train.compile)
        self.optimizers = self._make_optimizers()
        self.rounds = Rounds(method.rounds(), settings.train.iterations)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.train.amp == "fp16")
        check_names(method)
        schedules = {"rate": self._rate, **checked_schedules(method, method.schedules())}
        self.step = StepContext(settings, info, device, self.world, schedules)
        self.parallel = DataParallel(method, self.world, not settings.model.sync_batch_norm)
        self.iteration = 0
        self.drawn = self.drawn_unlabeled = 0
        self.trained = self.untrained = 0
        self._replay = GraphRunner()

    def __call__(self, labeled: Images, unlabeled: Images | None) -> dict[str, Tensor]:
        """Train on images (B, 3, H, W) uint8 with labels (B, H, W) uint8.

        With several processes these are the images of this one. With `train.accumulate` N they go
        through the students in N parts, one after the other, before the optimiser's step.

        Returns:
            each term of the objective, unweighted, their weighted sum as `total`, and what the
            method logs; with several processes this one's part of them.
        """
        self.method.round = self.rounds.at(self.iteration)
        with self.step.phase("views"):
            self.step.begin(self.iteration)
        # layers that draw numbers, such as dropout, do so alike after a resume
        seed = derive_seed("layers", self.settings.seed, self.iteration, self.world.rank)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:  # torch.manual_seed takes milliseconds to note it for GPUs that may come
            torch.default_generator.manual_seed(seed)
        inputs = [*labeled, *(unlabeled or ())]
        run = self._replayed if self.settings.train.cuda_graph else self._run
        sums = run(inputs)
        self.iteration += 1
        self.drawn += len(labeled[0]) * self.world.size
        self.drawn_unlabeled += len(unlabeled[0]) * self.world.size if unlabeled else 0
        # a step that is replayed does what the recorded one did
        self.trained += self.step.forwards[True] * self.world.size
        self.untrained += self.step.forwards[False] * self.world.size
        return sums

    @property
    def images(self) -> int:
        """Return how many images, labelled and unlabelled, were drawn so far."""
        return self.drawn + self.drawn_unlabeled

    def _replayed(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """`_run` as a CUDA graph."""

        def body(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
            self.step.read(tensors[len(inputs) :])
            return self._run(tensors[: len(inputs)])

        stage: Hashable = (self.method.round, self.method.stage(self.iteration))
        return self._replay(stage, [*inputs, *self.step.tensors()], body)

    def _run(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        step, method = self.step, self.method
        step.whole, step.logged, step.forwards = True, {}, {True: 0, False: 0}
        with step.phase("views"):
            external = self.settings.masks.folder is not None
            b = batch_of(inputs, self.rounds.rounds[method.round], external)
        with torch.no_grad():
            whole = b | method.labeled.totals(b["label"], step)
            b = checked_batch(method, method.prepare(whole, step))
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        step.whole = False
        sums: dict[str, Tensor] = {}
        parts = self.settings.train.accumulate
        for i, part in enumerate(split_batch(b, parts)):
            with self.parallel.summing(i == parts - 1):
                terms = checked_terms(method, self.parallel.module(part, step))
                total = torch.stack([weight * value for weight, value in terms.values()]).sum()
                with step.phase("backward"):
                    # gradients are averaged over the processes, but a loss is a part of the mean
                    scaled = self.scaler.scale(self.world.size * total)
                    scaled.backward()  # type: ignore[no-untyped-call]
            values = {name: value for name, (_, value) in terms.items()} | {"total": total}
            for name, value in values.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        step.whole = True
        with step.phase("optimizer"):
            self._optimize()
        with torch.no_grad():
            with step.phase("ema"):
                self.parallel.average_statistics()
            method.after_step(b, step)
        refuse_undeclared(method, "logged", step.logged)
        return sums | step.logged

    def _rate(self, iteration: int) -> float:
        start, length = self.rounds.schedule(iteration)
        return learning_rate(self.settings.optim, length, iteration - start)

    def begin_round(self, labeling: Labeling) -> None:
        """Let the method label images for the round that the next step belongs to."""
        self.method.round = self.rounds.at(self.iteration)
        self.step.forget()
        with torch.no_grad():
            self.method.begin_round(labeling)
        kind = self.rounds.rounds[self.method.round]
        if kind.images == "kept":
            labeling.finish()
        if kind.restart:
            self.optimizers = self._make_optimizers()

    def _make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the method's optimisers; a group without `lr_factor` gets that of its own rate."""
        made = checked_optimizers(self.method, self.method.optimizers())
        for optimizer in made.values():
            for group in optimizer.param_groups:
                group.setdefault("lr_factor", group["lr"] / self.settings.optim.lr)
        return made

    def _optimize(self) -> None:
        for name, optimizer in self.optimizers.items():
            used = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            if not used:
                continue  # no term of this step trains it
            for group in optimizer.param_groups:
                group["lr"] = self.step["rate"] * group["lr_factor"]
            if self.settings.optim.clip_norm:
                self.scaler.unscale_(optimizer)
                for parameters in self._clipped_together(name, used):
                    nn.utils.clip_grad_norm_(parameters, self.settings.optim.clip_norm)
            self.scaler.step(optimizer)
        self.scaler.update()

    def _clipped_together(
        self, name: str, used: list[nn.Parameter]
    ) -> Iterator[list[nn.Parameter]]:
        """Yield the parameters of an optimiser whose common norm is clipped: those of each student,
        and what is trained beside them."""
        own: set[nn.Parameter] = set()
        for network in self.method.students if name == "students" else ():
            yield list(network.parameters())
            own |= set(network.parameters())
        yield [p for p in used if p not in own]

    def gather(self) -> None:
        """Bring what several processes share out to the first, before it asks for `state_dict`."""
        gather(self.optimizers.values())

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, in tensors, numbers and strings."""
        return {
            "iteration": self.iteration,
            "drawn": self.drawn,
            "drawn_unlabeled": self.drawn_unlabeled,
            "trained": self.trained,
            "untrained": self.untrained,
            "method": self.method.state_dict(),
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            RuntimeError, KeyError, ValueError: it is the state of other networks.
        """
        self.method.load_state_dict(state["method"])
        for name, optimizer in self.optimizers.items():
            options = [
                {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
            ]
            optimizer.load_state_dict(state["optimizers"][name])
            for group, own in zip(optimizer.param_groups, options, strict=True):
                group.update(own)  # the settings of this run, not those of the one that was stopped
            settle(optimizer)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.iteration, self.drawn = int(state["iteration"]), int(state["drawn"])
        self.drawn_unlabeled = int(state["drawn_unlabeled"])
        # checkpoints of earlier versions have none
        self.trained, self.untrained = (int(state.get(n, 0)) for n in ("trained", "untrained"))
        self.method.round = self.rounds.at(self.iteration)
