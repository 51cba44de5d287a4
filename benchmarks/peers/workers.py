"""A process for each runner, so that they share nothing but the machine, and the turns they take."""

import multiprocessing
import os
import warnings
from typing import Any

from . import Peer


class WorkerError(RuntimeError):
    """A runner failed, or its process ended; the message says how."""


class Worker:
    """The parent's end of a process with one runner, which is asked for what `Runner` has."""

    def __init__(self, peer: Peer, model: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, peer, model, threads))
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()  # which ends it, unless it is busy or a library hangs
        self.process.join(10)
        self.process.kill()
        self.process.join()

    def ask(self, method: str = "", *arguments: Any) -> Any:
        """The result of a method; without one, waits until the runner is loaded."""
        try:
            if method:
                self.pipe.send((method, arguments))
            result, error = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            raise WorkerError(f"its process ended with code {self.process.exitcode}") from None
        if error:
            raise WorkerError(error)
        return result


def _serve(pipe: Any, peer: Peer, model: str, threads: int) -> None:
    os.dup2(2, 1)  # whatever a library prints must not land among the results
    warnings.simplefilter("ignore")
    try:
        runner = peer.make(model, threads)
        pipe.send((None, None))
        while True:
            method, arguments = pipe.recv()
            pipe.send((getattr(runner, method)(*arguments), None))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {str(error)[:500]}"))
