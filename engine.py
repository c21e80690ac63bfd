"""The training loop.

A main supplies an `Objective`; `fit` runs its updates. Data order is a function of (seed, epoch). A sample's
augmentation and mask are functions of (seed, epoch, index). All other draws are functions of (seed, step,
rank). No generator state is stored, so a run can stop and continue at any step.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from util import dist
from util.cluster import slurm
from util.data.contract import Batches, Samples
from util.data.loading.loader import device_batches
from util.data.loading.samplers import EpochSampler
from util.data.loading.waits import Guard, NoData, StopAsked, guarded
from util.dist import fsdp
from util.flags.parser import with_flags
from util.run import plan
from util.run.checkpoint_manager import Owed
from util.run.flops import FlopCounter, peak_flops
from util.run.guards import BadImages, NonFiniteLoss, write_replay
from util.run.log import peak_memory_mb
from util.run.session import Session
from util.run.training_images import TrainingImages
from util.train.amp import AMP
from util.train.lr_sched import set_lr
from util.train.objective import Objective
from util.train.setup import Budget, Setup
from util.train.state import TrainState, apply_gradients, seed_step

__all__ = ["Budget", "Objective", "Session", "Setup", "fit"]


@dataclass(frozen=True)
class Run:
    """What the updates of a run share and do not change.

    `model` is the model as the main made it. `wrapped` is the same model behind DistributedDataParallel and
    torch.compile; the loss calls that one.
    """

    model: nn.Module
    wrapped: nn.Module
    objective: Objective
    loader: Batches[Samples]
    setup: Setup
    budget: Budget
    session: Session
    stop: dist.StopSignal
    bad_images: BadImages
    guard: Guard

    @property
    def sharded(self) -> bool:
        return fsdp.is_sharded(self.model)

    @property
    def batches_per_epoch(self) -> int:
        return getattr(self.loader.sampler, "batches_per_epoch", None) or len(self.loader)

    @property
    def updates_per_epoch(self) -> int:
        # Batches that do not fill an update are dropped, as are images that do not fill a batch.
        # So the number depends on the effective batch alone, not on how ranks and micro-batches share it.
        return self.batches_per_epoch // self.budget.accum_iter

    @property
    def updates(self) -> int:
        return self.budget.epochs * self.updates_per_epoch

    @property
    def images_per_update(self) -> int:
        return self.loader.batch_size * self.budget.accum_iter * dist.world_size()

    def reached_max_steps(self, state: TrainState) -> bool:
        """Whether the run has made the updates of a trial, after which it stops although epochs are left."""
        most = self.budget.max_steps
        return most is not None and state.step >= most

    def batches(self, epoch: int, skip: int = 0) -> Iterator[dict]:
        """Yield the epoch's batches on the device, without the first `skip`."""
        sampler = self.loader.sampler
        if isinstance(sampler, EpochSampler):
            sampler.set_position(epoch, skip)
        else:
            # A stream has an order of its own.
            self.loader.dataset.set_epoch(epoch)
        return device_batches(self.loader, self.setup.device, self.setup.pixels)

    def save(
        self,
        state: TrainState,
        epoch: int,
        numbered: int | None = None,
        best: bool = False,
        must: bool = False,
    ) -> None:
        """Save on rank 0. A full disk stops the run only if the state would be lost (`must`)."""
        checkpoints = self.session.checkpoints
        if checkpoints is None or not (dist.is_main() or self.sharded):
            return
        saved = state.to_dict(epoch, self.updates_per_epoch, self.session.flags)
        classes = getattr(self.loader.dataset, "classes", None)
        if classes:
            saved["classes"] = classes  # the meaning of the model's outputs
        if images := TrainingImages.of(self.loader.dataset):
            saved["training_images"] = images.to_dict()
        if not dist.is_main():
            return
        try:
            checkpoints.save(saved, numbered, best)
        except OSError as error:
            if must:
                raise
            print(f"warning: {error}; training continues and the next save tries again", flush=True)

    def check_owner(self) -> None:
        """Raise ValueError on rank 0 if another run has taken the folder over: this one may write no more."""
        checkpoints = self.session.checkpoints
        if checkpoints is None or not dist.is_main():
            return
        try:
            checkpoints.check_owner()
        except OSError as error:
            print(f"warning: {error}; training continues", flush=True)

    def time_to_save(self) -> bool:
        """Whether the clock asks for a save.

        Rank 0's clock decides. The other ranks wait for its answer only if the model is sharded: a save then
        needs all of them.
        """
        checkpoints = self.session.checkpoints
        due = checkpoints is not None and checkpoints.time_due()
        if self.sharded:
            return dist.from_main(due)
        return due

    def step_to_save(self, step: int) -> bool:
        """Whether update number `step` asks for a save; the same on every rank."""
        checkpoints = self.session.checkpoints
        return checkpoints is not None and checkpoints.step_due(step)

    def leave(self, state: TrainState, epoch: int) -> None:
        """Save and ask SLURM to requeue the job if it would not do so itself; no rank exits before that.

        Raises NoData on all ranks if one of them stops the run because it has lost a data worker.
        """
        received = [name for name in dist.gather_objects(self.stop.received) if name]
        failures = [text for text in dist.gather_objects(self.guard.failure) if text]
        self.save(state, epoch, must=True)
        dist.print_rank0(f"stopped by {received[0]} after step {state.step}: state saved")
        # A worker that was killed for its memory would be killed again.
        if dist.is_main() and "SIGINT" not in received and not failures:
            slurm.requeue()
        dist.barrier()
        if failures:
            raise NoData(failures[0])

    def save_alone(self, state: TrainState) -> None:
        """Save the finished updates while the other ranks may be inside of the next one, and wait for this.

        Does nothing on other ranks than 0, and if the model is sharded. With several ranks the averages of
        the epoch lack the updates since the last log point, as the values of the other ranks cannot be had.
        Raises NonFiniteLoss or ValueError as the check before any other save does.
        """
        if self.session.checkpoints is None or not dist.is_main() or self.sharded:
            return
        log = self.session.log
        if dist.world_size() == 1:
            log.flush()
            self.bad_images.check()
            state.meters = log.meters
        # A value that is not finite on any rank has reached the weights of all.
        elif not all(p.isfinite().all() for p in state.model.parameters()):
            print("the weights are not finite: the state is not saved", flush=True)
            return
        self.save(state, log.epoch - 1, must=True)
        print(f"state saved after step {state.step}", flush=True)

    def leave_alone(self, state: TrainState) -> None:
        """Save without the other ranks, and ask SLURM to requeue the job as `leave` does.

        The others get no answer any more: the launcher ends them, or the connection that they lose.
        """
        self.save_alone(state)
        print(f"stopped by {self.stop.received} while waiting for data", flush=True)
        if self.stop.received != "SIGINT":
            slurm.requeue()


