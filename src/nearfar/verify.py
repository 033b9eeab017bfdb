"""Certificates for code that is not nearfar's: does a loss of several processes have the gradient of one, and does a
loader go on exactly where it stopped?

In tests::

    def test_my_loss() -> None:
        assert verify.loss(my_module.contrastive_loss, ranks=2).passed

    def test_my_loader() -> None:
        assert verify.resume(my_module.make_loader).passed
"""

from __future__ import annotations

import gc
import inspect
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nearfar.arguments import whole_number
from nearfar.data.cache import content_key
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.training.verify_ddp import Batch, Encoder, batches, joined, start_method

__all__ = ["LossVerdict", "ResumeVerdict", "loss", "resume"]

#: largest relative difference of float64 gradients that rounding explains
ROUNDING = 1e-6


# -- a loss of several processes -----------------------------------------------------------------------------
@dataclass(frozen=True)
class LossVerdict:
    """A loss on several processes beside the same loss on one, over the same rows.

    ``scale`` is the length of the encoder's gradient over that of one process, ``direction`` the cosine of the two,
    ``temperature`` the ratio of the gradients of a learned scale (None: the loss takes none). ``values`` are the loss
    of each process, ``value`` that of one.
    """

    ranks: int
    scale: float
    direction: float
    temperature: float | None
    value: float
    values: tuple[float, ...]

    @property
    def passed(self) -> bool:
        """Whether gradients agree; values may differ, where each process has a part of the loss."""
        exact = abs(self.scale - 1) < ROUNDING and self.direction > 1 - ROUNDING
        return exact and (self.temperature is None or abs(self.temperature - 1) < ROUNDING)

    def __str__(self) -> str:
        learned = "" if self.temperature is None else f", of the temperature {self.temperature:.6f} ×"
        numbers = f"gradient {self.scale:.6f} × that of one process, cosine {self.direction:.6f}{learned}"
        return f"{'exact' if self.passed else 'different'}: {numbers}. {self.advice}".strip()

    @property
    def advice(self) -> str:
        """What the numbers look like."""
        if self.passed:
            return ""
        if self.direction > 1 - ROUNDING and abs(self.scale * self.ranks - 1) < ROUNDING:
            return (
                "The gradient is 1/W: gathered rows carry no gradient, or DDP averages what should be summed. Gather "
                "with gradients (torch.distributed.nn.all_gather, nearfar.training.gather), or multiply the loss by W."
            )
        if self.direction > 1 - ROUNDING and abs(self.scale / self.ranks - 1) < ROUNDING:
            return (
                "The gradient is W times too long: the loss is multiplied by W although DDP sums it already."
            )
        if self.direction > 1 - ROUNDING:
            return "The direction is right, the length is not."
        return (
            "The direction differs: negatives of other processes are missing, the positives are at the wrong offset "
            "(rank × rows), or gathered rows carry no gradient."
        )


def loss(
    fn: Callable[..., Tensor], ranks: int = 2, *, labels: bool = False, timeout: float = 120.0
) -> LossVerdict:
    """The gradient certificate of a loss: real processes under DistributedDataParallel (gloo, float64, an uneven last
    batch) against one process with all rows.

    Args:
        fn: of a process' own embeddings, ``fn(a, b)``; with a third parameter also of a learned scale, ``fn(a, b,
            scale)``; with ``labels``, ``fn(a, labels)`` or ``fn(a, labels, scale)``. It gathers what it needs of other
            processes itself, and is a function or object of a module, since processes import it.
        ranks: processes, 2 or more.
        timeout: seconds after which processes are taken to wait for each other.

    Raises:
        NearfarError: a function that processes cannot import, one that fails in a process, processes that wait for each
            other.
    """
    ranks = whole_number("ranks", ranks, 2)
    takes_scale = _parameters(fn) >= 3
    try:
        pickle.dumps(fn)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NearfarError(
            f"the loss cannot be handed to processes ({error}): give a function of a module, and no lambda or function "
            "inside of a function."
        ) from None
    one = _run(fn, [joined(batches(ranks))], takes_scale, labels, timeout)
    several = _run(fn, batches(ranks), takes_scale, labels, timeout)
    first, second = one["gradient"], several["gradient"]
    norm = float(first.norm())
    if norm == 0:
        raise NearfarError("on one process the loss has no gradient: there is nothing to compare.")
    length = float(second.norm())
    return LossVerdict(
        ranks,
        length / norm,
        float(first @ second / (first.norm() * second.norm())) if length else 0.0,
        float(several["scale"] / one["scale"]) if takes_scale and float(one["scale"]) else None,
        float(one["values"][0]),
        tuple(several["values"].tolist()),
    )


