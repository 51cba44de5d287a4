"""The frame all techniques share: op catalogue, JIT loader, instruction sets, swapping, checkpoints."""
