"""Running a model block by block, in its own code: so every block gets the arguments the model gives it, masks and positions included."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Item = Tensor | Mapping[str, Any]


class _Stop(BaseException):
    """Ends a forward pass whose rest is not needed; no Exception, so that the model's own code does not catch it."""


def call(model: nn.Module, item: Item) -> Any:
    """``model`` on one item of calibration data: a tensor is its first argument, a dictionary holds keyword arguments."""
    return model(**item) if isinstance(item, Mapping) else model(item)


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and no key-value cache where the model's config has a switch for it; all put back at the end."""
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    caching = getattr(config, "use_cache", None)
    try:
        for module in training:
            module.training = False
        if isinstance(caching, bool):
            config.use_cache = False  # type: ignore[union-attr]
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if isinstance(caching, bool):
            config.use_cache = caching  # type: ignore[union-attr]


@dataclass
class _Watch:
    """Whether the children of a list follow each other as a chain: each once, in order, with the last one's output among its inputs."""

    children: list[nn.Module]
    done: int = 0
    output: Tensor | None = None
    chained: bool = True
    span: list[int] = field(default_factory=list)  # when its calls began and ended


def repeated(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The lists of repeated blocks, by name, outer ones before those inside them.

    That is every ``nn.ModuleList`` or ``nn.Sequential`` of two children or more, all of one class and with Linear layers inside.
    """
    result: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            children = list(module)
            different = len({id(child) for child in children}) == len(children)
            if different and len(children) > 1 and len({type(child) for child in children}) == 1 and all(map(_holds_linear, children)):
                result[name] = children
    return result


def _holds_linear(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear) for inner in module.modules() if inner is not module)


def find_stacks(model: nn.Module, item: Item) -> list[list[str]]:
    """Finds the blocks that follow each other (a Llama's layers, an encoder's and a decoder's), by running the model on one item.

    A stack is one of `repeated` whose blocks run once each, in order, and pass their output on to the next one.

    Returns:
        The names of the blocks of each stack, in the order in which they run; empty if there are none.
    """
    watches = {name: _Watch(children) for name, children in repeated(model).items()}
    clock = 0

    def watch(stack: _Watch, index: int) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal clock
            clock += 1
            stack.span.append(clock)
            linked = index == 0 or any(value is stack.output for value in (*args, *kwargs.values()))
            stack.chained &= index == stack.done and linked

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal clock
            clock += 1
            stack.span.append(clock)
            stack.done += 1
            stack.output = _first_tensor(output)
            stack.chained &= stack.output is not None

        return before, after

    with ExitStack() as hooks:
        for stack in watches.values():
            for index, child in enumerate(stack.children):
                before, after = watch(stack, index)
                hooks.enter_context(child.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(child.register_forward_hook(after, with_kwargs=True))
        call(model, item)
    chosen: dict[str, _Watch] = {}
    for name, stack in watches.items():  # outer lists come before those inside them
        inside = any(other == "" or name.startswith(f"{other}.") for other in chosen)
        if stack.chained and stack.done == len(stack.children) and not inside:
            chosen[name] = stack
    result: list[list[str]] = []
    end = 0
    for name, stack in sorted(chosen.items(), key=lambda pair: pair[1].span[0]):
        if stack.span[0] > end:  # one that runs in the middle of another cannot be replayed
            result.append([f"{name}.{i}" if name else str(i) for i in range(len(stack.children))])
            end = stack.span[-1]
    return result


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


class Replay:
    """Runs a model up to one block after the other, for all items, and keeps the outputs of the last block that is done.

    Blocks that are done are replaced by those outputs, so that each block runs once for a change and once to pass the change on.

    Args:
        model: the model.
        items: the calibration data.
        stacks: of `find_stacks`.
    """

    def __init__(self, model: nn.Module, items: Sequence[Item], stacks: list[list[str]]) -> None:
        self.model = model
        self.items = items
        self.blocks = [(model.get_submodule(name), number) for number, names in enumerate(stacks) for name in names]
        self.outputs: list[dict[int, Any]] = [{} for _ in items]  # of each item: the last output known, by stack
        self.known = -1  # the block whose outputs those are

    def run(self, index: int, after_item: Callable[[], None]) -> None:
        """Runs all items up to and including block ``index``, or to the end of the model if there is none of that number.

        Args:
            index: a block; those before it must not change any more.
            after_item: called after each item.
        """
        for item, outputs in zip(self.items, self.outputs, strict=True):
            with ExitStack() as patches:
                for number, (block, stack) in enumerate(self.blocks[: index + 1]):
                    patches.enter_context(_patched(block, self._stand_in(block, number, index, stack, outputs)))
                with suppress(_Stop):
                    call(self.model, item)
            after_item()
        self.known = index - 1

    def _stand_in(self, block: nn.Module, number: int, index: int, stack: int, outputs: dict[int, Any]) -> Callable[..., Any]:
        forward = block.forward

        def replay(*args: Any, **kwargs: Any) -> Any:
            return outputs[stack]

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            outputs[stack] = copy.deepcopy(output)  # what comes next may change it in place
            return output

        def stop(*args: Any, **kwargs: Any) -> Any:
            forward(*args, **kwargs)
            raise _Stop

        return stop if number == index else replay if number <= self.known else run


@contextmanager
def _patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
