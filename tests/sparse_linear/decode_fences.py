"""Runs the fused decoder on arguments between pages that must not be touched, intact and damaged; test_decode.py starts it."""

import torch

import torch_cpu_ext as tce
from torch_cpu_ext.core.isa import supported
from torch_cpu_ext.sparse_linear.decode import PARTS as COLUMNS
from torch_cpu_ext.sparse_linear.decode import decode

from cases import CASES
from support import Fence

POSITIONAL = ("hidden", "arena", "vectors", "plan", "cos", "sin", "positions", "starts", "kv", "length")
assert tce.load("sparse_linear")
fences = {name: Fence(1 << 20) for name in POSITIONAL}
case = CASES["sparse_linear_decode"]
random = torch.Generator().manual_seed(0)


def call(args):
    return decode(*(args[name] for name in POSITIONAL), **{k: v for k, v in args.items() if k not in POSITIONAL})


def placed(args, at_end=True):
    return {k: fences[k].place(v, at_end) if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def fenced() -> None:
    """Equal results at either end of the fences."""
    count = 0
    for sample in [*case.samples(), *case.few()]:
        for isa in supported():
            with tce.isa(isa):
                expected = call(sample.args | {"kv": sample.args["kv"].clone()})
                for at_end in (True, False):
                    assert call(placed(sample.args, at_end)).equal(expected), sample.name
                    count += 1
    print(f"{count} calls between fences")


def attempt(args) -> bool:
    """Whether the op answered; it may refuse with a RuntimeError that names the argument."""
    try:
        call(args)
    except RuntimeError as error:
        if not any(f"{name} must" in str(error) for name in ("arena", "plan", "positions", "starts", "inner", "heads", "vocabulary")):
            raise AssertionError("the message does not name the argument") from error
        return False
    return True


def draw(end: int) -> int:
    return int(torch.randint(end, (), generator=random))


def flips() -> None:
    """Bytes of the arena changed at random, headers above all."""
    answered = refused = 0
    for sample in case.few():
        args = placed(sample.args)
        intact = args["arena"].clone()
        weights = [COLUMNS.index(part) for part in ("q", "k", "v", "o", "gate", "up", "down")]
        heads = sorted(set(args["plan"][:, weights].flatten().tolist()))
        heads = [at for at in heads if at >= 0]
        for i in range(600):
            args["arena"].copy_(intact)
            for _ in range(1 + draw(4)):
                at = heads[draw(len(heads))] + draw(128) if i % 2 else draw(len(intact))
                args["arena"][min(at, len(intact) - 1)] = draw(256)
            with tce.isa(supported()[i % len(supported())]):
                torch.set_num_threads(1 + i % 3)
                if attempt(args):
                    answered += 1
                else:
                    refused += 1
        for length in range(0, len(intact), 97):  # truncated
            attempt(args | {"arena": fences["arena"].place(intact[:length])})
    print(f"{answered} answered, {refused} refused")
    assert answered
    assert refused


def plans() -> None:
    """Each entry of the plan set to numbers near the ends, to other parts' places and to extremes."""
    answered = refused = 0
    for sample in case.few()[:3]:
        args = placed(sample.args)
        plan = args["plan"].clone()
        ends = [len(args["arena"]), len(args["vectors"])]
        near = [end + d for end in ends for d in (-4096, -65, -64, -63, -8, -1, 0, 1, 64)]
        extremes = [0, 1, -1, -2, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, -(1 << 63)]
        others = sorted({int(v) for v in plan.flatten()})[::5]
        for line in range(plan.shape[0]):
            for column in range(plan.shape[1]):
                for value in [*near, *extremes, *others]:
                    args["plan"].copy_(plan)
                    args["plan"][line, column] = value
                    if attempt(args):
                        answered += 1
                    else:
                        refused += 1
    print(f"{answered} answered, {refused} refused")
    assert answered
    assert refused


PARTS = {part.__name__: part for part in (fenced, flips, plans)}
