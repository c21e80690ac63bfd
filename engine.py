"""The one training loop. A main supplies ``loss_fn(model, batch) -> (loss, {name: scalar tensor})``.

Randomness: data order is a function of (seed, epoch), a sample's augmentation and mask of (seed, epoch, index), all
other draws of (seed, step, rank). No generator state is stored, and a run may stop and go on at any step.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from util import dist
from util.cluster import slurm
from util.data.loading.loader import device_batches
from util.data.pixels import Pixels
from util.dist import fsdp
from util.run import plan
from util.run.checkpoint_manager import CheckpointManager
from util.run.flops import FlopCounter, peak_flops
from util.run.guards import BadImages, NonFiniteLoss, write_replay
from util.run.log import Log, peak_memory_mb
from util.train.amp import AMP, autocast
from util.train.lr_sched import set_lr
from util.train.state import TrainState, apply_gradients, seed_step
from util.weights.types import Checkpoint


@dataclass(frozen=True)
class Run:
    """What the steps of a run share and do not change."""

    wrapped: nn.Module
    sharded: bool
    loss_fn: Callable
    loader: Iterable
    lr_at: Callable[[float], float]
    device: torch.device
    mean: tuple
    std: tuple
    log: Log
    keeper: CheckpointManager | None
    stop: dist.StopSignal
    bad_images: BadImages
    args: dict
    seed: int
    accum_iter: int
    clip_grad: float | None
    amp: str
    after_step: Callable[[int], None] | None
    before_update: Callable[[float], None] | None
    before_step: Callable[[], None] | None

    @property
    def batches_per_epoch(self) -> int:
        return getattr(self.loader.sampler, "batches_per_epoch", None) or len(self.loader)

    @property
    def updates_per_epoch(self) -> int:
        # Whole ones: batches that do not fill an update are dropped, as are images that do not fill a batch. So the number
        # depends on the effective batch alone, however ranks and micro-batches share it.
        return self.batches_per_epoch // self.accum_iter

    def save(
        self,
        state: TrainState,
        epoch: int,
        numbered: int | None = None,
        best: bool = False,
        must: bool = False,
    ) -> None:
        """Rank 0 saves; a full disk stops the run only where the state would be lost (`must`)."""
        if self.keeper is None or not (dist.is_main() or self.sharded):
            return
        saved = state.to_dict(epoch, self.updates_per_epoch, self.args)
        if classes := getattr(getattr(self.loader.dataset, "index", None), "classes", None):
            saved["classes"] = classes  # what the outputs mean
        if not dist.is_main():
            return
        try:
            self.keeper.save(saved, numbered, best)
        except OSError as e:
            if must:
                raise
            print(f"warning: {e}; training goes on and the next save tries again", flush=True)

    def time_to_save(self) -> bool:
        """Whether the clock asks for a save: rank 0's, on which the others wait only where they must take part."""
        due = self.keeper is not None and self.keeper.time_due()
        return dist.from_main(due) if self.sharded else due

    def leave(self, state: TrainState, epoch: int) -> None:
        """Save, have SLURM start the job again where it would not, and let no rank exit before that is done."""
        received = [name for name in dist.gather_objects(self.stop.received) if name]
        self.save(state, epoch, must=True)
        dist.print_rank0(f"stopped by {received[0]} after step {state.step}: state saved")
        if dist.is_main() and "SIGINT" not in received:
            slurm.requeue()
        dist.barrier()


def train_one_update(
    run: Run, state: TrainState, stream: Iterator[dict], counter: FlopCounter | None = None
) -> tuple[dict, float]:
    """One optimizer step over `accum_iter` micro-batches: mean metrics, and seconds spent waiting for data."""
    sums: dict[str, Tensor] = {}
    waited = 0.0
    for micro in range(run.accum_iter):
        before = time.monotonic()
        batch = next(stream)
        waited += time.monotonic() - before
        run.bad_images.add(batch.get("bad", ()))
        seed_step(run.seed, state.step * run.accum_iter + micro)
        # Gradients cross the network once per update, with the last micro-batch.
        local = micro < run.accum_iter - 1
        if run.sharded:
            state.model.set_requires_gradient_sync(not local)
        # Only here: what prepares data may start processes, which would count for ever.
        counted = counter or contextlib.nullcontext()
        with (
            counted,
            run.wrapped.no_sync() if local and hasattr(run.wrapped, "no_sync") else contextlib.nullcontext(),
        ):
            with autocast(run.device, run.amp):
                loss, terms = run.loss_fn(run.wrapped, batch)
            state.scaler.scale(loss / run.accum_iter).backward()
        for name, value in ({"loss": loss} | terms).items():
            value = value.detach() / run.accum_iter
            sums[name] = sums[name] + value if name in sums else value
    sums["grad_norm"] = apply_gradients(state, run.clip_grad, run.before_step)
    if run.after_step is not None:
        run.after_step(state.step)
    state.step += 1
    return sums, waited


