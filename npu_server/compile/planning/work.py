"""How many multiplications a layer takes."""

import math

from npu_server.compile.graph import Conv, Gemm, HostPart, Kernel, MatMul, Shape


def products(kernel: Kernel, shape: Shape) -> int:
    """Multiplications for one code of the output; 0 of what is no sum of products.

    Args:
        kernel: what the layer does.
        shape: of its first input, without the batch.
    """
    match kernel:
        case Conv() as conv:
            return math.prod(conv.window.kernel) * shape[0] // conv.groups
        case Gemm() as gemm:
            return shape[gemm.axis]
        case MatMul() as product:
            return shape[-2 if product.constant_first else -1]
    return 0


def multiplications(kernel: Kernel, shape: Shape, output: Shape) -> int:
    """Multiply-accumulates of one sample, those of a host part included; arguments as of `products`."""
    return kernel.macs if isinstance(kernel, HostPart) else products(kernel, shape) * math.prod(output)
