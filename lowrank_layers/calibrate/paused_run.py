"""A computation that stops where it is told to and goes on later, with everything that it holds at that place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch

from ..linalg import half_products_in_fp32, in_fp32

T = TypeVar("T")
_current = threading.local()


class _Abandoned(BaseException):
    """Ends a computation that nobody will go on with; no ``except Exception`` of a model catches it."""


class PausedRun:
    """Runs a function in a thread of its own, which works only while :meth:`resume` waits for it.

    A forward pass that pauses keeps nothing but what the rest of it needs: Python itself knows what that is, whatever
    the model does between its layers. Autocast, default device and CUDA device are those of the thread that made it.

    Args:
        function: what to run; it, and what it calls, may call :func:`pause`.
        gradients: whether gradients are enabled in it.

    Attributes:
        paused_at: what :func:`pause` was called with; ``None`` before the start and after the end.
        done: whether the function has returned.

    Examples:
        >>> run = PausedRun(lambda: [pause(place) for place in ("first", "second")])
        >>> run.resume()
        'first'
        >>> run.resume()
        'second'
        >>> run.resume(), run.done
        (None, True)
    """

    def __init__(self, function: Callable[[], object], *, gradients: bool = False) -> None:
        self.paused_at: object = None
        self.done = False
        self._function = function
        self.gradients = gradients
        self._context = thread_state(gradients=gradients)
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._abandoned = False
        self._asked: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def resume(self) -> object:
        """Goes on to the next pause, and returns what it says; ``None`` at the end.

        What the function raises is raised here.
        """
        if self.done:
            return None
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self.paused_at = None
        self._go.release()
        self._stopped.acquire()
        while self._asked is not None:
            self._asked()
            self._asked = None
            self._go.release()
            self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self.paused_at

    def close(self) -> None:
        """Ends it where it is, and lets go of what it holds."""
        if self._thread is not None and not self.done:
            self._abandoned = True
            self._go.release()
            self._thread.join()
        self.done = True

    def _run(self) -> None:
        self._go.acquire()
        _current.run = self
        try:
            if not self._abandoned:
                with self._context():
                    self._function()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.done, self.paused_at = True, None
            self._stopped.release()

    def _pause(self, place: object) -> None:
        self.paused_at = place
        self._wait()

    def _ask(self, function: Callable[[], T]) -> T:
        context = thread_state(gradients=torch.is_grad_enabled())
        results: list[T] = []
        errors: list[BaseException] = []

        def answer() -> None:
            try:
                with context():
                    results.append(function())
            except BaseException as error:
                errors.append(error)

        self._asked = answer
        self._wait()
        for error in errors:
            raise error
        return results.pop()

    def _wait(self) -> None:
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned


def pause(place: object) -> None:
    """Pauses the :class:`PausedRun` that calls it.

    Args:
        place: what :meth:`PausedRun.resume` returns; not ``None``.
    """
    current_run()._pause(place)


def in_resuming_thread(function: Callable[[], T]) -> T:
    """Calls a function in the thread that waits in :meth:`PausedRun.resume`; outside of runs, in this one.

    Libraries of linear algebra keep buffers for every thread that has ever computed something large.

    Args:
        function: what to call; it must not pause.
    """
    run: PausedRun | None = getattr(_current, "run", None)
    return function() if run is None else run._ask(function)


def current_run() -> PausedRun:
    """The run whose thread this is.

    Raises:
        LookupError: in any other thread.
    """
    run: PausedRun | None = getattr(_current, "run", None)
    if run is None:
        raise LookupError("no PausedRun is running in this thread")
    return run


def thread_state(*, gradients: bool) -> Callable[[], AbstractContextManager[None]]:
    """Returns what a new thread does not inherit from this one, as a function to enter it there.

    Args:
        gradients: whether gradients are enabled there.
    """
    devices = {"cpu", torch.get_default_device().type} | ({"cuda"} if torch.cuda.is_initialized() else set())
    autocast = {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in devices & {"cpu", "cuda", "xpu", "mps"}
    }
    default = torch.get_default_device()
    wide = in_fp32()
    cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(half_products_in_fp32(wide))
            if cuda is not None:
                stack.enter_context(torch.cuda.device(cuda))
            if default.type != "cpu":
                stack.enter_context(torch.device(default))
            for device, (enabled, dtype) in autocast.items():
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield

    return entered
