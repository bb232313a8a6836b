"""The coupling step of a reversible layer: one lane, forward and inverse.

Exact (int32 fixed point, ``fraction_bits`` = k, coefficient = sign / q):

    d = a - center                       (d = a without a center)
    t = floor(d / q),   rem = d - q * t  rem in [0, q)
    y = round(branch * 2^k) + sign * t

    t = sign * (y - round(branch * 2^k))
    a = center + q * t + rem

Float:

    y = branch + coefficient * (a - center)
    a = center + (y - branch) / coefficient

``reference`` is the executable specification in plain torch, ``triton`` the fused kernels, ``api`` the functions that
everybody calls. The layout of the packed remainders is described in ``packing``.
"""