def fit(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    loader: Batches[Samples],
    setup: Setup,
    budget: Budget,
    session: Session,
) -> bool:
    """Train `model` for `budget.epochs`, from the start or from the checkpoint `session.start`.

    In a dry run a few updates are measured, the plan of the whole run is printed, and nothing is written.
    Returns True when all epochs are done, or `budget.max_steps` updates. Returns False when a signal asked to
    stop, after saving the state. Raises NonFiniteLoss on all ranks together and leaves a replay file. Raises
    ValueError for settings that cannot work. Raises NoData if the data do not come, after saving the state if
    this process can.
    """
    wrapped = _wrap(model, setup, budget)
    stop = dist.StopSignal(slurm.requeue_at_the_limit)
    bad_images = BadImages(loader.dataset, session.log.output_dir, budget.max_bad_images)
    guard = Guard(stop, fsdp.is_sharded(model))
    run = Run(model, wrapped, objective, loader, setup, budget, session, stop, bad_images, guard)
    if budget.accum_iter > run.batches_per_epoch:
        raise ValueError(
            f"`accum_iter` {budget.accum_iter} is longer than the epoch of {run.batches_per_epoch} batches: "
            "lower it or `batch_size`"
        )
    scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.amp == "fp16")
    state = TrainState(model, optimizer, scaler, extras=objective.state())
    owed = session.owed()
    start = _load_start(run, state)
    if session.dry_run:
        dist.print_rank0(with_flags(_plan(run, state, start), session.flags))
        return True
    # Meters of a complete epoch mean that only its evaluation is missing, so that epoch is entered again.
    first_epoch = (state.step - bool(state.meters)) // run.updates_per_epoch
    if _is_done(run, state, first_epoch, owed):
        return True
    session.log.peak_flops = peak_flops(
        model, setup.device, AMP[setup.amp] or torch.float32, budget.compile_mode
    )
    _take_folder(run, state, start, owed)
    session.log.open(first_epoch, state.step, run.updates_per_epoch)
    with run.stop, slurm.lost_peers(run.stop), guarded(run.guard):
        return _train(run, state, first_epoch)