def _parameters(fn: Callable[..., object]) -> int:
    target = fn.forward if isinstance(fn, torch.nn.Module) else fn
    try:
        given = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return 2
    return sum(
        each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) and each.default is each.empty
        for each in given
    )


def _run(
    fn: Callable[..., Tensor], parts: Sequence[Batch], takes_scale: bool, labels: bool, timeout: float
) -> dict[str, Tensor]:
    with TemporaryDirectory(prefix="nearfar-verify-") as folder:
        context = mp.start_processes(
            _rank,
            (fn, list(parts), takes_scale, labels, folder, timeout),
            nprocs=len(parts),
            join=False,
            start_method=start_method(),
        )
        assert context is not None
        end = time.monotonic() + timeout
        try:
            while not context.join(timeout=0.5):
                if time.monotonic() > end:
                    raise NearfarError(
                        f"the {len(parts)} processes were not done after {timeout:.0f} s: they wait for each other, as "
                        "where only some of them gather."
                    )
        except mp.ProcessExitedException as error:  # before it ran: what it was handed could not be read
            raise NearfarError(
                f"a process ended before it began (exit code {error.exit_code}), as where it cannot import the module "
                f"'{getattr(fn, '__module__', type(fn).__module__)}': give a function of an installed package, or of a "
                "module beside the tests."
            ) from None
        except mp.ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            raise NearfarError(f"the loss failed in a process: {last}") from None
        finally:
            for process in context.processes:
                process.kill()
        result: dict[str, Tensor] = torch.load(Path(folder) / "result.pt", weights_only=True)
        return result


def _rank(
    rank: int,
    fn: Callable[..., Tensor],
    parts: Sequence[Batch],
    takes_scale: bool,
    labels: bool,
    folder: str,
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=len(parts),
        timeout=timedelta(seconds=timeout + 30),  # so that the parent is the one to say who waits
    )
    result = _step(fn, parts[rank], takes_scale, labels)
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.barrier()
    # DDP's reducer holds the group. Were it the last to do so, it would keep the interpreter's lock while it waits for
    # gloo's thread, which may wait for that lock (pytorch issue 56297): so the wrapper goes first.
    gc.collect()
    dist.destroy_process_group()


