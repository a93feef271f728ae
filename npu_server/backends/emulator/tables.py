"""Functions of one code or of two as tables."""

import torch


def look_up(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Entry code + 128 of a table of 256, element by element."""
    return table[x.to(torch.int32) + 128]


def look_up_pairs(table: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Entry (a + 128) * 256 + b + 128 of a table of 65,536; a and b broadcast."""
    return table[((a.to(torch.int32) + 128) << 8) + (b.to(torch.int32) + 128)]