def _is_done(run: Run, state: TrainState, first_epoch: int, owed: Owed | None) -> bool:
    """Whether nothing is left to train; print so, and make up for what a killed run `owed`."""
    if first_epoch >= run.budget.epochs:
        run.session.finish(owed)
        text = (
            f"all epochs ({run.budget.epochs}) are done already: nothing to do (raise `epochs`, or choose "
            "another `output_dir`)"
        )
        dist.print_rank0(with_flags(text, run.session.flags))
        return True
    # At an epoch's end only its evaluation may be missing, which is made up for.
    if run.reached_max_steps(state) and state.step < (first_epoch + 1) * run.updates_per_epoch:
        _print_stopped_early(run, state)
        return True
    return False


def _train(run: Run, state: TrainState, first_epoch: int) -> bool:
    """Train the epochs that are left; return False, after saving the state, if a signal asked to stop."""
    try:
        for epoch in range(first_epoch, run.budget.epochs):
            if not train_one_epoch(run, state, epoch):
                return False
            if run.reached_max_steps(state) and state.step < run.updates:
                _print_stopped_early(run, state)
                break
    except StopAsked:
        run.leave_alone(state)
        return False
    return True


def _print_stopped_early(run: Run, state: TrainState) -> None:
    """Print how far a trial has come, and how it continues."""
    text = f"stopped after {state.step} of {run.updates} updates, as `max_steps` {run.budget.max_steps} says"
    if run.session.checkpoints is None:
        text += "; nothing is saved, as there is no `output_dir`"
    else:
        text += ": the same command without it continues"
    dist.print_rank0(with_flags(text, run.session.flags))


def _wrap(model: nn.Module, setup: Setup, budget: Budget) -> nn.Module:
    """Put DistributedDataParallel and torch.compile around a model as far as the run needs them."""
    wrapped = model
    # A sharded model averages its gradients itself.
    if dist.world_size() > 1 and not fsdp.is_sharded(model):
        wrapped = dist.data_parallel(model, setup.device)
    if budget.compile_mode:
        # torch's stub says that any callable is returned; for a module it is a module.
        wrapped = torch.compile(wrapped, mode=budget.compile_mode)  # type: ignore[assignment]
    return wrapped


def _load_start(run: Run, state: TrainState) -> str:
    """Load the checkpoint that the run continues, if there is one; return a phrase about the start."""
    if run.session.start is None:
        return "step 0: there is no checkpoint to continue"
    start = run.session.start
    state.load_checkpoint(start, run.updates_per_epoch, run.loader.dataset.exact_resume)
    # Only now: what does not fit this model at all is another file, not other data.
    run.session.check_images(run.loader.dataset)
    # The loaded tensors are as large as the state itself, and the caller keeps its reference to the end.
    start.release()
    return f"continues {start.path} at step {state.step}"


def _take_folder(run: Run, state: TrainState, start: str, owed: Owed | None) -> None:
    """Become the owner of the run's folder, before anything is written there, and record this start."""
    session = run.session
    session.claim(owed)
    if session.checkpoints is not None:
        plan.write_record(session.checkpoints.dir, session.flags, _resolved(run, state, start))


def train_one_epoch(run: Run, state: TrainState, epoch: int) -> bool:
    """Train from the state's step to the end of `epoch`, evaluate, log and save.

    Returns False, after saving the state, if a signal asked to stop. If `max_steps` is reached before the end
    of the epoch, the state is saved and nothing is evaluated.
    """
    log = run.session.log
    updates = run.updates_per_epoch
    log.start_epoch(
        epoch,
        run.budget.epochs,
        state.step - epoch * updates,
        updates,
        run.images_per_update,
        state.meters,
    )
    try:
        finished = run_updates(run, state, epoch)
    except NonFiniteLoss as error:
        write_replay(
            log.output_dir, error, run.loader.sampler, epoch, updates, run.budget.accum_iter, run.budget.seed
        )
        raise error.with_advice(run.setup.amp, run.budget.clip_grad, _next_start(run)) from None
    ends_within = not finished and run.reached_max_steps(state)
    # Ask again before the evaluation, which may take longer than a scheduler waits.
    if not (finished or ends_within) or run.stop.agreed(now=True):
        run.leave(state, epoch - 1)
        return False
    if ends_within:
        run.save(state, epoch - 1, must=True)
        return True
    run.check_owner()
    figures = evaluate_epoch(run, state, epoch)
    # Again, because the evaluation may take long.
    run.check_owner()
    log.end_epoch(figures)
    state.meters = {}
    save_epoch(run, state, epoch)
    return True