def _step(fn: Callable[..., Tensor], own: Batch, takes_scale: bool, labels: bool) -> dict[str, Tensor]:
    """Gradients of a step of this rank, and the values of the loss on every rank."""
    model = Encoder()
    model.bias.requires_grad_(False)
    model.log_scale.requires_grad_(takes_scale)
    parallel = DistributedDataParallel(model)  # kept: without it nothing is reduced in backward
    a, b, scale, _ = parallel(own.x, own.y)
    value = fn(a, own.labels if labels else b, *([scale] if takes_scale else []))
    value.backward()
    values = [torch.zeros((), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.detach().double().reshape(()))
    zero = torch.zeros(1, dtype=torch.float64)
    grads = [zero if p.grad is None else p.grad.flatten() for p in model.layers.parameters()]
    learned = zero if model.log_scale.grad is None else model.log_scale.grad
    return {"gradient": torch.cat(grads), "scale": learned, "values": torch.stack(values)}


# -- a loader ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ResumeVerdict:
    """A loader that was stopped and went on, beside one that was not.

    ``cases`` has for each number of batches after which it stopped how many of the batches that were left came in their
    place, were ``repeated`` (had come before the stop), were ``skipped``, or are ``strange`` (in no epoch of the
    whole).
    """

    batches: int
    cases: tuple[dict[str, int], ...]

    @property
    def passed(self) -> bool:
        """Whether every resumed loader gave exactly what was left, in order."""
        return all(case["in_place"] == case["left"] == case["given"] for case in self.cases)

    def __str__(self) -> str:
        lines = [f"{'exact' if self.passed else 'different'}: {self.batches} batches over all epochs"]
        for case in self.cases:
            wrong = ", ".join(
                f"{case[name]} {name}" for name in ("repeated", "skipped", "strange") if case[name]
            )
            number = case["given"] - case["left"]
            much = "" if not number else f"{abs(number)} too {'many' if number > 0 else 'few'}"
            order = "" if case["in_place"] == case["left"] else "in a different order"
            outcome = wrong or much or order or "exact"
            lines.append(
                f"  after {case['stopped']}: {case['given']} batches for {case['left']} left: {outcome}"
            )
        return "\n".join(lines)


class Loader(Protocol):
    """Batches that know how far they were read, such as a ``StatefulDataLoader`` or a batch sampler of nearfar."""

    def __iter__(self) -> Iterator[object]: ...

    def state_dict(self) -> Json: ...

    def load_state_dict(self, state: Json) -> None: ...


def resume(
    make_loader: Callable[[], Loader],
    *,
    epochs: int = 2,
    stops: Sequence[int] | None = None,
    most: int = 10_000,
) -> ResumeVerdict:
    """Does a loader repeat or skip data after a resume? n batches against k, a new loader with the state, and n − k.

    Args:
        make_loader: makes a new loader: an iterable of batches with ``state_dict()`` and ``load_state_dict(state)``,
            such as a ``StatefulDataLoader`` or a batch sampler of nearfar. Where it has ``set_epoch``, this is called
            before each epoch.
        epochs: passes over the data; with two, a stop in the second shows what shuffling remembers.
        stops: numbers of batches after which it stops; None: at the start, in the middle and the end of an epoch, and
            in the next.
        most: batches of an epoch after which a loader is taken to be endless.

    Raises:
        NearfarError: a loader without a state, without batches, or without an end.

    >>> from nearfar.batching import RandomBatchSampler
    >>> print(resume(lambda: RandomBatchSampler(10, 4), stops=[1]))
    exact: 6 batches over all epochs
      after 1: 5 batches for 5 left: exact
    """
    epochs = whole_number("epochs", epochs, 1)
    for name in ("state_dict", "load_state_dict"):
        if not hasattr(make_loader(), name):
            raise NearfarError(
                f"the loader has no {name}: it cannot be resumed, and a run that goes on begins its epoch anew."
            )
    whole = [key for key, _ in _batches(make_loader(), 0, epochs, most)]
    if not whole:
        raise NearfarError("the loader gives no batch.")
    length = sum(1 for _ in _batches(make_loader(), 0, 1, most))
    if stops is None:
        stops = sorted({1, max(1, length // 2), max(1, length - 1), min(len(whole) - 1, length + 1)})
    cases = []
    for stop in stops:
        if not 0 < stop < len(whole):
            raise NearfarError(f"stops: {stop} is not within the {len(whole)} batches of {epochs} epochs.")
        first, taken, state, epoch = make_loader(), 0, None, 0
        for _, at in _batches(first, 0, epochs, most):
            taken, epoch = taken + 1, at
            if taken == stop:
                state = first.state_dict()
                break
        second = make_loader()
        # A state as it comes out of a checkpoint: nothing is shared with the loader that stopped.
        second.load_state_dict(pickle.loads(pickle.dumps(state)))
        ended = stop == length * (epoch + 1)
        rest = [key for key, _ in _batches(second, epoch + ended, epochs, most, goes_on=not ended)]
        left, before = whole[stop:], set(whole[:stop]) - set(whole[stop:])
        cases.append(
            {
                "stopped": stop,
                "left": len(left),
                "given": len(rest),
                "in_place": sum(a == b for a, b in zip(left, rest, strict=False)),
                "repeated": sum(key in before for key in rest),
                "skipped": len(set(left) - set(rest)),
                "strange": sum(key not in set(whole) for key in rest),
            }
        )
    return ResumeVerdict(len(whole), tuple(cases))


def _batches(
    loader: Loader, start: int, epochs: int, most: int, goes_on: bool = False
) -> Iterator[tuple[str, int]]:
    """A key of each batch's content, and its epoch. ``goes_on``: a state was loaded into the first epoch."""
    for epoch in range(start, epochs):
        if hasattr(loader, "set_epoch") and not (goes_on and epoch == start):
            loader.set_epoch(epoch)
        for count, batch in enumerate(loader):
            if count >= most:
                raise NearfarError(f"the loader gave {most} batches without an end.")
            yield content_key(_plain(batch)), epoch


def _plain(value: object) -> object:
    """What a key can be made of: tensors as arrays, objects by their fields."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (str, bytes, bool, int, float, np.ndarray)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    fields = getattr(value, "fields", None) or getattr(value, "__dict__", None)
    if fields:
        return _plain(dict(fields))
    raise NearfarError(f"a batch holds a {type(value).__name__}, whose content cannot be compared.")