def train_one_epoch(run: Run, state: TrainState, epoch: int) -> bool:
    """Train from the state's step to the end of `epoch`; returns False if a stop was asked and agreed on before."""
    updates, first = run.updates_per_epoch, state.step - epoch * run.updates_per_epoch
    if first == updates:  # stopped just before its evaluation
        return True
    if run.loader.dataset.exact_resume:
        run.loader.sampler.set_position(epoch, first * run.accum_iter)
    else:
        run.loader.dataset.set_epoch(epoch)
    run.wrapped.train()
    stream = device_batches(run.loader, run.device, Pixels(run.mean, run.std))
    for u in range(first, updates):
        done = epoch + u / updates
        lr = run.lr_at(done)
        set_lr(state.optimizer, lr)
        if run.before_update is not None:
            run.before_update(done)
        counter = FlopCounter() if run.log.wants_flops else None
        try:
            metrics, waited = train_one_update(run, state, stream, counter)
        except StopIteration:  # a stream shorter than it said
            state.optimizer.zero_grad(set_to_none=True)
            state.step = (epoch + 1) * updates
            run.log.flush()
            break
        if counter is not None:
            run.log.image_flops = counter.total / (run.accum_iter * run.loader.batch_size)
        run.log.step(state.step - 1, metrics, lr, waited)
        stopping = run.stop.agreed()
        save_now = run.keeper is not None and run.keeper.step_due(state.step)
        if run.log.due or save_now or stopping:
            run.log.flush()  # raises before anything non-finite can be saved
            run.bad_images.check()
            state.meters = run.log.meters
            # The epoch's end saves by itself; clocks differ between ranks, and only rank 0 saves here.
            if u + 1 < updates and (save_now or run.time_to_save()):
                run.save(state, epoch - 1)
        if stopping:
            return u + 1 == updates
    return True


def fit(
    model: nn.Module,
    loss_fn: Callable,
    optimizer: torch.optim.Optimizer,
    loader: Iterable,
    *,
    epochs: int,
    lr_at: Callable[[float], float],
    device: torch.device,
    mean: tuple,
    std: tuple,
    log: Log,
    keeper: CheckpointManager | None = None,
    args: dict | None = None,
    resume: Checkpoint | None = None,
    seed: int = 0,
    accum_iter: int = 1,
    clip_grad: float | None = None,
    amp: str = "fp32",
    compile_mode: str | None = None,
    max_bad_images: float = 0.01,
    after_step: Callable[[int], None] | None = None,
    after_epoch: Callable[[int, TrainState], dict[str, float]] | None = None,
    before_update: Callable[[float], None] | None = None,
    before_step: Callable[[], None] | None = None,
    extras: dict[str, nn.Module] | None = None,
    dry_run: bool = False,
) -> bool:
    """Train `model` for `epochs`, from the start or from a checkpoint, `resume`.

    `lr_at(epochs done, fractional) -> learning rate`. `before_update(epochs done)` runs before each update, which is where
    other schedules are set; `before_step()` when its gradients are complete and clipped; `after_step(step)` after it.
    `after_epoch(epoch, state)` returns figures for the epoch's log line. `extras` are saved and resumed by name beside
    the model. `compile_mode` is a mode of torch.compile, None for a model that is not compiled. With `dry_run` a few
    steps are measured, the plan of the whole run is printed, and nothing is written.
    Returns True when all epochs are done, False when a signal asked to stop (the state is then saved). Raises
    NonFiniteLoss on all ranks together and leaves a replay file; ValueError for settings that cannot work.
    """
    sharded = fsdp.is_sharded(model)
    wrapped = dist.data_parallel(model, device) if dist.world_size() > 1 and not sharded else model
    run = Run(
        torch.compile(wrapped, mode=compile_mode) if compile_mode else wrapped,
        sharded,
        loss_fn,
        loader,
        lr_at,
        device,
        mean,
        std,
        log,
        keeper,
        dist.StopSignal(slurm.requeue_at_the_limit),
        BadImages(loader.dataset, log.output_dir, max_bad_images),
        args or {},
        seed,
        accum_iter,
        clip_grad,
        amp,
        after_step,
        before_update,
        before_step,
    )
    updates = run.updates_per_epoch
    if accum_iter > run.batches_per_epoch:
        raise ValueError(
            f"--accum_iter {accum_iter} is longer than the epoch of {run.batches_per_epoch} batches: "
            "lower it or --batch_size"
        )
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    state = TrainState(model, optimizer, scaler, extras=extras or {})
    if resume is not None:
        state.load_checkpoint(resume, updates, loader.dataset.exact_resume)
        resume.release()  # as large as the state itself, and the caller holds it to the end
    started = (
        f"continues {resume.path} at step {state.step}"
        if resume
        else "step 0: there is no checkpoint to continue"
    )
    if dry_run:
        dist.print_rank0(_plan(run, state, epochs, started))
        return True
    # Sums of an epoch whose steps are all done: only its evaluation is missing.
    first_epoch = (state.step - bool(state.meters)) // updates
    log.truncate(first_epoch)
    images_per_update = loader.batch_size * accum_iter * dist.world_size()
    if first_epoch >= epochs:
        dist.print_rank0(
            f"all {epochs} epochs are done already: nothing to do (raise --epochs, or choose another --output_dir)"
        )
    else:
        log.peak_flops = peak_flops(model, device, AMP[amp] or torch.float32, compile_mode)
    if first_epoch < epochs and keeper is not None and dist.is_main():
        keeper.claim()
        plan.write_record(keeper.dir, run.args, _resolved(run, state, started))
    with run.stop, slurm.lost_peers(run.stop):
        for epoch in range(first_epoch, epochs):
            log.start_epoch(
                epoch, epochs, state.step - epoch * updates, updates, images_per_update, state.meters
            )
            try:
                finished = train_one_epoch(run, state, epoch)
            except NonFiniteLoss as e:
                write_replay(log.output_dir, e, loader.sampler, epoch, updates, accum_iter, seed)
                raise
            if not finished or run.stop.agreed(now=True):  # evaluation may take longer than a scheduler waits
                run.leave(state, epoch - 1)
                return False
            log.end_epoch(_finish_epoch(run, state, epoch, after_epoch))
            state.meters = {}
            last, best = epoch + 1 == epochs, state.best_epoch == epoch
            due = keeper is not None and (
                keeper.keeps(epoch) or keeper.step_due(state.step) or run.time_to_save()
            )
            if keeper is not None and (last or best or due):
                run.save(state, epoch, epoch if last or keeper.keeps(epoch) else None, best, must=last)
    return True


