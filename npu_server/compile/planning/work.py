"""How many multiplications a layer takes."""

import math

from npu_server.compile.graph import Conv, Gemm, HostPart, MatMul, Operator, Shape


def products(operator: Operator, shape: Shape) -> int:
    """Multiplications for one code of the output; 0 of what is no sum of products.

    Args:
        operator: what the layer does.
        shape: of its first input, without the batch.
    """
    match operator:
        case Conv() as conv:
            return math.prod(conv.window.size) * shape[0] // conv.groups
        case Gemm() as gemm:
            return shape[gemm.axis]
        case MatMul() as product:
            return shape[-2 if product.constant_first else -1]
    return 0


def multiplications(operator: Operator, shape: Shape, output: Shape) -> int:
    """Multiply-accumulates of one sample, those of a host part included; arguments as of `products`."""
    return operator.macs if isinstance(operator, HostPart) else products(operator, shape) * math.prod(output)
