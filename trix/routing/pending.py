"""What training batches ask of a router, until the backward passes that may compute them again are done."""

import sys
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def is_in_backward() -> bool:
    """Whether this runs inside a backward pass: a forward there computes again what was computed before (checkpointing)."""
    return torch._C._current_graph_task_id() != -1


class Pending:
    """The sum of the nudges that batches give a router's balance bias, and what has to be over before it may move.

    Activation checkpointing runs a layer's forward once more during the backward pass, and must meet the same routing. So
    the balance moves after that pass alone. A forward may be run again as long as its graph lives; where checkpointing is
    reentrant, as long as the autograd function lives in whose forward it was run. However many forwards are awaited, their
    sum is one tensor; the router scales it by the step of the age that it has then.

    Attributes:
        num_batches: how many are in the sum. nudge_E: the sum; None for 0.
    """

    def __init__(self) -> None:
        self.num_batches = 0
        self.nudge_E: Tensor | None = None
        self._graphs: WeakSet[_GraphHook] = WeakSet()
        self._functions: WeakSet[FunctionCtx] = WeakSet()

    def add(self, nudge_E: Tensor | None) -> None:
        self.num_batches += 1
        if nudge_E is not None:
            self.nudge_E = nudge_E if self.nudge_E is None else self.nudge_E + nudge_E

    def clear(self) -> None:
        self.num_batches, self.nudge_E = 0, None

    @property
    def is_awaited(self) -> bool:
        """Whether a forward may still be run again."""
        return bool(self._graphs or self._functions)

    def wait_for(self, y: Tensor, then: Callable[[], None]) -> bool:
        """Await the backward pass through y, the output of a forward; call `then` after it. False where there will be none."""
        if y.requires_grad:
            hook = _GraphHook(self, then)
            self._graphs.add(hook)
            y.register_hook(hook)  # type: ignore[no-untyped-call]
            return True
        functions = [] if torch.is_grad_enabled() else list(_functions_around())
        # The outermost is the one whose backward will be called: those within it are not recorded.
        self._functions.update(functions[-1:])
        return bool(functions)

    def note_recomputation(self, then: Callable[[], None]) -> None:
        """Say that a forward is being run again; where its function is awaited, call `then` after the backward pass."""
        for function in _functions_around() if self._functions else ():
            if function in self._functions:
                self.after_backward(self._functions, function, then)

    def after_backward(self, awaited: WeakSet[Any], item: object, then: Callable[[], None]) -> None:
        """Take the item off those that are awaited, at the end of the backward pass that is running, and call `then`."""
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return  # there may be another pass through the same graph

        def finish() -> None:
            awaited.discard(item)
            then()

        torch.autograd.Variable._execution_engine.queue_callback(finish)

    def __getstate__(self) -> dict[str, Any]:
        return {"num_batches": self.num_batches, "nudge_E": self.nudge_E}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]  # a copy is no part of the graphs that the original waits for
        self.__dict__.update(state)


class _GraphHook:
    """A hook on the output of a forward: it lives as long as the output's graph."""

    def __init__(self, pending: Pending, then: Callable[[], None]) -> None:
        self._pending, self._then = pending, then

    def __call__(self, grad: Tensor) -> None:  # noqa: ARG002
        self._pending.after_backward(self._pending._graphs, self, self._then)


def _functions_around() -> Iterator[FunctionCtx]:
    """The autograd functions in whose forward or backward this runs, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, FunctionCtx):
                yield first
        frame = frame.f_back  # type: ignore[assignment]
