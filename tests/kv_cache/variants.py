"""Other implementations of KVCrush as far as their choice goes, from descriptions of their code, in NumPy: what ours is compared with."""

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value from the largest down, ties by position."""
    order = np.argsort(-values, kind="stable")
    places = np.empty(len(values), int)
    places[order] = np.arange(len(values))
    return places


def block_bits(score: np.ndarray, block: int) -> np.ndarray:
    """``(blocks, heads * block)``: which tokens are in the upper half of ``score``, ``(heads, tokens)``, head by head."""
    upper = np.stack([ranks(row) < len(row) // 2 for row in score])
    return upper.reshape(len(score), -1, block).transpose(1, 0, 2).reshape(-1, len(score) * block)


def openvino(score: np.ndarray, block: int, important: int, representatives: int) -> tuple[list[int], list[int]]:
    """Blocks that OpenVINO GenAI keeps of the evictable ones: the important ones, and its representatives in the order of their distance.

    Scores are summed over the heads before anything else, the blocks that importance keeps are no candidates, and picks are a whole number
    of candidates apart, from the nearest on (``cache/kvcrush.cpp``; here with its mean anchor).

    Args:
        score: ``(heads, tokens)``.
        block: tokens of a block.
        important: blocks kept for their score.
        representatives: blocks kept besides; at most as many as are left.
    """
    total = score.sum(0)
    bits = block_bits(total[None], block)
    kept = np.argsort(-total.reshape(-1, block).sum(1), kind="stable")[:important]
    distance = (bits != (2 * bits.sum(0) > len(bits))).sum(1)
    candidates = [int(b) for b in np.argsort(distance, kind="stable") if b not in kept]
    step = len(candidates) // representatives
    return sorted(kept.tolist()), [candidates[i * step] for i in range(representatives)]


def vllm(score: np.ndarray, page: int, important: int, representatives: int) -> list[list[int]]:
    """Pages that vLLM's pull request 47967 keeps of the evictable ones, for each KV head; a page may come twice.

    Importance is by head, representatives are common to all; candidates are what head 0 does not keep; picks are evenly spread from the
    nearest to the farthest.

    Args:
        score: ``(KV heads, tokens)``.
        page: tokens of a page.
        important: pages kept for their score.
        representatives: pages kept besides.
    """
    bits = block_bits(score, page)
    sums = score.reshape(len(score), -1, page).sum(2)
    kept = [np.argsort(-row, kind="stable")[:important].tolist() for row in sums]
    distance = (bits != (2 * bits.sum(0) > len(bits))).sum(1)
    candidates = [int(p) for p in np.argsort(distance, kind="stable") if p not in kept[0]]
    picks = [candidates[i] for i in np.linspace(0, len(candidates) - 1, representatives).astype(int)]
    return [sorted(head + picks) for head in kept]
