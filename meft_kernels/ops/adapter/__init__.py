"""The bottleneck adapter: alone, beside a residual, and as the branch of a coupling step.

    pre = x @ down.T + down_bias
    z   = dropout(activation(pre))
    out = z @ up.T + up_bias

``reference`` is the specification in plain torch, ``triton_forward`` and ``triton_backward`` the fused kernels, ``api``
the functions that everybody calls, ``dropout`` the mask that all of them draw.
"""
