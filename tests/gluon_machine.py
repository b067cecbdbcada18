"""What of a Hopper multiprocessor a program can see: shared memory, barriers, products under way, and who runs when."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Hazard(Exception):
    """The kernel does what the hardware gives no meaning: a race, a result read too early, a deadlock."""


class _Stopped(BaseException):
    """Ends the other partitions once one has failed."""


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.shape, self.dtype = data, list(data.shape), data.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.permute(order))


@dataclass
class Barrier:
    """An mbarrier. A phase completes with the last arrival that it counts and the last byte that it expects."""

    count: int = 0
    waiting: int = 0
    bytes: int = 0
    phase: int = 0

    def arrived(self, arrivals: int, expected: int = 0) -> None:
        self.waiting -= arrivals
        self.bytes += expected
        if self.waiting < 0 or not self.count:
            raise Hazard("a barrier has more arrivals in a phase than it counts")
        if self.waiting == 0 and self.bytes == 0:
            self.phase, self.waiting = self.phase + 1, self.count


@dataclass
class Product:
    """A product that has been issued. Its operands in shared memory are read when it is retired."""

    a: Any
    b: Shared
    acc: Tensor
    use_acc: bool
    value: Tensor | None = None
    seen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seen = [_read(operand).clone() for operand in (self.a, self.b)]

    def retire(self) -> None:
        now = [_read(operand) for operand in (self.a, self.b)]
        if not all(torch.equal(x.nan_to_num(7e4), y.nan_to_num(7e4)) for x, y in zip(now, self.seen, strict=True)):
            raise Hazard("an operand in shared memory changes while a product reads it")
        self.value = now[0].float() @ now[1].float() + (self.acc if self.use_acc else 0)


def _read(operand: Any) -> Tensor:
    return operand.data if isinstance(operand, Shared) else operand


class Partition(threading.Thread):
    """One partition: a thread that runs when it has the turn, and the products it has issued."""

    def __init__(self, schedule: Schedule, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        super().__init__(daemon=True)
        self.schedule, self.function, self.arguments = schedule, function, arguments
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[Product] = []
        self.error: BaseException | None = None
        self.done = False

    def run(self) -> None:
        self.turn.acquire()
        CURRENT.set(self.schedule)
        try:
            if not self.schedule.stopping:
                self.function(*self.arguments)
            if self.products:
                raise Hazard("a product is never waited for")
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.schedule.back.release()


class Schedule:
    """Partitions, and copies under way, of one program; the next step of either is drawn."""

    def __init__(self, program: int, seed: int) -> None:
        self.program, self.random = program, random.Random(f"{program} {seed}")
        self.back = threading.Semaphore(0)
        self.copies: list[Callable[[], None]] = []
        self.partitions: list[Partition] = []
        self.running: Partition | None = None
        self.stopping = False

    def run(self, functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]]) -> None:
        self.partitions = [Partition(self, *f) for f in functions]
        eagerness = {p: self.random.choice([1, 1, 30]) for p in self.partitions}
        landing = self.random.choice([0, 0.1, 1, 30])  # 0: only when nothing else can happen
        for p in self.partitions:
            p.start()
        while (alive := [p for p in self.partitions if not p.done]) or self.copies:
            able = [p for p in alive if p.ready()]
            if not able and not self.copies:
                self._stop(alive)
                raise Hazard("deadlock: every partition waits for a barrier")
            choices: list[Any] = [*able, *range(len(self.copies))]
            weights = [eagerness[p] for p in able] + [landing] * len(self.copies)
            choice = self.random.choices(choices, weights if any(weights) else None)[0]
            if isinstance(choice, int):
                self.copies.pop(choice)()
                continue
            self._resume(choice)
            if choice.error is not None:
                self._stop([p for p in alive if not p.done])
                raise choice.error

    def _resume(self, partition: Partition) -> None:
        self.running = partition
        partition.turn.release()
        self.back.acquire()

    def _stop(self, alive: list[Partition]) -> None:
        self.stopping = True
        for p in alive:
            self._resume(p)

    def step(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, at least until `ready`."""
        partition = self.running
        if partition is None:  # before the kernel is divided
            return
        partition.ready = ready
        self.back.release()
        partition.turn.acquire()
        if self.stopping:
            raise _Stopped


CURRENT: ContextVar[Schedule] = ContextVar("schedule")