def _next_start(run: Run) -> str:
    """Return a phrase about where the next start of the run would begin."""
    checkpoints = run.session.checkpoints
    if checkpoints is None or not os.path.isfile(checkpoints.last):
        return "starts again from step 0"
    return f"continues from {checkpoints.last}"


def run_updates(run: Run, state: TrainState, epoch: int) -> bool:
    """Train from the state's step to the end of `epoch`; return False if all ranks agreed to stop before, or
    if `max_steps` is reached.
    """
    updates = run.updates_per_epoch
    first = state.step - epoch * updates
    if first == updates:  # the run stopped just before the evaluation of this epoch
        # The state that is saved after it has the rate and the schedules of the last update.
        _set_schedules(run, state, epoch + (updates - 1) / updates)
        return True
    stream = run.batches(epoch, first * run.budget.accum_iter)
    run.wrapped.train()
    for update in range(first, updates):
        lr = _set_schedules(run, state, epoch + update / updates)
        try:
            metrics, waited = train_one_update(run, state, stream, _counter(run))
        except NoData:
            run.save_alone(state)
            raise
        except StopIteration:
            # The stream ended before its announced length.
            state.optimizer.zero_grad(set_to_none=True)
            state.step = (epoch + 1) * updates
            run.session.log.flush()
            state.meters = run.session.log.meters
            break
        run.session.log.step(state.step - 1, metrics, lr, waited)
        stopping = run.stop.agreed() or run.reached_max_steps(state)
        _log_and_save(run, state, epoch, stopping)
        if stopping:
            return update + 1 == updates
    return True


def _set_schedules(run: Run, state: TrainState, done: float) -> float:
    """Set what depends on the epochs done, for the next update; return the learning rate."""
    lr = run.budget.lr_at(done)
    set_lr(state.optimizer, lr)
    run.objective.before_update(done)
    return lr


def _counter(run: Run) -> FlopCounter | None:
    """Return a counter for the one update whose operations are counted, the first of the run."""
    if run.session.log.wants_flops:
        return FlopCounter()
    return None


def _log_and_save(run: Run, state: TrainState, epoch: int, stopping: bool) -> None:
    """At a log point, or before a save or a stop, read the metrics, check them, and save if that is due."""
    log = run.session.log
    save_now = run.step_to_save(state.step)
    if not (log.due or save_now or stopping):
        return
    run.check_owner()
    log.flush()  # raises before anything non-finite can be saved
    run.bad_images.check()
    state.meters = log.meters
    # The end of the epoch saves by itself. Clocks differ between ranks, so only rank 0's counts here.
    last = state.step == (epoch + 1) * run.updates_per_epoch
    if not last and (save_now or run.time_to_save()):
        run.save(state, epoch - 1)


def train_one_update(
    run: Run, state: TrainState, stream: Iterator[dict], counter: FlopCounter | None = None
) -> tuple[dict[str, Tensor], float]:
    """Run one optimizer step over `accum_iter` micro-batches.

    Returns the mean metrics, scalars on the device, and the seconds spent waiting for data. Raises
    StopIteration at the end of the stream. Raises NoData or StopAsked, with the state as it was before, if a
    batch does not come.
    """
    accum_iter = run.budget.accum_iter
    before: list[Tensor] = []
    # The first micro-batch comes before any change.
    if accum_iter > 1:
        before = [buffer.clone() for buffer in _buffers(state)]
    sums: dict[str, Tensor] = {}
    waited = 0.0
    for micro in range(accum_iter):
        start = time.monotonic()
        batch = _next_batch(state, stream, before)
        waited += time.monotonic() - start
        run.bad_images.add(batch.get("bad", ()))
        seed_step(run.budget.seed, state.step * accum_iter + micro)
        # The counter is active only here: data loading may start processes, which would inherit it.
        with counter or contextlib.nullcontext(), _gradient_sync(run, last=micro + 1 == accum_iter):
            with run.setup.autocast():
                loss, terms = run.objective.loss(run.wrapped, batch)
            state.scaler.scale(loss / accum_iter).backward()
        for name, value in ({"loss": loss} | terms).items():
            share = value.detach() / accum_iter
            if name in sums:
                share = sums[name] + share
            sums[name] = share
    sums["grad_norm"] = apply_gradients(state, run.budget.clip_grad, run.objective.before_step)
    run.objective.after_step(state.step)
    state.step += 1
    if counter is not None:
        run.session.log.image_flops = counter.total / (accum_iter * run.loader.batch_size)
    return sums, waited


