"""Functions whose peak memory is measured; they import little, as each new process imports this file."""

import torch


def allocate(megabytes: int) -> None:
    torch.ones(megabytes * 10**6 // 4)


def fragment() -> None:
    """Allocate 80 MB in blocks that glibc cannot give back when they are freed, and then 100 MB."""
    torch.ones(250_000)  # 1 MB: from now on glibc takes smaller blocks from its heap
    blocks = [torch.ones(200_000) for _ in range(101)]
    del blocks[:-1]  # the one that stays is above them
    torch.ones(25_000_000)