def _resolved(run: Run, state: TrainState, started: str) -> dict:
    """What became of the flags on this machine, for run.json."""
    return {
        "device": str(run.device),
        "amp": run.amp,
        "ranks": dist.world_size(),
        "sharded": run.sharded,
        "start": started,
        "effective_batch": run.loader.batch_size * run.accum_iter * dist.world_size(),
        "updates_per_epoch": run.updates_per_epoch,
        "lr": state.optimizer.defaults["lr"],
        "mean": list(run.mean),
        "std": list(run.std),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "images": len(run.loader.dataset),
        "matmul_gflops": run.log.peak_flops and run.log.peak_flops / 1e9,
    }


def _plan(run: Run, state: TrainState, epochs: int, started: str) -> str:
    """Measure a few updates, which change weights in memory only, and describe the whole run."""
    step, updates, kept = state.step, run.updates_per_epoch, 0

    def batches(epoch: int) -> Iterator[dict]:
        if run.loader.dataset.exact_resume:
            run.loader.sampler.set_position(epoch)
        return device_batches(run.loader, run.device, Pixels(run.mean, run.std))

    run.wrapped.train()
    if run.before_update is not None:
        run.before_update(step / updates)
    measured = plan.measure(
        lambda stream, counter: train_one_update(run, state, stream, counter)[1],
        batches,
        run.device,
        AMP[run.amp] or torch.float32,
        peak_memory_mb,
    )
    if run.keeper is not None:
        kept = len({e for e in range(epochs) if run.keeper.keeps(e)} | {epochs - 1})
        kept = min(kept, run.keeper.keep) if run.keeper.keep else kept
    saved = state.to_dict(0, updates, {})
    return plan.describe(
        measured,
        model=state.model,
        device=run.device,
        amp=run.amp,
        updates=updates,
        epochs=epochs,
        step=step,
        start=started,
        images_per_update=run.loader.batch_size * run.accum_iter * dist.world_size(),
        saved_mb=plan.size_mb(saved),
        kept=kept,
        folder=run.keeper.dir if run.keeper is not None else None,
    )


def _finish_epoch(run: Run, state: TrainState, epoch: int, after_epoch: Callable | None) -> dict[str, float]:
    """The figures of the epoch's end; if they fail, what the epoch has learned is saved first."""
    for module in (state.model, *state.extras.values()):
        dist.share_buffers(module)  # what is evaluated on many ranks is what is saved
    try:
        return after_epoch(epoch, state) if after_epoch else {}
    except Exception:
        if not run.sharded:
            run.save(state, epoch - 1)
        raise