def _next_batch(state: TrainState, stream: Iterator[dict], before: list[Tensor]) -> dict:
    """Return the next batch, or restore the state's buffers if it does not come."""
    try:
        return next(stream)
    except (NoData, StopAsked):
        # The update's earlier micro-batches have changed running statistics.
        for buffer, value in zip(_buffers(state), before):
            buffer.copy_(value)
        raise


def _buffers(state: TrainState) -> list[Tensor]:
    return [b for module in (state.model, *state.extras.values()) for b in module.buffers()]


def _gradient_sync(run: Run, last: bool) -> contextlib.AbstractContextManager:
    """Return the context of a micro-batch: gradients cross the network once per update, with the last one."""
    if run.sharded:
        fsdp.set_gradient_sync(run.model, last)
    elif not last:
        # DistributedDataParallel has it, also behind torch.compile.
        return getattr(run.wrapped, "no_sync", contextlib.nullcontext)()
    return contextlib.nullcontext()


def evaluate_epoch(run: Run, state: TrainState, epoch: int) -> dict[str, float]:
    """Return the figures of the epoch's end. If they fail, save first what the epoch has learned."""
    # Ranks have their own batch statistics. What is evaluated on many ranks must be what is saved.
    for module in (state.model, *state.extras.values()):
        dist.share_buffers(module)
    try:
        return run.objective.after_epoch(epoch, state)
    except Exception:
        # Saving a sharded model needs all ranks, and the others may not have failed.
        if not run.sharded:
            run.save(state, epoch - 1)
        raise


def save_epoch(run: Run, state: TrainState, epoch: int) -> None:
    """Save at the end of an epoch if it is the last one, the best one, or due."""
    checkpoints = run.session.checkpoints
    if checkpoints is None:
        return
    last = epoch + 1 == run.budget.epochs
    best = state.best_epoch == epoch
    keeps = checkpoints.keeps(epoch)
    ends = last or run.reached_max_steps(state)
    due = keeps or run.step_to_save(state.step) or run.time_to_save()
    if ends or best or due:
        numbered = None
        if last or keeps:
            numbered = epoch
        run.save(state, epoch, numbered, best, must=ends)


def _resolved(run: Run, state: TrainState, start: str) -> dict:
    """Describe for run.json what became of the flags on this machine."""
    log = run.session.log
    return {
        "device": str(run.setup.device),
        "amp": run.setup.amp,
        "ranks": dist.world_size(),
        "sharded": run.sharded,
        "start": start,
        "effective_batch": run.images_per_update,
        "updates_per_epoch": run.updates_per_epoch,
        "lr": state.optimizer.defaults["lr"],
        "mean": list(run.setup.pixels.mean),
        "std": list(run.setup.pixels.std),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "images": len(run.loader.dataset),
        "matmul_gflops": log.peak_flops and log.peak_flops / 1e9,
    }


def _plan(run: Run, state: TrainState, start: str) -> str:
    """Measure a few updates, which change weights in memory only, and describe the whole run."""
    step = state.step
    updates = run.updates_per_epoch
    run.wrapped.train()
    run.objective.before_update(step / updates)
    measured = plan.measure(
        lambda stream, counter: train_one_update(run, state, stream, counter)[1],
        run.batches,
        run.setup.device,
        AMP[run.setup.amp] or torch.float32,
        peak_memory_mb,
    )
    planned = plan.PlannedRun(
        epochs=run.budget.epochs,
        updates=updates,
        step=step,
        images_per_update=run.images_per_update,
        start=start,
        saved_mb=plan.size_mb(state.to_dict(0, updates, {})),
        checkpoints=run.session.checkpoints,
    )
    return plan.describe(measured, planned, state.model, run.setup.device, run.setup.amp)
